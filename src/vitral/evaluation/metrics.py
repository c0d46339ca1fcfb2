"""How well a model does: `Outcomes` of single images, which merge, and the `Evaluation` drawn from them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset

from vitral.data.batches import Batch, DamageCount
from vitral.data.image_data import ImageData, open_data
from vitral.data.loader import Loader
from vitral.data.split import SPLITS, Split, fingerprint
from vitral.data.workers import Loading, worker_count
from vitral.evaluation import imagenet
from vitral.evaluation.mistakes import Mistakes, find_mistakes
from vitral.evaluation.multilabel import THRESHOLD, MultiLabelEvaluation, MultiLabelOutcomes, distinct
from vitral.inference.classifier import Classifier
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.ranges import Batch as BatchSize
from vitral.runtime.ranges import Whole, Workers
from vitral.runtime.settings import build

CALIBRATION_BINS = 15
# JSON has the confusion matrix of so many classes at most; of 20,000 it would be a gigabyte of noughts.
MOST_CLASSES_IN_JSON = 1000


@dataclass(frozen=True)
class Outcomes:
    """What became of each image, as arrays (n,); small enough to keep for any test set."""

    labels: np.ndarray
    predictions: np.ndarray
    in_top5: np.ndarray
    confidences: np.ndarray  # probability of the prediction
    losses: np.ndarray  # cross-entropy, nats

    @classmethod
    def of(cls, logits_BL: Tensor, labels_B: Tensor) -> Self:
        logits_BL = logits_BL.float()
        top_B5 = logits_BL.topk(min(5, logits_BL.shape[1])).indices
        columns = (
            labels_B,
            top_B5[:, 0],
            (top_B5 == labels_B[:, None]).any(1),
            logits_BL.softmax(1).amax(1),
            F.cross_entropy(logits_BL, labels_B, reduction="none"),
        )
        return cls(*(column.cpu().numpy() for column in columns))

    @classmethod
    def merge(cls, parts: Iterable["Outcomes"]) -> Self:
        rows = [vars(part) for part in parts]
        return cls(**{name: np.concatenate([row[name] for row in rows]) for name in rows[0]})


@dataclass(frozen=True)
class ClassResult:
    n: int
    accuracy: float  # share of the class's images that were recognised (recall)
    precision: float  # share of the predictions of this class that were right


@dataclass(frozen=True)
class Evaluation:
    """Shares are 0..1."""

    score_name: ClassVar[str] = "accuracy"

    n: int
    top1: float
    top5: float
    loss: float  # mean cross-entropy, nats
    ece: float  # expected calibration error over 15 equal bins (arXiv:1706.04599, eq. 3)
    ci95: tuple[float, float]  # of top1, Wilson's score interval
    per_class: dict[str, ClassResult]
    # What occurred of the confusion matrix, (k, 3): true class, prediction, images. The matrix itself grows
    # with the square of the classes.
    pairs: np.ndarray = field(repr=False, compare=False)
    mistakes: Mistakes | None = field(default=None, repr=False, compare=False)  # if they were asked for

    @classmethod
    def of(cls, outcomes: Outcomes, classes: Iterable[str]) -> Self:
        from scipy.stats import binomtest

        names, n = distinct(classes), len(outcomes.labels)
        correct = outcomes.labels == outcomes.predictions
        interval = binomtest(int(correct.sum()), n).proportion_ci(method="wilson")
        codes, counts = np.unique(
            outcomes.labels.astype(np.int64) * len(names) + outcomes.predictions, return_counts=True
        )
        return cls(
            n=n,
            top1=float(correct.mean()),
            top5=float(outcomes.in_top5.mean()),
            loss=float(outcomes.losses.mean()),
            ece=calibration_error(outcomes.confidences, correct),
            ci95=(float(interval.low), float(interval.high)),
            per_class=_per_class(names, outcomes),
            pairs=np.column_stack([*np.divmod(codes, len(names)), counts]),
        )

    @property
    def confusion(self) -> list[list[int]]:
        """Images by true class (rows) and prediction (columns), (L, L); made anew each time."""
        matrix = np.zeros((len(self.per_class), len(self.per_class)), dtype=np.int64)
        truths, predictions, counts = self.pairs.T
        matrix[truths, predictions] = counts
        return matrix.tolist()

    def taken_most_often_for(self) -> dict[int, tuple[int, int]]:
        """Of each class with mistakes, which other it was taken for most often and how many images were."""
        wrong = self.pairs[self.pairs[:, 0] != self.pairs[:, 1]]
        # Later entries win: the largest count, and of equal ones the first class.
        order = np.lexsort((-wrong[:, 1], wrong[:, 2]))
        return {truth: (taken_for, count) for truth, taken_for, count in wrong[order].tolist()}

    @property
    def merit(self) -> float:
        """What the best epoch is chosen by."""
        return self.top1

    @property
    def score(self) -> float:
        """The one number that people are told of an epoch."""
        return self.top1

    @property
    def metrics(self) -> dict[str, float]:
        """What a run records of each epoch, beside the loss."""
        return {"top1": self.top1, "ece": self.ece}

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the confusion matrix of more than `MOST_CLASSES_IN_JSON` classes is None."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        del values["pairs"], values["mistakes"]
        values["per_class"] = {name: vars(result) for name, result in self.per_class.items()}
        few = len(self.per_class) <= MOST_CLASSES_IN_JSON
        return {**values, "confusion": self.confusion if few else None}


def _per_class(names: list[str], outcomes: Outcomes) -> dict[str, ClassResult]:
    correct = outcomes.labels == outcomes.predictions
    right, true, predicted = (
        np.bincount(classes, minlength=len(names))
        for classes in (outcomes.labels[correct], outcomes.labels, outcomes.predictions)
    )
    return {
        name: ClassResult(
            n=int(true[i]),
            accuracy=float(right[i] / max(true[i], 1)),
            precision=float(right[i] / max(predicted[i], 1)),
        )
        for i, name in enumerate(names)
    }


def calibration_error(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Mean distance of confidence from accuracy over equal bins, weighted by the images in each."""
    # Bin b holds confidences in (b / 15, (b + 1) / 15].
    bins = np.clip(np.ceil(confidences * CALIBRATION_BINS).astype(int) - 1, 0, None)
    gaps = np.bincount(bins, weights=confidences - correct, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: Iterable[str],
    placement: Placement,
    on_batch: Callable[[Batch], None] = lambda _: None,
    *,
    temperature: float = 1.0,
) -> Evaluation:
    """Runs `model` over every batch.

    Args:
        model: images (B, C, H, W) -> logits (B, L), on the placement's device.
        batches: each image once.
        classes: the names of the L classes.
        placement: device and precision to compute with.
        on_batch: told of each batch, for progress and damaged images.
        temperature: loss and calibration error are of softmax(logits / temperature).

    Raises:
        VitralError: if no image could be read.
    """
    was_training = model.training
    answers = answered(model.eval(), batches, placement, on_batch)
    parts = [Outcomes.of(logits_BL / temperature, labels_B) for logits_BL, labels_B in answers]
    model.train(was_training)
    return Evaluation.of(Outcomes.merge(parts), classes)


