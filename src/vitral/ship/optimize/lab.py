"""`Lab`: builds candidates, opens each in a process of its own, times them in turns and has them answer."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitral.bench.rounds import Elsewhere, interleaved
from vitral.runtime.errors import VitralError
from vitral.ship.optimize.candidates import Candidate
from vitral.ship.optimize.images import Pixels
from vitral.ship.optimize.ledger import Goal, Speed, Spread
from vitral.ship.optimize.process import Process
from vitral.ship.optimize.processor import Processor

ROUNDS, LEAST_ROUNDS = 7, 3
# A reading of several images takes about so long, of at most so many.
_SECONDS_A_BATCH, _LARGEST_BATCH, _LEAST_BATCH = 1.0, 32, 4
_ASKED_AT_ONCE = 256  # images, between two looks at the time
# Sizes of batches that OpenVINO compiles: with several at once, the larger ones pay.
_SIZES: dict[Goal, tuple[int, ...]] = {"latency": (1, 2, 4, 8), "throughput": (1, 2, 4, 8, 16)}


@dataclass
class Contender:
    """A candidate that was built, and its process while it has one."""

    candidate: Candidate
    folder: Path
    files: tuple[str, ...] = ()
    engine: str = ""
    load_s: float = 0.0
    memory_mb: float = 0.0
    speed: Speed | None = None
    process: Process | None = None

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def disk_mb(self) -> float:
        names = self.files or ("model.safetensors",)
        return sum((self.folder / name).stat().st_size for name in names) / 2**20

    def rest(self) -> None:
        """Give its memory back."""
        if self.process is not None:
            self.process.end()
        self.process = None


class Lab:
    """Where candidates are made and measured; leaving its context ends all processes.

    Args:
        folder: for all that is written, which the caller removes.
        checkpoint: the model, as `save_checkpoint` writes it.
        calibration: pixels of training images.
        calibrating: of them, how many ranges are measured on.
        goal: how engines are set.
        processor: of this machine.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Path,
        calibration: Pixels,
        calibrating: int,
        goal: Goal,
        processor: Processor,
    ) -> None:
        self.folder, self.checkpoint, self.goal, self.processor = folder, checkpoint, goal, processor
        self.calibration, self.calibrating = calibration, calibrating
        self._contenders: list[Contender] = []
        self._builder: Process | None = None
        self._made = 0

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        held = [contender.process for contender in self._contenders]
        processes = [process for process in (*held, self._builder) if process is not None]
        for process in processes:  # all at once: each takes a while to give its memory back
            process.kill()
        with ExitStack() as ending:
            for process in processes:
                ending.callback(process.end)

    # --- Making ------------------------------------------------------------------------------------

    def contender(self, candidate: Candidate, seconds: float) -> Contender:
        """Build a candidate and open it.

        Raises:
            VitralError: if either fails, or both take longer than `seconds`.
        """
        ends = time.monotonic() + seconds
        if candidate.kind is None:
            made = Contender(candidate, self.checkpoint)
        else:
            folder = self._new("form")
            values = {"candidate": asdict(candidate), "folder": str(folder)}
            files = self.build("build", seconds, **values, int8=self.processor.int8 is not None)
            made = Contender(candidate, folder, tuple(files))
        self._contenders.append(made)
        self.open(made, ends - time.monotonic())
        return made

    def build(self, name: str, seconds: float | None, **values: Any) -> Any:
        """Ask the builder, a process that is begun when it is first needed, and anew after it failed."""
        is_new = self._builder is None
        builder = self._builder = self._builder or Process(self._new("log"), self.processor.threads)
        try:
            if is_new:
                begin = {"checkpoint": str(self.checkpoint), "calibration": str(self.calibration.file)}
                builder.ask("begin", seconds, **begin, calibrating=self.calibrating)
            return builder.ask(name, seconds, **values)
        except VitralError:
            builder.end()
            self._builder = None
            raise

    def open(self, contender: Contender, seconds: float | None = None) -> None:
        """Give a contender its process, unless it has one."""
        if contender.process is not None:
            return
        contender.process = Process(self._new("log"), self.processor.threads)
        facts = contender.process.ask(
            "open",
            seconds,
            folder=str(contender.folder),
            candidate=asdict(contender.candidate),
            options=self.options(contender.candidate),
        )
        contender.engine, contender.load_s = facts["engine"], facts["load_s"]
        contender.memory_mb = facts["memory_mb"]

    def options(self, candidate: Candidate) -> dict[str, Any]:
        """How the engine of a candidate is set; the number of threads is left to each machine."""
        merging = {"merge": candidate.merge} if candidate.merge else {}
        if candidate.library != "openvino":
            return merging
        return {**merging, "hint": self.goal.upper(), "batch_sizes": list(_SIZES[self.goal])}

    def _new(self, name: str) -> Path:
        self._made += 1
        return self.folder / f"{name}-{self._made}"

    # --- Measuring ---------------------------------------------------------------------------------

    def seconds(self, contender: Contender, batch: int, seconds: float | None, calls: int = 1) -> float:
        """Give the seconds of one of so many calls."""
        assert contender.process is not None
        pixels = str(self.calibration.file)
        return contender.process.ask("seconds", seconds, pixels=pixels, batch=batch, calls=calls)

    def time(self, contenders: Sequence[Contender], batch: int, seconds: float) -> None:
        """Set the speed of each contender, the eager one first, by rounds in which each is timed in turn.

        Args:
            contenders: with processes.
            batch: images at a time, of throughput.
            seconds: that this may take; seven rounds at most, three at least.
        """
        calls: dict[tuple[int, int], Elsewhere] = {
            (place, size): _Reading(self, contender, size)
            for place, contender in enumerate(contenders)
            for size in (1, batch)
        }
        begun = time.monotonic()
        for call in calls.values():
            call.read(1)
        taken = max(time.monotonic() - begun, 0.2 * len(calls))
        rounds = min(max(int(seconds / taken), LEAST_ROUNDS), ROUNDS)
        named = {f"{place} {size}": call for (place, size), call in calls.items()}
        readings = interleaved(named, rounds)
        for place, contender in enumerate(contenders):
            own, eager = ({size: readings[f"{p} {size}"] for size in (1, batch)} for p in (place, 0))
            contender.speed = speed(own, eager, batch, self.goal)

    def logits(
        self,
        contender: Contender,
        pixels: Pixels,
        batch: int,
        on_images: Callable[[int, np.ndarray], bool] = lambda *_: True,
    ) -> np.ndarray:
        """Give the logits (n, L) of images.

        Args:
            contender: with a process.
            pixels: of the images.
            batch: images at a time.
            on_images: told how many are done, and their logits; no more are asked for if it gives False.
        """
        assert contender.process is not None
        done, found_BL, out = 0, np.empty((0, 0), np.float32), self._new("logits").with_suffix(".npy")
        for first in range(0, len(pixels), _ASKED_AT_ONCE):
            last = min(first + _ASKED_AT_ONCE, len(pixels))
            place = {"pixels": str(pixels.file), "first": first, "last": last}
            contender.process.ask("logits", **place, batch=batch, out=str(out))
            part_BL = np.load(out)
            if not done:
                found_BL = np.empty((len(pixels), part_BL.shape[1]), part_BL.dtype)
            found_BL[first:last], done = part_BL, last
            if not on_images(done, found_BL[:done]):
                break
        out.unlink(missing_ok=True)
        return found_BL[:done]


@dataclass(frozen=True)
class _Reading(Elsewhere):
    lab: Lab
    contender: Contender
    size: int

    def read(self, calls: int) -> float:
        return self.lab.seconds(self.contender, self.size, None, calls)


def speed(
    own: Mapping[int, Sequence[float]], eager: Mapping[int, Sequence[float]], batch: int, goal: Goal
) -> Speed:
    """Make a `Speed` of the seconds of each round, by the number of images."""
    size = 1 if goal == "latency" else batch
    return Speed(
        images_per_s=Spread.of([batch / seconds for seconds in own[batch]]),
        batch=batch,
        latency_ms=Spread.of([1000 * seconds for seconds in own[1]]),
        times_eager=Spread.of([theirs / ours for ours, theirs in zip(own[size], eager[size], strict=True)]),
    )


def batch_for(seconds_an_image: float) -> int:
    """How many images are timed at a time: a second's worth, from 4 to 32, a power of two."""
    size = _LARGEST_BATCH
    while size > _LEAST_BATCH and size * seconds_an_image > _SECONDS_A_BATCH:
        size //= 2
    return size


def final(candidate: Candidate, **changes: Any) -> Candidate:
    """The candidate as it may be saved, with other settings."""
    return replace(candidate, draft=False, **changes)
