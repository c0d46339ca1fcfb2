"""What a model's features are worth: a linear probe and weighted nearest neighbours, the model left as it is.

Every choice (the layer, the strength of the L2 penalty, the number of neighbours) is made on labelled
images that were held out from the fit; then the probe is fitted to all labelled images and judged, once,
on others.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.batches import DamageCount
from vitral.data.image_data import ImageData, open_data
from vitral.data.split import Split, fingerprint
from vitral.data.subsets import few_shot, in_turns, sample
from vitral.data.workers import Loading, worker_count
from vitral.evaluation.calibration import calibrate
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes
from vitral.evaluation.task import SINGLE_LABEL, task_of
from vitral.inference.classifier import Classifier
from vitral.inference.features import PooledFeatures, cache_folder, extract, poolings
from vitral.model.config import Pooling
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.ranges import Images, Layer, Seed, Whole, Workers
from vitral.runtime.settings import check

# Of half the squared weights of standardized features, beside the mean cross-entropy.
PENALTIES = tuple(10.0 ** (step / 2) for step in range(-8, 3))
NEIGHBOURS = (10, 20)
_VOTE_TEMPERATURE = 0.07  # DINO's (arXiv:2104.14294, appendix F.1; Wu et al., arXiv:1805.01978, §3.4)
_INSTEAD = "train a head on it instead: vitral train DATA --out RUN model=MODEL trained=head"
_FOLDS = 5
_ENOUGH_HELD_OUT = 500  # images; with as many in one fold, the other folds say nothing new
_FIT_STEPS = 1000
# Of the time for a head's start; the rest is for fitting.
_LOOKING_SHARE = 0.75
_CHUNK = 1024  # queries at a time, for their similarities to all labelled images


@dataclass(frozen=True)
class ProbeOptions:
    """What to probe, and on how much."""

    features: Pooling | None = None  # None: as the field does with such a model (`usual_features`)
    layers: tuple[Layer, ...] = (-1,)  # the better of these is taken
    per_class: Images | None = None  # labelled images of each class; None: all
    limit: Images | None = None  # of any split at most, even over classes; with per_class, of the judge
    seed: Seed = 0  # of what is held out and drawn
    max_damaged: Whole = 0.01  # share of unreadable images past which to give up
    workers: Workers | None = None  # processes that load images; None: as many as the machine suits

    def __post_init__(self) -> None:
        check(self)
        if not self.layers:
            raise VitralError("no layer is named; -1 is the last")


@dataclass(frozen=True)
class LinearResult:
    """Multinomial logistic regression on standardized features."""

    features: Pooling
    layer: int
    penalty: float  # one of PENALTIES
    held_out_top1: float | None  # of the held-out labelled images; None: there were none
    held_out_loss: float | None  # the least among what was tried
    temperature: float  # fitted on them; loss and calibration error are of the probabilities at it
    evaluation: SingleLabelEvaluation


@dataclass(frozen=True)
class NeighboursResult:
    """The vote of the k most similar labelled images (cosine), each weighing exp(similarity / 0.07)."""

    features: Pooling
    layer: int
    k: int
    held_out_top1: float | None
    n: int
    top1: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class ProbeResult:
    split: str  # the part of the data that the probe was judged on
    labelled: int  # images that were fitted to
    linear: LinearResult
    neighbours: NeighboursResult

    def to_dict(self) -> dict[str, Any]:
        linear = {**vars(self.linear), "evaluation": self.linear.evaluation.to_dict()}
        return {**vars(self), "linear": linear, "neighbours": vars(self.neighbours)}


def probe(
    classifier: Classifier,
    source: str,
    options: ProbeOptions = ProbeOptions(),
    *,
    cache: Path | None = None,
    out: Path | None = None,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
) -> ProbeResult:
    """Probes a model on labelled images.

    Args:
        classifier: any model; its head plays no part.
        source: the command line's DATA. Judged on the test images, else on a fifth held out.
        options: see `ProbeOptions`.
        cache: folder to keep features in (`features.cache_folder`).
        out: a new model folder to write, with the linear probe as its head.
        warn: told of damaged images, and of what came from the cache.
        on_images: told how many images of a split are done, of how many.

    Raises:
        VitralError: if the data or the features asked for cannot be had, or `out` cannot be written.
    """
    model = classifier.model
    kinds = usual_features(model, options.layers) if options.features is None else (options.features,) * 2
    for kind in kinds:
        _check_features(model, kind, options.layers)
    if out is not None:
        _refuse_unwritable(out, model, kinds[0], options.layers)
    data = _open(source, options.seed, warn)
    judged_name, parts = _parts(data, options)
    damage = DamageCount(sum(map(len, parts)), options.max_damaged, warn)
    folder, loading = cache_folder(cache), Loading(worker_count(options.workers), warn)
    how: dict[str, Any] = {"damage": damage, "on_images": on_images, "loading": loading}

    def features_of(split: Split) -> PooledFeatures:
        found = extract(classifier, split, options.layers, folder, **how)
        if found.cached:
            warn(f"the features of {found.cached:,} of {len(split):,} images were in {folder}")
        return found

    labelled = _Labelled([*map(features_of, parts[:-1])], data.classes, options.seed)
    linear, head = _fit_linear(labelled, kinds[0], options.layers, _LINEAR)
    neighbours = _choose(labelled, kinds[1], options.layers, _NEIGHBOURS)
    judged = features_of(parts[-1])
    if out is not None:
        about = _metadata(classifier, data, options)
        save_checkpoint(out, _with_head(classifier, head, linear, data.classes, about))
    return ProbeResult(
        judged_name,
        len(labelled.labels),
        _judge_linear(linear, head, judged, data.classes),
        _judge_neighbours(neighbours, labelled, judged, data.classes),
    )


def _open(source: str, seed: int, warn: Callable[[str], None]) -> ImageData:
    data = open_data(source, seed=seed).told(warn)
    if task_of(data) is not SINGLE_LABEL:
        raise VitralError(f"a probe takes one class an image, and {source} has lists of labels; {_INSTEAD}")
    return data


@dataclass(frozen=True)
class HeadStart:
    """A head fitted to frozen features, for training to begin with."""

    head: "LinearHead"
    images: int  # that it was fitted to
    held_out_top1: float | None  # of images held out meanwhile; None: none were


def fitted_head(
    classifier: Classifier,
    split: Split,
    seed: int,
    *,
    seconds: float | None = None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    loading: Loading | None = None,
) -> HeadStart | None:
    """The linear probe of what the model's own head sees; None if `seconds` reach for no image of some class.

    Args:
        classifier: the model; its head plays no part.
        split: labelled images, one class each. Of those that `seconds` reach for, each class has as many.
        seed: of their order and of what is held out.
        seconds: time to spend at most, about. Where it is short, fewer images are looked at and fewer
            penalties tried. None: all of them.
        on_images: told how many images are done, of how many.
        loading: how images are loaded; None: by as many workers as the machine suits.
    """
    begun = time.monotonic()
    end = math.inf if seconds is None else begun + seconds
    ordered = split.take(in_turns(split, seed))
    features = extract(
        classifier,
        ordered,
        (-1,),
        cache_folder(),
        damage=DamageCount(len(split), 1.0, _ignore),
        on_images=on_images,
        loading=loading,
        until=math.inf if seconds is None else begun + _LOOKING_SHARE * seconds,
    )
    if not np.bincount(features.labels, minlength=len(classifier.labels)).all():
        return None
    labelled = _Labelled([features], classifier.labels, seed)
    kind = classifier.model.config.pooling
    choice, head = _fit_linear(labelled, kind, (-1,), _affordable(labelled, kind, end))
    return HeadStart(head, len(labelled.labels), choice.held_out_top1)


def _affordable(labelled: "_Labelled", kind: Pooling, end: float) -> "_Method":
    """The linear method with the penalties, and over the folds, that can be tried until `end`."""
    if end == math.inf:
        return _LINEAR
    import sklearn.linear_model  # noqa: F401 - its import is not the fit's time

    begun = time.monotonic()
    LinearHead.fit(labelled.vectors(-1, kind), labelled.labels, labelled.num_classes, _LINEAR.default)
    now = time.monotonic()
    fits = int((end - now) / (now - begun)) - 1  # the last is to all images
    if fits < len(PENALTIES) * len(labelled.folds):
        labelled.folds = labelled.folds[:1]
    if fits >= len(PENALTIES):
        return _LINEAR
    if fits < 2:
        return replace(_LINEAR, settings=(_LINEAR.default,))
    chosen = np.linspace(0, len(PENALTIES) - 1, fits).round().astype(int)
    return replace(_LINEAR, settings=tuple(PENALTIES[index] for index in chosen))


def _ignore(_: str) -> None: ...


def usual_features(model: VisionTransformer, layers: Sequence[int] = (-1,)) -> tuple[Pooling, Pooling]:
    """What the field takes of such a model, for the linear probe and for nearest neighbours.

    Of a class token that no head was trained on, the class token beside the mean of the patches, and the
    class token alone (DINOv2, arXiv:2304.07193, appendix B.3; DINO, arXiv:2104.14294, appendix F); of any
    other model, the pooled vector that its own head sees.
    """
    pooling = model.config.pooling
    if pooling == "class_mean" or (pooling == "class" and not model.config.num_classes):
        return "class_mean", "class"
    if pooling == "map" and any("map" not in poolings(model, layer) for layer in layers):
        pooling = "mean"
    return pooling, pooling


def _check_features(model: VisionTransformer, kind: Pooling, layers: Sequence[int]) -> None:
    for layer in layers:
        known = list(poolings(model, layer))
        if "class" in known:
            known.append("class_mean")
        if kind not in known:
            raise VitralError(
                f"features={kind}: layer {layer} of this model has {', '.join(known)}; choose one of these"
            )


def _parts(data: ImageData, options: ProbeOptions) -> tuple[str, list[Split]]:
    """The name of the split to judge on; the labelled splits, and that one last."""
    judged = "test" if "test" in data.splits else "val"
    names = ["train", "val", "test"] if judged == "test" else ["train", "val"]
    parts = [data.split(name) for name in names]
    if options.limit is not None:
        parts = [sample(part, options.limit, options.seed) for part in parts]
    if options.per_class is not None:
        parts = [few_shot(data.split("train"), options.per_class, options.seed), parts[-1]]
    return judged, parts


# --- Choosing on held-out images ---------------------------------------------------------------------


class _Labelled:
    """The images that may be fitted to, and which of them to hold out while choosing."""

    def __init__(self, parts: Sequence[PooledFeatures], classes: Sequence[str], seed: int) -> None:
        self.parts, self.num_classes = parts, len(classes)
        self.labels = np.concatenate([part.labels for part in parts])
        counts = np.bincount(parts[0].labels, minlength=len(classes))
        if not counts.all():
            raise VitralError(f"no labelled image of {classes[int(counts.argmin())]!r} is left; allow more")
        self.folds = self._folds(int(counts.min()), seed)

    def vectors(self, layer: int, kind: Pooling) -> Tensor:
        return torch.cat([part.of(layer, kind) for part in self.parts])

    def of(self, choice: "_Choice") -> Tensor:
        return self.vectors(choice.layer, choice.features)

    def _folds(self, fewest: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows to fit to and rows held out: the validation split if there is one, else fifths by class."""
        from sklearn.model_selection import StratifiedKFold

        rows = np.arange(len(self.labels))
        if len(self.parts) > 1:
            first = len(self.parts[0].labels)
            return [(rows[:first], rows[first:])]
        if fewest < 2:
            return []
        splitter = StratifiedKFold(min(_FOLDS, fewest), shuffle=True, random_state=seed)
        folds = list(splitter.split(rows, self.labels))
        return folds[:1] if len(folds[0][1]) >= _ENOUGH_HELD_OUT else folds


