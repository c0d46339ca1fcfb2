"""What wrong settings cost a classifier, measured on labelled images, and which setting looks wrong.

Each setting is changed alone, on the same images, and judged by paired tests: McNemar's on the images that
turn from wrong to right or back, Student's on the losses where the first is silent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from vitral.checkpoints.layouts.preprocessing import CLIP, IMAGENET
from vitral.data.batches import Batch, DamageCount
from vitral.data.loader import Loader
from vitral.data.subsets import sample
from vitral.data.workers import Loading, worker_count
from vitral.evaluation.evaluate import choose_split
from vitral.evaluation.task import SINGLE_LABEL, task_of
from vitral.images.preprocess import ImageSource, Interpolation, Preprocess, Resize
from vitral.inference.classifier import Classifier
from vitral.model.config import patch_grid
from vitral.model.encoder import ACTIVATIONS, FeedForward, Gated
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.resize import RESIZE
from vitral.model.positions.tables import LearnedPositions
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.limits import IMAGES, SEED
from vitral.runtime.ranges import refuse_beyond

Verdict = Literal["better", "worse", "unclear", "no effect"]

SIGNIFICANCE = 0.05  # of all changes together: each p-value is multiplied by their number (Bonferroni)
# Nats. A loss can be lower without fail by next to nothing; this much raises the true class's probability
# by a hundredth of itself.
LEAST_LOSS_CHANGE = 0.01
# Losses are compared at the temperature that suits each way of running the model best, too: else a model
# that is too sure of itself would seem to gain from whatever blurs its images.
_TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-12, 17))
_AS_IT_IS = _TEMPERATURES.index(1.0)

_NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "of ImageNet": IMAGENET,
    "of CLIP": CLIP,
    "0.5 and 0.5": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "0 and 1 (0..1)": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "0 and 1/255 (0..255)": {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)},
}
_CROP_FRACTIONS = (0.875, 0.9, 0.95, 1.0)
_ACTIVATION_NAMES = ("gelu", "gelu_tanh", "quick_gelu", "silu")
_EPSILONS = (1e-5, 1e-6, 1e-12)
_BATCH_SIZE = 32  # images at a time, each held as bytes in about ten fittings


# --- What came out -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One setting at another value, on the same images; changes are against the settings as they are."""

    setting: str
    now: str
    value: str  # what was tried
    top1: float  # 0..1
    loss: float  # mean cross-entropy, nats
    top1_change: float
    loss_change: float
    loss_error: float  # standard error of `loss_change`
    gained: int  # images that were wrong and are right
    lost: int  # images that were right and are wrong
    p_top1: float  # of McNemar's exact test on those, times `Diagnosis.tried`
    p_loss: float  # of Student's paired test on the losses at their best temperatures, times that too
    verdict: Verdict  # "unclear" where these images prove no difference
    reason: str

    @property
    def name(self) -> str:
        return f"{self.setting} {self.value}"


