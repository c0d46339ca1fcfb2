"""The search: time all forms, then judge the fastest first, and take the first that keeps the accuracy."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from vitral.evaluation.task import Task
from vitral.runtime.errors import VitralError
from vitral.ship.optimize.candidates import (
    EAGER,
    LAST_RESORTS,
    LEFT_IN_FLOAT,
    STRENGTHS,
    Candidate,
    candidates,
    merged_counts,
)
from vitral.ship.optimize.images import Pixels
from vitral.ship.optimize.judge import Judgement, judge, refitted
from vitral.ship.optimize.lab import Contender, Lab, batch_for, final, speed
from vitral.ship.optimize.ledger import Row, Verdict

# A form must be this much faster than the eager model, beyond what rounds differ by on an idle machine.
LEAST_GAIN = 1.05
# A form that was this much slower in its first reading is not timed further.
_HOPELESS = 1.5
# Of the time: how much building one candidate may take, all rounds, and what is kept for the float32 forms,
# whose answers need no luck.
_A_CANDIDATES_SHARE, _ROUNDS_SHARE, _KEPT_SHARE = 0.2, 0.15, 0.25
# All forms are judged by so many images, and by more if the eager model answers them in this share of the
# time; by fewer if 2,000 would take it longer than this share of what is left.
_LEAST_JUDGED, _JUDGING_SHARE, _MOST_OF_THE_REST = 2000, 0.15, 0.4


@dataclass(frozen=True)
class Subject:
    """What is optimized, and what its forms are judged by."""

    task: Task
    classes: tuple[str, ...]
    temperature: float
    patches: int
    layers: int
    trying: Pixels  # training images that no range is measured on
    fitting: Pixels
    judging: Pixels
    max_drop: float  # share


@dataclass
class Search:
    """One search.

    Args:
        lab: where forms are made and measured.
        subject: what is optimized.
        ends: when it must be done, by `time.monotonic`.
        minutes: that it may take in all.
        judge_all: whether forms are judged that are slower than one that fits.
        tell: told what is being done, in a few words.
        on_images: told how many images are done, of how many.
    """

    lab: Lab
    subject: Subject
    ends: float
    minutes: float
    judge_all: bool = False
    tell: Callable[[str], None] = lambda _: None
    on_images: Callable[[int, int], None] = lambda *_: None
    rows: dict[str, Row] = field(default_factory=dict)
    tried: dict[str, dict[str, float]] = field(default_factory=dict)  # see `Row.tried`

    def __post_init__(self) -> None:
        self.judging = self.subject.judging

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()

    def run(self) -> Contender | None:
        """Search; `rows` then says what was found. Gives what was taken, if anything was."""
        contenders = self._built()
        contenders += self._merged(contenders)
        contenders += self._last_resorts(contenders)
        judged = self._eager_judged()
        return self._first_that_fits(contenders, judged)

    # --- Timing ------------------------------------------------------------------------------------

    def _built(self) -> list[Contender]:
        """Build and time the table of candidates; the eager model is the first."""
        self.tell("timing eager torch")
        self.eager = self.lab.contender(EAGER, self.left)
        self.lab.seconds(self.eager, 1, None)
        self.batch = batch_for(self.lab.seconds(self.eager, 1, None, calls=3))
        found = []
        for candidate, why_not in candidates(self.lab.processor):
            if why_not:
                self.rows[candidate.name] = Row(candidate, "left out", why_not)
            elif (made := self._contender(candidate)) is not None:
                found.append(made)
        self._time(found)
        return found

    def _contender(self, candidate: Candidate) -> Contender | None:
        """Build and open one; None if that fails, which is written down."""
        self.tell(f"building {candidate.name}")
        try:
            seconds = min(_A_CANDIDATES_SHARE * 60 * self.minutes, self._free)
            made = self.lab.contender(candidate, seconds)
            for size in (1, self.batch):
                self.lab.seconds(made, size, min(seconds, self._free))
        except VitralError as error:
            self.rows[candidate.name] = Row(candidate, "left out", str(error))
            return None
        return made

    @property
    def _free(self) -> float:
        """Seconds that are not kept for judging the float32 forms."""
        return self.left - _KEPT_SHARE * 60 * self.minutes

    def _time(self, found: list[Contender]) -> None:
        """Time contenders beside the eager model; those that are far slower once, and no more."""
        self.tell("timing all forms in turns")
        hopeful = []
        size = 1 if self.lab.goal == "latency" else self.batch
        eager = min(self.lab.seconds(self.eager, size, None) for _ in range(2))
        for contender in found:
            seconds = min(self.lab.seconds(contender, size, None) for _ in range(2))
            if seconds > _HOPELESS * eager:
                self._time_once(contender)
                contender.rest()
            else:
                hopeful.append(contender)
        share = _ROUNDS_SHARE * 60 * self.minutes
        self.lab.time([self.eager, *hopeful], self.batch, min(share, max(self._free, 0)))
        for contender in found:
            if not self._faster(contender):
                contender.rest()

    def _time_once(self, contender: Contender) -> None:
        own, eager = (
            {size: [self.lab.seconds(one, size, None)] for size in (1, self.batch)}
            for one in (contender, self.eager)
        )
        contender.speed = speed(own, eager, self.batch, self.lab.goal)

    def _merged(self, contenders: list[Contender]) -> list[Contender]:
        """Of the fastest file, the same with merged tokens."""
        counts = merged_counts(self.subject.patches, self.subject.layers)
        files = [contender for contender in contenders if contender.candidate.kind]
        if not counts or not files:
            return []
        fastest = max(files, key=_gain)
        made = [self._contender(replace(fastest.candidate, merge=count)) for count in counts]
        found = [contender for contender in made if contender is not None]
        if found:
            self._time(found)
        return found

    def _last_resorts(self, contenders: list[Contender]) -> list[Contender]:
        if not self.judge_all and (quicker := next(filter(self._faster, contenders), None)):
            reason = f"tried only where no file is faster than eager torch, and {quicker.name} is"
            self.rows |= {one.name: Row(one, "left out", reason) for one in LAST_RESORTS}
            return []
        found = [made for one in LAST_RESORTS if (made := self._contender(one)) is not None]
        if found:
            self._time(found)
        return found

    def _faster(self, contender: Contender) -> bool:
        return _gain(contender) >= LEAST_GAIN

    # --- Judging -----------------------------------------------------------------------------------

    def _eager_judged(self) -> Judgement:
        self.tell("judging eager torch")
        subject = self.subject
        assert self.eager.speed is not None
        speed = self.eager.speed.images_per_s.median
        affordable = int(_JUDGING_SHARE * 60 * self.minutes * speed)
        least = min(_LEAST_JUDGED, int(_MOST_OF_THE_REST * self.left * speed))
        self.judging = self.judging.first(max(affordable, least, 1))
        self.eager_logits = self._answers(self.eager, self.judging)
        self.eager_trying = self.lab.logits(self.eager, subject.trying, self.batch)
        judged = self._compared(self.eager_logits, subject.temperature)
        self.eager.rest()
        self.rows = {EAGER.name: self._row(self.eager, "eager", judged), **self.rows}
        return judged

    def _first_that_fits(self, contenders: list[Contender], eager: Judgement) -> Contender | None:
        """Judge by falling speed, until one fits."""
        waiting, taken = list(contenders), None
        while waiting:
            contender = max(waiting, key=_gain)
            waiting.remove(contender)
            is_faster = self._faster(contender)
            decided = taken is not None or not is_faster
            if self._out_of_time(contender) or (decided and not self.judge_all):
                self._write_down_unjudged(contender, taken, is_faster=is_faster)
                continue
            refused = self._judge(contender, eager, waiting)
            if refused is None and taken is None and is_faster:
                taken = contender
        if taken is not None and taken.candidate.kind:
            self._write_down(taken, "chosen")
            return taken
        return None

    def _out_of_time(self, contender: Contender) -> bool:
        return (self.left if contender.candidate.exact else self._free) <= 0

    def _write_down_unjudged(self, contender: Contender, taken: Contender | None, *, is_faster: bool) -> None:
        if not is_faster:
            times = _gain(contender)
            self._write_down(contender, "slower", f"{times:.2f} times as fast as eager torch")
        elif taken is not None:
            self._write_down(contender, "not judged", f"{taken.name} is faster and fits")
        else:
            self._write_down(contender, "not judged", "the time was over; give it more --minutes")

    def _judge(self, contender: Contender, eager: Judgement, waiting: list[Contender]) -> str | None:
        """Judge a contender, and write it down; gives why it is refused."""
        try:
            if contender.candidate.draft:
                self._finish_draft(contender)
                if not self.judge_all and not self._faster(contender):
                    self._write_down_unjudged(contender, None, is_faster=False)
                    return "slower"
            self.tell(f"judging {contender.name}")
            self.lab.open(contender, max(self.left, 1))
            judged = self._judgement(contender)
        except VitralError as error:
            self.rows[contender.name] = Row(contender.candidate, "left out", str(error))
            return str(error)
        refused = judged.too_lossy(self.subject.max_drop, eager)
        no_file = "" if contender.candidate.kind else "it is no file; docs/optimize.md says how to have it"
        verdict: Verdict = "fits" if self._faster(contender) else "slower"
        self._write_down(contender, "too lossy" if refused else verdict, refused or no_file, judged)
        if refused and contender.candidate.precision == "int8":
            self._leave_more_in_float(contender, waiting)
        contender.rest()
        return refused

    def _judgement(self, contender: Contender) -> Judgement:
        subject = self.subject
        temperature = subject.temperature
        if not contender.candidate.exact:
            logits_BL = self.lab.logits(contender, subject.fitting, self.batch)
            temperature = refitted(subject.task, logits_BL, subject.fitting.labels, temperature)

        def goes_on(done: int, logits_BL: np.ndarray) -> bool:
            if self.left <= 0 or self.judge_all or done < 500:
                return self.left > 0
            # A loss beyond doubt needs no further images; that a form fits is never said early.
            return self._compared(logits_BL, temperature).loss_low <= subject.max_drop

        return self._compared(self._answers(contender, self.judging, goes_on), temperature)

    def _compared(self, logits_BL: np.ndarray, temperature: float) -> Judgement:
        subject, count = self.subject, len(logits_BL)
        eager_BL, labels = self.eager_logits[:count], self.judging.labels[:count]
        return judge(
            subject.task, subject.classes, labels, eager_BL, logits_BL, temperature, subject.temperature
        )

    def _answers(
        self,
        contender: Contender,
        pixels: Pixels,
        goes_on: Callable[[int, np.ndarray], bool] = lambda *_: True,
    ) -> np.ndarray:
        def told(done: int, logits_BL: np.ndarray) -> bool:
            self.on_images(done, len(pixels))
            return goes_on(done, logits_BL)

        return self.lab.logits(contender, pixels, self.batch, told)

    # --- int8 --------------------------------------------------------------------------------------

    def _finish_draft(self, contender: Contender) -> None:
        """Build an int8 form on all calibration images, by the strength whose logits are the nearest."""
        best, tried = None, {}
        strengths = STRENGTHS if contender.candidate.strength is not None else (None,)
        for strength in strengths:
            if best is not None and self._free <= 0:
                break
            candidate = final(contender.candidate, strength=strength)
            self.tell(f"building {candidate.name}" + (f", strength {strength}" if strength else ""))
            try:
                made = self.lab.contender(candidate, max(self._free, 1))
                error = self._error(made)
            except VitralError:
                if best is None:
                    raise
                break  # the time is over, and a strength was found
            tried[str(strength)] = error
            made.rest()
            if best is None or error < best[0]:
                best = error, made
        assert best is not None
        contender.rest()
        found = best[1]
        contender.candidate, contender.folder, contender.files = found.candidate, found.folder, found.files
        self.tried[contender.name] = tried
        self._time_again(contender)

    def _error(self, contender: Contender) -> float:
        """How far a form's logits are off on training images, relative to the eager model's."""
        logits_BL = self.lab.logits(contender, self.subject.trying, self.batch)
        centred_BL = self.eager_trying - self.eager_trying.mean(1, keepdims=True)
        off_BL = logits_BL - self.eager_trying
        return float(np.sqrt(np.square(off_BL).sum() / np.square(centred_BL).sum()))

    def _time_again(self, contender: Contender) -> None:
        self.lab.open(contender, max(self.left, 1))
        self.lab.open(self.eager, max(self.left, 1))
        self.lab.time([self.eager, contender], self.batch, 0.1 * 60 * self.minutes)

    def _leave_more_in_float(self, contender: Contender, waiting: list[Contender]) -> None:
        """Put a form into the queue that leaves more of the hardest layers in float32, if one is left."""
        candidate = contender.candidate
        if candidate.library != "openvino" or self._free <= 0:
            return
        count = next((count for count in LEFT_IN_FLOAT if count > len(candidate.in_float)), None)
        if count is None:
            return
        try:
            ranked = self.lab.build("hardest", max(self._free, 1), candidate=asdict(candidate))
            names = tuple(name for name, _ in ranked[:count])
            made = self.lab.contender(final(candidate, in_float=names), max(self._free, 1))
            self._time_again(made)
        except VitralError as error:
            changed = replace(candidate, in_float=("",) * count)
            self.rows[changed.name] = Row(changed, "left out", str(error))
            return
        made.rest()
        waiting.append(made)

    # --- Writing down ------------------------------------------------------------------------------

    def _write_down(
        self, contender: Contender, verdict: Verdict, reason: str = "", judged: Judgement | None = None
    ) -> None:
        known = self.rows.get(contender.name)
        if judged is None and known is not None:
            judged = known.judgement
        self.rows[contender.name] = self._row(contender, verdict, judged, reason)

    def _row(self, contender: Contender, verdict: Verdict, judged: Judgement | None, reason: str = "") -> Row:
        return Row(
            contender.candidate,
            verdict,
            reason,
            contender.engine,
            contender.speed,
            judged,
            contender.load_s,
            contender.memory_mb,
            contender.disk_mb,
            self.tried.get(contender.name, {}),
        )


def _gain(contender: Contender) -> float:
    """How many times as fast as the eager model, the median of the rounds."""
    return contender.speed.times_eager.median if contender.speed else 0.0