@dataclass(frozen=True)
class _Choice:
    """What did best on the held-out images, and what it said of them; without such images, a default."""

    features: Pooling
    layer: int
    setting: float
    answers_NL: Tensor | None = None
    labels_N: Tensor | None = None

    @property
    def held_out_top1(self) -> float | None:
        if self.answers_NL is None or self.labels_N is None:
            return None
        return float((self.answers_NL.argmax(1) == self.labels_N).double().mean())

    @property
    def held_out_loss(self) -> float | None:
        if self.answers_NL is None or self.labels_N is None:
            return None
        return float(F.cross_entropy(self.answers_NL, self.labels_N))


@dataclass(frozen=True)
class _Method:
    """A way to answer, and how it is set."""

    settings: Sequence[float]
    default: float  # where one image a class leaves none to choose by
    # Vectors (N, D), labels (N,), queries (Q, D), number of classes, settings -> logits (Q, L) of each.
    answers: Callable[[Tensor, np.ndarray, Tensor, int, Sequence[float]], list[Tensor]]
    merit: Callable[[_Choice], Any]  # of what is held out; the largest wins


def _choose(labelled: _Labelled, kind: Pooling, layers: Sequence[int], method: _Method) -> _Choice:
    if not labelled.folds:
        return _Choice(kind, layers[0], method.default)
    held_out = np.concatenate([rows for _, rows in labelled.folds])
    labels_N = torch.from_numpy(labelled.labels[held_out])
    choices = []
    for layer in layers:
        vectors = labelled.vectors(layer, kind)
        of_folds = [
            method.answers(
                vectors[fit], labelled.labels[fit], vectors[held], labelled.num_classes, method.settings
            )
            for fit, held in labelled.folds
        ]
        for setting, parts in zip(method.settings, zip(*of_folds, strict=True), strict=True):
            choices.append(_Choice(kind, layer, setting, torch.cat(parts), labels_N))
    return max(choices, key=method.merit)