@dataclass(frozen=True)
class Diagnosis:
    """How a classifier does with its settings as they are, and a finding for each change of one."""

    split: str  # the part of the data that the images are from
    n: int  # images behind every number
    damaged: int  # images that could not be read
    top1: float
    ci95: tuple[float, float]  # of `top1`, Wilson's score interval
    loss: float  # mean cross-entropy, nats
    tried: int  # changes that changed any answer
    findings: tuple[Finding, ...]
    likely: Finding | None  # the mismatch: the best of the changes that are surely better
    rivals: tuple[Finding, ...]  # surely better too, and by top-1 not to be told from the likely one

    @property
    def costliest(self) -> tuple[Finding, ...]:
        """The worst value of each setting that surely costs something, the costliest setting first."""
        worst: dict[str, Finding] = {}
        for finding in sorted(self.findings, key=lambda finding: (finding.top1, -finding.loss)):
            if finding.verdict == "worse":
                worst.setdefault(finding.setting, finding)
        return tuple(worst.values())

    @property
    def least_rise(self) -> float:
        """The smallest rise of top-1 that McNemar's test can prove here, if no image is lost for it."""
        gained = 1
        while self.tried * mcnemar(gained, 0) > SIGNIFICANCE:
            gained += 1
        return min(gained / self.n, 1.0)

    def to_dict(self) -> dict[str, Any]:
        costliest = [asdict(finding) for finding in self.costliest]
        return {**asdict(self), "costliest": costliest, "conclusion": self.conclusion()}

    def rows(self) -> list[tuple[str, ...]]:
        """Setting, now, tried, top-1, its change in points, loss, its change, verdict: a row a finding."""
        return [
            (
                finding.setting,
                finding.now,
                finding.value,
                f"{finding.top1:.1%}",
                f"{100 * finding.top1_change:+.1f}",
                f"{finding.loss:.3f}",
                f"{finding.loss_change:+.3f}",
                ": ".join(filter(None, (finding.verdict, finding.reason))),
            )
            for finding in self.findings
        ]

    def conclusion(self) -> str:
        """The likely mismatch and its evidence; or that there is none, and what would cost most."""
        if self.likely:
            return self._mismatch(self.likely)
        text = (
            f"the settings look right: none of {self.tried} changes is surely better on {self.n:,} images, "
            f"which cannot prove a rise of top-1 by less than {100 * self.least_rise:.1f} points"
        )
        if not self.costliest:
            return f"{text}; none is surely worse either"
        costs = "; ".join(
            f"{finding.name} ({100 * finding.top1_change:+.1f} points, loss {finding.loss_change:+.2f})"
            for finding in self.costliest[:3]
        )
        return f"{text}; what would cost most: {costs}"

    def _mismatch(self, likely: Finding) -> str:
        before, after = f"{self.top1:.1%}", f"{likely.top1:.1%}"
        if likely.p_top1 <= SIGNIFICANCE:
            gain = f"top-1 rises from {before} to {after} (McNemar p = {likely.p_top1:.1g})"
        else:
            gain = (
                f"the loss falls from {self.loss:.3f} to {likely.loss:.3f} (paired p = {likely.p_loss:.1g}; "
                f"top-1 {after}, now {before})"
            )
        rivals = ", ".join(finding.name for finding in self.rivals)
        as_good = f"; these do about as well: {rivals}" if rivals else ""
        return (
            f"likely mismatch: {likely.setting}; with {likely.name} {gain}{as_good}. "
            "Changes were made one at a time: set this one, and ask again"
        )


# --- The examination -----------------------------------------------------------------------------------


def diagnose(
    classifier: Classifier,
    source: str,
    *,
    split: str | None = None,
    limit: int = 400,
    seed: int = 0,
    workers: int | None = None,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
) -> Diagnosis:
    """Measures a classifier as it is, and with each of its settings changed; leaves it as it was.

    Each image is decoded once and goes through the model once for each change, about 20 times.

    Args:
        classifier: a model with labels.
        source: the command line's DATA.
        split: as `evaluate_classifier` takes it.
        limit: images at most, as many of each class as of any other while they last.
        seed: of the choice of images.
        workers: processes that load images; None: as many as the machine suits.
        warn: told of each damaged image, which is left out, and of doubts about the split.
        on_images: told how many images are done, of how many.

    Raises:
        VitralError: if the model has no labels or is multi-label, the data cannot be used or has classes
            that the model lacks, or no image can be read.
    """
    if not classifier.labels:
        raise VitralError(
            "doctor needs a classifier, and this model has no labels; train a head on a few labelled images "
            "first: vitral train DATA --out RUN model=MODEL"
        )
    if task_of(classifier) is not SINGLE_LABEL:
        raise VitralError("doctor examines models of one class an image, and this one is multi-label")
    refuse_beyond("limit", limit, IMAGES)
    refuse_beyond("seed", seed, SEED)
    name, images = choose_split(classifier, source, split, warn)
    images = sample(images, limit, seed)
    damage = DamageCount(len(images), 1.0, warn)
    done = 0

    def on_batch(batch: Batch) -> None:
        nonlocal done
        damage.add(batch)
        done += batch.asked
        on_images(done, len(images))

    changes = _changes(classifier)
    views = _Views(tuple(dict.fromkeys(change.view for change in changes)))
    loading = Loading(worker_count(workers), warn)
    batches = Loader(images, views, loading).evaluation_batches(_BATCH_SIZE)
    answers = _answers(classifier, changes, views, batches, on_batch)
    return _conclude(name, len(damage.reasons), changes, answers)