def evaluate_multi_label(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: Iterable[str],
    placement: Placement,
    on_batch: Callable[[Batch], None] = lambda _: None,
) -> MultiLabelEvaluation:
    """As `evaluate`, of batches whose labels are (B, L); probabilities are sigmoid(logits)."""
    was_training = model.training
    answers = answered(model.eval(), batches, placement, on_batch)
    parts = [MultiLabelOutcomes.of(F.logsigmoid(logits_BL), labels_BL) for logits_BL, labels_BL in answers]
    model.train(was_training)
    return MultiLabelEvaluation.of(MultiLabelOutcomes.merge(parts), classes)


@torch.inference_mode()
def answered(
    answer: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    placement: Placement,
    on_batch: Callable[[Batch], None] = lambda _: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `answer` says, (B, L) in float32, and the labels, of each batch that holds a readable image.

    Args:
        answer: images (B, C, H, W) -> logits (B, L); a model in evaluation mode, for one.
        batches: as in `evaluate`, and so are `placement` and `on_batch`.
        placement: device and precision.
        on_batch: told of each batch.

    Raises:
        VitralError: if no image could be read, or an answer is no number.
    """
    found = False
    for batch in batches:
        on_batch(batch)
        if len(batch.labels):
            found = True
            with placement.autocast():
                logits_BL = answer(placement.put(batch.images))
            if not bool(torch.isfinite(logits_BL).all()):
                raise VitralError(_no_numbers(placement))
            yield logits_BL.float(), placement.put(batch.labels)
    if not found:
        raise VitralError("not one of the images could be read, so there is nothing to evaluate")


def _no_numbers(placement: Placement) -> str:
    """Of weights that are damaged, or that overflow on the way."""
    advice = "" if placement.precision == torch.float32 else "; precision=float32 may help"
    return f"the model's answers are not finite numbers, so there is nothing to evaluate{advice}"


# --- A classifier on a data source ----------------------------------------------------------------


SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class EvaluationOptions:
    """Which images of a source, and how they are judged."""

    split: SplitName | None = None  # None: the test images, else those held out, else all
    batch_size: BatchSize = 256
    max_damaged: Whole = 0.01  # share of unreadable images past which to give up
    workers: Workers | None = None  # processes that load images; None: as many as the machine suits
    mistakes: bool = False  # whether the evaluation is to name the images that are wrong


def evaluate_classifier(
    classifier: Classifier,
    source: str,
    *,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> tuple[str, Evaluation]:
    """The name of the split that was taken, and how the classifier does on it.

    Loss and calibration error are of the probabilities that `Classifier.predict` gives: at the model's
    temperature, averaged over the views of its test-time augmentation.

    Args:
        classifier: a model with labels.
        source: the command line's DATA.
        warn: told of each damaged image and of doubts about the split.
        on_images: told how many images are done, of how many.
        options: fields of `EvaluationOptions`, such as ``split="val"``.

    Raises:
        VitralError: if an option or the data cannot be used, the data has classes that the model lacks, or
            the model is multi-label.
    """
    if classifier.multi_label:
        raise VitralError(
            "a multi-label model has no accuracy; evaluate it with evaluate_multi_label_classifier"
        )
    wanted = build(EvaluationOptions, options)
    name, images = choose_split(classifier, source, wanted.split, warn)
    course = _Course(images, DamageCount(len(images), wanted.max_damaged, warn), on_images)
    answers = _classifier_answers(classifier, images, wanted, course)
    outcomes = Outcomes.merge(Outcomes.of(answer_BL, labels_B) for answer_BL, labels_B in answers)
    evaluation = Evaluation.of(outcomes, classifier.labels)
    if not wanted.mistakes:
        return name, evaluation
    found = find_mistakes(
        images, course.judged, outcomes.predictions, outcomes.confidences, classifier.labels
    )
    return name, replace(evaluation, mistakes=found)


def evaluate_multi_label_classifier(
    classifier: Classifier,
    source: str,
    *,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> tuple[str, MultiLabelEvaluation]:
    """As `evaluate_classifier`, for a model and data of any number of classes an image."""
    if not classifier.multi_label:
        raise VitralError("this model gives one class an image; evaluate it with evaluate_classifier")
    wanted = build(EvaluationOptions, options)
    name, images = choose_split(classifier, source, wanted.split, warn)
    course = _Course(images, DamageCount(len(images), wanted.max_damaged, warn), on_images)
    answers = _classifier_answers(classifier, images, wanted, course)
    outcomes = MultiLabelOutcomes.merge(
        MultiLabelOutcomes.of(answer_BL, labels_BL) for answer_BL, labels_BL in answers
    )
    evaluation = MultiLabelEvaluation.of(outcomes, classifier.labels)
    if not wanted.mistakes:
        return name, evaluation
    probabilities = np.exp(outcomes.log_probabilities)
    found = find_mistakes(images, course.judged, probabilities > THRESHOLD, probabilities, classifier.labels)
    return name, replace(evaluation, mistakes=found)


class _Course:
    """How far an evaluation has come, and which images it could read."""

    def __init__(self, images: Split, damage: DamageCount, on_images: Callable[[int, int], None]) -> None:
        self.images, self.damage, self.on_images = images, damage, on_images
        self.done = 0
        self._judged: list[int] = []

    def add(self, batch: Batch) -> None:
        self.damage.add(batch)
        self._judged += batch.rows.tolist()
        self.done += batch.asked
        self.on_images(self.done, len(self.images))

    @property
    def judged(self) -> np.ndarray:
        """The rows of the split that were read, in order."""
        return np.array(self._judged, dtype=np.int64)


def _classifier_answers(
    classifier: Classifier, images: Split, options: EvaluationOptions, course: _Course
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logarithms of probabilities (B, L), and labels, batch by batch."""
    loading = Loading(worker_count(options.workers), course.damage.warn)
    batches = Loader(images, classifier.preprocess, loading).evaluation_batches(options.batch_size)
    return answered(classifier.log_probabilities, batches, classifier.placement, course.add)


def choose_split(
    classifier: Classifier, source: str, wanted: str | None, warn: Callable[[str], None]
) -> tuple[str, Split]:
    made_by = classifier.metadata
    fraction, seed = made_by.get("val_fraction", 0.2), made_by.get("seed", 0)
    if wanted in ("test", "all"):
        fraction = 0  # Nothing need be held out, and of one image a class nothing could be.
    data = open_data(source, val_fraction=fraction, seed=seed)
    if data.multi_label != classifier.multi_label:
        counts = ("one class an image", "any number of classes an image")
        raise VitralError(
            f"{source} has {counts[data.multi_label]}, and the model was trained for "
            f"{counts[classifier.multi_label]}; give it data of its own kind, or train a model on this"
        )
    doubts: list[str] = []
    if data.held_out:
        same = fingerprint(data.split("val")) == made_by.get("held_out")
        if wanted == "val" and not same:
            doubts.append(
                f"these are not the images that were held out when the model was trained; it may "
                f"have seen some of them ({source} has changed, or is other data)"
            )
        if wanted is None and "test" not in data.splits and not same:
            data, wanted = open_data(source, val_fraction=0), "all"
            if "held_out" not in made_by:
                doubts.append(
                    "no record says which images this model was trained on; all are judged, and some of them "
                    "it may have learnt by heart"
                )
    name = wanted or ("test" if "test" in data.splits else "val")
    if name not in (*data.splits, "all"):
        others = [split for split in SPLITS if split in data.splits or (split == "val" and name == "test")]
        raise VitralError(
            f"{source} has no {name!r} split; it has {', '.join(map(repr, others))}; 'all' takes every image"
        )
    images = _all_images(data) if name == "all" else data.split(name)
    images = _relabelled(images, data.classes, classifier.labels)
    data.told(warn)
    for doubt in doubts:
        warn(doubt)
    return name, images


def _all_images(data: ImageData) -> Split:
    splits = data.splits.values()
    return Split(
        # A view: nothing is read before it is asked for.
        ConcatDataset([split.images for split in splits]),  # pyrefly: ignore[bad-argument-type]
        np.concatenate([split.labels for split in splits]),
        [name for split in splits for name in split.names],
    )


def _relabelled(split: Split, classes: tuple[str, ...], labels: tuple[str, ...]) -> Split:
    """The split with indices into the model's labels; ImageNet's folders are known by their ids too."""
    index = None if set(classes) <= set(labels) else imagenet.class_indices(classes, labels)
    unknown = [] if index else sorted(set(classes) - set(labels))
    if unknown:
        raise VitralError(
            f"the data has classes that the model lacks: {', '.join(unknown[:5])}; "
            f"it knows {', '.join(labels[:5])}{' and more' if len(labels) > 5 else ''}"
        )
    places = {name: place for place, name in reversed(list(enumerate(labels)))}
    index = np.array(index or [places[name] for name in classes])
    if not split.multi_label:
        return replace(split, labels=index[split.labels])
    shown = np.zeros((len(split), len(labels)), dtype=bool)
    shown[:, index] = split.labels
    return replace(split, labels=shown)