# --- The linear probe --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearHead:
    """Logits = vectors @ weight.T + bias, of the features as they come."""

    weight_LD: Tensor
    bias_L: Tensor

    @classmethod
    def fit(cls, vectors_ND: Tensor, labels_N: np.ndarray, num_classes: int, penalty: float) -> "LinearHead":
        """Multinomial logistic regression on standardized vectors, the scaling folded into the head.

        Minimizes the mean cross-entropy + penalty / 2 * |weight|² (the weight of the standardized vectors);
        of two classes, as usual, with one weight vector for both.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        mean_D, std_D = vectors_ND.mean(0), vectors_ND.std(0, correction=0)
        # A feature that never varies tells nothing, and rounding must not blow it up.
        std_D = torch.where(std_D > 1e-6 * (1 + mean_D.abs()), std_D, torch.ones_like(std_D))
        standardized = ((vectors_ND - mean_D) / std_D).numpy()
        model = LogisticRegression(C=1 / (penalty * len(labels_N)), max_iter=_FIT_STEPS)
        with warnings.catch_warnings(), _blas().limit(limits=1, user_api="blas"):
            # So many steps are near enough: what is held out decides whether the answer is good.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(standardized, labels_N)
        weight, bias = (
            torch.from_numpy(np.asarray(part)).double() for part in (model.coef_, model.intercept_)
        )
        if num_classes == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        weight /= std_D.double()
        return cls(weight.float(), (bias - weight @ mean_D.double()).float())

    def __call__(self, vectors_ND: Tensor) -> Tensor:
        return vectors_ND @ self.weight_LD.T + self.bias_L

    def put_into(self, model: VisionTransformer) -> None:
        """In the place of the weights of its head, which is of the same shape."""
        model.head.load_state_dict({"weight": self.weight_LD, "bias": self.bias_L})


@cache
def _blas() -> Any:
    """The threads of the libraries that scikit-learn's products run on.

    With two of them, beside torch's two, the products of a fit took 9 to 20 times as long (docs/log.md,
    2026-11-26).
    """
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _fit_linear(
    labelled: _Labelled, kind: Pooling, layers: Sequence[int], method: "_Method"
) -> tuple[_Choice, LinearHead]:
    """The layer and penalty that did best on held-out images, and the head fitted so to all of them."""
    choice = _choose(labelled, kind, layers, method)
    vectors_ND = labelled.of(choice)
    return choice, LinearHead.fit(vectors_ND, labelled.labels, labelled.num_classes, choice.setting)


def _linear_answers(
    vectors_ND: Tensor, labels_N: np.ndarray, queries_QD: Tensor, num_classes: int, penalties: Sequence[float]
) -> list[Tensor]:
    return [LinearHead.fit(vectors_ND, labels_N, num_classes, p)(queries_QD) for p in penalties]


# By the loss: of a few held-out images it tells more than their accuracy does (docs/log.md).
_LINEAR = _Method(PENALTIES, 0.1, _linear_answers, lambda choice: -(choice.held_out_loss or 0.0))


def _judge_linear(
    choice: _Choice, head: LinearHead, judged: PooledFeatures, classes: Sequence[str]
) -> LinearResult:
    temperature = _temperature(choice)
    logits_NL = head(judged.of(choice.layer, choice.features)) / temperature
    evaluation = SingleLabelEvaluation.of(
        SingleLabelOutcomes.of(logits_NL, torch.from_numpy(judged.labels)), classes
    )
    return LinearResult(
        choice.features,
        choice.layer,
        choice.setting,
        choice.held_out_top1,
        choice.held_out_loss,
        temperature,
        evaluation,
    )


def _temperature(choice: _Choice) -> float:
    if choice.answers_NL is None or choice.labels_N is None:
        return 1.0
    calibration = calibrate(choice.answers_NL, choice.labels_N)
    return calibration.temperature if calibration else 1.0


# --- Nearest neighbours ------------------------------------------------------------------------------


def neighbour_votes(
    vectors_ND: Tensor, labels_N: np.ndarray, queries_QD: Tensor, num_classes: int, ks: Sequence[float]
) -> list[Tensor]:
    """For each k, the logarithm of the classes' shares of the votes (Q, L).

    Each of the k labelled vectors with the largest cosine votes for its class with weight
    exp(cosine / 0.07); a class without a vote counts as one vote in a million.
    """
    bank_ND, labels = F.normalize(vectors_ND, dim=1), torch.from_numpy(labels_N)
    numbers = [min(int(k), len(labels)) for k in ks]
    found: list[list[Tensor]] = [[] for _ in numbers]
    for chunk_QD in F.normalize(queries_QD, dim=1).split(_CHUNK):
        nearest = (chunk_QD @ bank_ND.T).topk(max(numbers), dim=1)
        # Relative to the nearest, which changes no share and cannot overflow.
        weights_QK = ((nearest.values - nearest.values[:, :1]) / _VOTE_TEMPERATURE).exp()
        for k, shares in zip(numbers, found, strict=True):
            votes_QL = torch.zeros(len(chunk_QD), num_classes)
            votes_QL.scatter_add_(1, labels[nearest.indices[:, :k]], weights_QK[:, :k])
            shares.append(votes_QL / votes_QL.sum(1, keepdim=True))
    return [torch.cat(shares).clamp_min(1e-6).log() for shares in found]


_NEIGHBOURS = _Method(
    NEIGHBOURS, 10, neighbour_votes, lambda choice: (choice.held_out_top1, -(choice.held_out_loss or 0.0))
)


def _judge_neighbours(
    choice: _Choice, labelled: _Labelled, judged: PooledFeatures, classes: Sequence[str]
) -> NeighboursResult:
    queries = judged.of(choice.layer, choice.features)
    (votes,) = neighbour_votes(
        labelled.of(choice), labelled.labels, queries, labelled.num_classes, [choice.setting]
    )
    evaluation = SingleLabelEvaluation.of(
        SingleLabelOutcomes.of(votes, torch.from_numpy(judged.labels)), classes
    )
    return NeighboursResult(
        choice.features,
        choice.layer,
        int(choice.setting),
        choice.held_out_top1,
        evaluation.n,
        evaluation.top1,
        evaluation.ci95,
    )


# --- The probe as a model ----------------------------------------------------------------------------


def _refuse_unwritable(out: Path, model: VisionTransformer, kind: Pooling, layers: Sequence[int]) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VitralError(f"{out} exists already; choose a new folder")
    last = len(model.layers) - 1
    if any(layer % len(model.layers) != last for layer in layers):
        raise VitralError("a model's head stands on its last layer; leave out --out, or take --layer -1")
    if kind == "class_mean" and not isinstance(model.pooled_norm, torch.nn.Identity):
        raise VitralError(
            "this model norms one pooled vector, not two; leave out --out, or take --features class or mean"
        )


def _with_head(
    classifier: Classifier,
    head: LinearHead,
    choice: _Choice,
    classes: tuple[str, ...],
    metadata: dict[str, Any],
) -> Checkpoint:
    """The model with the probe in the place of its head, whatever stood there."""
    model = copy.deepcopy(classifier.model).cpu()
    config = model.config
    model.config = replace(
        config,
        pooling=choice.features,
        embedding=replace(config.embedding, class_token=config.class_token),
        head=replace(config.head, distillation_head=False),
    )
    if choice.features != "map":
        model.attention_pool = None
    model.reset_classifier(len(classes))
    head.put_into(model)
    return Checkpoint(model, classifier.preprocess, classes, metadata, _temperature(choice))


def _metadata(classifier: Classifier, data: ImageData, options: ProbeOptions) -> dict[str, Any]:
    """As a training run's, so that `vitral eval` finds the images that were held out."""
    carried = {k: v for k, v in classifier.metadata.items() if k in ("source", "licence", "origin")}
    split: dict[str, Any] = {"data": data.source, "val_fraction": 0.2, "seed": options.seed}
    if data.held_out:
        split["held_out"] = fingerprint(data.split("val"))
    return {**carried, **split}