# --- What can be changed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """One setting at another value: of the preprocessing, the order of channels, or modules' attributes."""

    setting: str
    now: str
    value: str
    preprocess: Preprocess
    bgr: bool = False
    edits: tuple[tuple[Any, str, Any], ...] = ()  # (object, attribute, value) while the model runs
    why_idle: str = "the answers are the same"  # said where it has no effect

    @property
    def view(self) -> Preprocess:
        """What decides the pixels before they are normalized; equal for changes that share them."""
        channels = self.preprocess.channels
        mean = self.preprocess.mean if self.preprocess.resize == "longest" else (0.0,) * channels
        return replace(self.preprocess, mean=mean, std=(1.0,) * channels)

    @contextmanager
    def applied(self) -> Iterator[None]:
        old = [(target, name, getattr(target, name)) for target, name, _ in self.edits]
        try:
            for target, name, value in self.edits:
                setattr(target, name, value)
            yield
        finally:
            for target, name, value in old:
                setattr(target, name, value)


def _changes(classifier: Classifier) -> list[_Change]:
    """No change first, then one at a time."""
    now, model = classifier.preprocess, classifier.model
    bgr = _Change("channel order", "RGB", "BGR", now, bgr=True, why_idle="the images are grey")
    return [
        _Change("", "", "", now),
        *_preprocess_changes(now),
        *([bgr] if now.channels == 3 else []),
        *_activation_changes(model, now),
        *_epsilon_changes(model, now),
        *_position_changes(model, now),
    ]


def _preprocess_changes(now: Preprocess) -> list[_Change]:
    usual: dict[str, dict[str, Any]] = {
        name: {part: (sum(values) / 3,) if now.channels == 1 else values for part, values in fields.items()}
        for name, fields in _NORMALIZATIONS.items()
    }
    known = [name for name, fields in usual.items() if replace(now, **fields) == now]
    normalization = known[0] if known else f"{now.mean} and {now.std}"
    tried: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
        "mean/std": (normalization, usual),
        "crop fraction": (
            f"{now.crop_fraction:g}",
            {f"{f:g}": {"crop_fraction": f} for f in _CROP_FRACTIONS},
        ),
        "interpolation": (
            now.interpolation,
            {name: {"interpolation": name} for name in get_args(Interpolation)},
        ),
        "resize": (now.resize, {name: {"resize": name} for name in get_args(Resize)}),
    }
    return [
        _Change(setting, current, value, changed, why_idle="the images come out the same")
        for setting, (current, values) in tried.items()
        for value, fields in values.items()
        if (changed := replace(now, **fields)) != now
    ]


def _activation_changes(model: VisionTransformer, now: Preprocess) -> list[_Change]:
    places = [
        part
        for part in model.modules()
        if isinstance(part, FeedForward | Gated) and not isinstance(part.activation, Gated)
    ]
    current = model.config.layer.feed_forward.activation
    return [
        _Change("activation", current, name, now, edits=_edits(places, "activation", ACTIVATIONS[name]()))
        for name in _ACTIVATION_NAMES
        if name != current
    ]


def _epsilon_changes(model: VisionTransformer, now: Preprocess) -> list[_Change]:
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm | nn.RMSNorm)]
    current = model.config.norm.eps
    return [
        _Change("norm eps", f"{current:g}", f"{eps:g}", now, edits=_edits(norms, "eps", eps))
        for eps in _EPSILONS
        if eps != current
    ]


def _position_changes(model: VisionTransformer, now: Preprocess) -> list[_Change]:
    """The other rules for tables of positions, or one change without effect that says why there are none."""
    tables = [part for part in model.modules() if isinstance(part, LearnedPositions | RelativeBias)]
    if not tables:
        return [_Change("position resize", "-", "-", now, why_idle="the model has no table of positions")]
    current, grid = tables[0].resize, model.config.grid_size
    if patch_grid(now.img_size, model.config.patch_size) == grid:
        why = f"the model runs at the {grid[0]}x{grid[1]} patches of its table as it was loaded"
        return [_Change("position resize", current, "-", now, why_idle=why)]
    return [
        _Change("position resize", current, rule, now, edits=_edits(tables, "resize", rule))
        for rule in RESIZE
        # The rule for distances, dense around their middle, fits no table of places.
        if rule != current and (rule != "geometric" or isinstance(tables[0], RelativeBias))
    ]


def _edits(parts: Sequence[nn.Module], name: str, value: Any) -> tuple[tuple[nn.Module, str, Any], ...]:
    return tuple((part, name, value) for part in parts)


# --- Running -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Views:
    """An image of any kind -> its pixels as each of V ways of fitting gives them, bytes (V, C, H, W)."""

    fits: tuple[Preprocess, ...]

    def __call__(self, source: ImageSource) -> Tensor:
        image = self.fits[0].open(source)
        return torch.stack([pil_to_tensor(fit.fit(image))[: fit.channels] for fit in self.fits])


@dataclass(frozen=True)
class _Answers:
    """What became of each image under one change; T counts temperatures, N images."""

    right_N: np.ndarray
    losses_TN: np.ndarray  # nats

    @classmethod
    def of(cls, logits_BL: Tensor, labels_B: Tensor) -> "_Answers":
        logits_BL = logits_BL.float()
        logits_TBL = torch.stack([logits_BL / temperature for temperature in _TEMPERATURES])
        labels_TB = labels_B.expand(len(_TEMPERATURES), -1)
        losses_TB = F.cross_entropy(logits_TBL.movedim(2, 1), labels_TB, reduction="none")
        right_B = logits_BL.argmax(1) == labels_B
        return cls(right_B.cpu().numpy(), losses_TB.double().cpu().numpy())

    @classmethod
    def merge(cls, parts: Sequence["_Answers"]) -> "_Answers":
        right_N = np.concatenate([part.right_N for part in parts])
        return cls(right_N, np.concatenate([part.losses_TN for part in parts], axis=1))

    @property
    def top1(self) -> float:
        return float(self.right_N.mean())

    @property
    def losses_N(self) -> np.ndarray:
        return self.losses_TN[_AS_IT_IS]

    @property
    def tempered_N(self) -> np.ndarray:
        """Losses at the temperature whose mean loss is least."""
        return self.losses_TN[self.losses_TN.mean(axis=1).argmin()]

    def turned(self, other: "_Answers") -> tuple[int, int]:
        """How many images are right here and wrong there, and the reverse."""
        return int((self.right_N & ~other.right_N).sum()), int((other.right_N & ~self.right_N).sum())


@torch.inference_mode()
def _answers(
    classifier: Classifier,
    changes: Sequence[_Change],
    views: _Views,
    batches: Iterable[Batch],
    on_batch: Callable[[Batch], None],
) -> list[_Answers]:
    """One for each change, the first for none, of the same images."""
    model, was_training = classifier.model, classifier.model.training
    parts: list[list[_Answers]] = []
    model.eval()
    try:
        for batch in batches:
            if len(batch.labels):
                parts.append(_batch_answers(classifier, changes, views, batch))
            on_batch(batch)
    finally:
        model.train(was_training)
    if not parts:
        raise VitralError("not one of the images could be read, so there is nothing to diagnose")
    return [_Answers.merge(of_change) for of_change in zip(*parts, strict=True)]


def _batch_answers(
    classifier: Classifier, changes: Sequence[_Change], views: _Views, batch: Batch
) -> list[_Answers]:
    placement = classifier.placement
    pixels_BVCHW, labels_B = placement.put(batch.images), placement.put(batch.labels)
    as_it_is_BCHW = None
    found: list[_Answers] = []
    for change in changes:
        pixels_BCHW = pixels_BVCHW[:, views.fits.index(change.view)]
        images_BCHW = _normalized(pixels_BCHW.flip(1) if change.bgr else pixels_BCHW, change.preprocess)
        if as_it_is_BCHW is None:
            as_it_is_BCHW = images_BCHW
        elif not change.edits and torch.equal(images_BCHW, as_it_is_BCHW):
            found.append(found[0])
            continue
        with change.applied(), placement.autocast():
            logits_BL = classifier.model(images_BCHW)
        found.append(_Answers.of(logits_BL.float() / classifier.temperature, labels_B))
    return found


def _normalized(pixels_BCHW: Tensor, preprocess: Preprocess) -> Tensor:
    """As `Preprocess.normalize` does with one image, bit for bit."""
    return normalize(pixels_BCHW.to(torch.float32) / 255, list(preprocess.mean), list(preprocess.std))


# --- Judging -------------------------------------------------------------------------------------------


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: the chance that fair coins divide so many images as unevenly."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired(differences_N: np.ndarray) -> tuple[float, float, float]:
    """Their mean, its standard error, and Student's two-sided p-value of the mean being 0."""
    from scipy.stats import t

    n, mean = len(differences_N), float(differences_N.mean())
    if n < 2:
        return mean, float("inf"), 1.0
    error = float(differences_N.std(ddof=1)) / n**0.5
    if error == 0:
        return mean, error, float(mean == 0)
    return mean, error, float(2 * t.sf(abs(mean) / error, n - 1))


def _conclude(split: str, damaged: int, changes: Sequence[_Change], answers: Sequence[_Answers]) -> Diagnosis:
    from scipy.stats import binomtest

    base = answers[0]
    tried = sum(not np.array_equal(answer.losses_N, base.losses_N) for answer in answers)
    found = [
        (_finding(change, base, answer, tried), answer)
        for change, answer in zip(changes[1:], answers[1:], strict=True)
    ]
    likely, rivals = _choose([pair for pair in found if pair[0].verdict == "better"])
    n = len(base.right_N)
    interval = binomtest(int(base.right_N.sum()), n).proportion_ci(method="wilson")
    return Diagnosis(
        split=split,
        n=n,
        damaged=damaged,
        top1=base.top1,
        ci95=(float(interval.low), float(interval.high)),
        loss=float(base.losses_N.mean()),
        tried=tried,
        findings=tuple(finding for finding, _ in found),
        likely=likely,
        rivals=rivals,
    )


def _finding(change: _Change, base: _Answers, new: _Answers, tried: int) -> Finding:
    gained, lost = new.turned(base)
    p_top1 = min(tried * mcnemar(gained, lost), 1.0)
    loss_change, loss_error, _ = paired(new.losses_N - base.losses_N)
    tempered_change, _, p_loss = paired(new.tempered_N - base.tempered_N)
    p_loss = min(tried * p_loss, 1.0)
    if np.array_equal(new.losses_N, base.losses_N):
        verdict, reason = "no effect", change.why_idle
    elif p_top1 <= SIGNIFICANCE:
        verdict, reason = "better" if gained > lost else "worse", f"top-1, p = {p_top1:.1g}"
    else:
        verdict = _verdict_of_losses(p_loss, loss_change, tempered_change)
        reason = "" if verdict == "unclear" else f"loss, p = {p_loss:.1g}"
    return Finding(
        setting=change.setting,
        now=change.now,
        value=change.value,
        top1=new.top1,
        loss=float(new.losses_N.mean()),
        top1_change=new.top1 - base.top1,
        loss_change=loss_change,
        loss_error=loss_error,
        gained=gained,
        lost=lost,
        p_top1=p_top1,
        p_loss=p_loss,
        verdict=verdict,
        reason=reason,
    )


def _verdict_of_losses(p: float, *changes: float) -> Verdict:
    """All changes must agree, and be large enough to matter."""
    if p <= SIGNIFICANCE and max(changes) <= -LEAST_LOSS_CHANGE:
        return "better"
    return "worse" if p <= SIGNIFICANCE and min(changes) >= LEAST_LOSS_CHANGE else "unclear"


def _choose(better: Sequence[tuple[Finding, _Answers]]) -> tuple[Finding | None, tuple[Finding, ...]]:
    """The best and its rivals: the highest top-1, or less loss where top-1 cannot tell and the loss can."""
    if not better:
        return None, ()
    # Of equals the first, which is the commonest.
    best, highest = max(better, key=lambda pair: pair[1].top1)
    close = [pair for pair in better if mcnemar(*highest.turned(pair[1])) > SIGNIFICANCE]
    of_least_loss, lowest = min(close, key=lambda pair: pair[1].tempered_N.mean())
    _, _, p = paired(lowest.tempered_N - highest.tempered_N)
    if p <= SIGNIFICANCE:
        best = of_least_loss
    return best, tuple(finding for finding, _ in close if finding is not best)
