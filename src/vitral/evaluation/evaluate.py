"""How well a model does on labelled images, and which images of a data source are judged."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitral.data.batches import Batch, DamageCount
from vitral.data.columns import Columns
from vitral.data.image_data import DataSource, ImageData, open_data
from vitral.data.loader import Loader
from vitral.data.split import SPLITS, Split, joined
from vitral.data.workers import Loading, worker_count
from vitral.evaluation import imagenet
from vitral.evaluation.evaluation import Evaluation
from vitral.evaluation.mistakes import find_mistakes
from vitral.evaluation.outcomes import Outcomes, Share
from vitral.evaluation.task import outputs, task_of
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, load
from vitral.model.config import height_and_width
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Device, Placement, Precision
from vitral.runtime.errors import VitralError
from vitral.runtime.ranges import Batch as BatchSize
from vitral.runtime.ranges import Whole, Workers
from vitral.runtime.settings import build
from vitral.runtime.world import ALONE, World

SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class EvaluationOptions:
    """Which images of a source, and how they are judged."""

    split: SplitName | None = None  # None: the test images, else those held out, else all
    batch_size: BatchSize = 256
    max_damaged: Whole = 0.01  # share of unreadable images past which to give up
    workers: Workers | None = None  # processes that load images; None: as many as suit the machine
    mistakes: bool = False  # whether the evaluation is to name the images that are wrong


def evaluate(
    model: str | PathLike | Classifier | nn.Module,
    data: DataSource,
    split: SplitName | None = None,
    *,
    preprocess: Preprocess | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    **options: Any,
) -> Evaluation:
    """Judge a model on labelled images.

    Args:
        model: a run or any checkpoint, a `Classifier`, or a module: images (B, C, H, W) -> logits (B, L),
            its classes in the order of the data's.
        data: as `open_data` takes it.
        split: "train", "val", "test" or "all"; None: the test images, else those that were held out from
            training, else all.
        preprocess: what a module expects of an image; a `VisionTransformer` needs none to be named.
        device: where to compute, if the model is named by its path; a module computes where it is.
        precision: of matrix products, likewise.
        options: fields of `EvaluationOptions`, such as ``batch_size=32``.

    Returns:
        A `SingleLabelEvaluation` (top1, loss, ece, confusion, ...) or a `MultiLabelEvaluation`.

    Raises:
        VitralError: if the model, the data or an option cannot be used, or their classes differ.
    """
    if isinstance(model, nn.Module):
        return _evaluate_module(model, open_data(data), split, preprocess, build(EvaluationOptions, options))
    if not isinstance(model, Classifier):
        model = load(model, device=device, precision=precision)
    return evaluate_classifier(model, data, split=split, warn=warnings.warn, **options)[1]


def _evaluate_module(
    module: nn.Module,
    data: ImageData,
    split: SplitName | None,
    preprocess: Preprocess | None,
    options: "EvaluationOptions",
) -> Evaluation:
    """Judge a module where it is, on the splits as they were opened; it is left as it was."""
    if preprocess is None:
        if not isinstance(module, VisionTransformer):
            raise VitralError(
                f"say what images a {type(module).__name__} takes: preprocess=vitral.Preprocess((224, 224))"
            )
        height, width = height_and_width(module.config.img_size)
        preprocess = Preprocess((height, width)).for_channels(module.config.in_channels)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    was_training, model = module.training, cast(Any, module.eval())
    classifier = Classifier(
        model, preprocess, data.classes, Placement(device, torch.float32), multi_label=data.multi_label
    )
    try:
        return _judge(classifier, _own_split(data, split), options)
    finally:
        module.train(was_training)


def _own_split(data: ImageData, name: SplitName | None) -> Split:
    if name == "all":
        return joined([*data.splits.values()])
    return data.split(name or ("test" if "test" in data.splits else "val"))


def evaluate_classifier(
    classifier: Classifier,
    source: DataSource,
    *,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    world: World = ALONE,
    **options: Any,
) -> tuple[str, Evaluation]:
    """Judge a classifier; returns the name of the split that was taken, and the evaluation.

    Loss and calibration error are of the probabilities that `Classifier.predict` gives: at the model's
    temperature, averaged over the views of its test-time augmentation.

    Args:
        classifier: a model with labels.
        source: as `open_data` takes it.
        warn: told of each damaged image and of doubts about the split.
        on_images: told how many images are done, of how many.
        world: the processes that share the images, and all get the evaluation of all.
        options: fields of `EvaluationOptions`, such as ``split="val"``.

    Raises:
        VitralError: if an option or the data cannot be used, or the data has classes that the model lacks.
    """
    wanted = build(EvaluationOptions, options)
    name, images = choose_split(classifier, source, wanted.split, warn)
    return name, _judge(classifier, images, wanted, warn, on_images, world)


def _judge(
    classifier: Classifier,
    images: Split,
    wanted: EvaluationOptions,
    warn: Callable[[str], None] = warnings.warn,
    on_images: Callable[[int, int], None] = lambda *_: None,
    world: World = ALONE,
) -> Evaluation:
    judged = judge(classifier, images, wanted, warn, on_images, world=world)
    if not wanted.mistakes:
        return judged.evaluation
    found = find_mistakes(images, judged.rows, judged.outcomes, classifier.labels)
    return replace(judged.evaluation, mistakes=found)


@dataclass(frozen=True)
class Judged:
    """What became of the images of a split in one pass."""

    rows: np.ndarray  # (n,) of the split, those that could be read, in order
    outcomes: Outcomes
    evaluation: Evaluation
    damaged: dict[str, str]  # why each of the others could not be read, by its name


def judge(
    classifier: Classifier,
    images: Split,
    wanted: EvaluationOptions,
    warn: Callable[[str], None],
    on_images: Callable[[int, int], None],
    on_answers: Callable[[Tensor], None] = lambda _: None,
    world: World = ALONE,
) -> Judged:
    """Judge a classifier on a split whose labels are indices into its own.

    Args:
        classifier: a model with labels.
        images: the split.
        wanted: how it is judged.
        warn: told of each damaged image.
        on_images: told how many images are done, of how many.
        on_answers: given the logarithms of the probabilities of each batch (B, L), in float32.
        world: the processes. The batches are those of one process, dealt to all, so that each answer has its
            bits, and no image is judged twice to fill a batch.

    Raises:
        VitralError: if too many images are damaged, or an answer is not a finite number.
    """
    task = task_of(classifier)
    course = _Course(images, DamageCount(len(images), wanted.max_damaged, warn), on_images)
    loader = Loader(images, classifier.preprocess, Loading(worker_count(wanted.workers), warn))
    batches = loader.evaluation_batches(wanted.batch_size, dealt=slice(world.rank, None, world.size))

    def share() -> Share:
        parts = []
        for answers_BL, labels in outputs(
            classifier.log_probabilities, batches, classifier.placement, course.add, some=world.alone
        ):
            on_answers(answers_BL)
            parts.append(task.outcomes.of(answers_BL, labels))
        return course.judged, parts

    shares = world.gathered(share)
    for damaged in world.exchanged(course.damage.reasons):
        course.damage.note(damaged.items())
    rows, outcomes = world.from_first(
        lambda: (np.sort(np.concatenate([rows for rows, _ in shares])), task.outcomes.of_shares(shares))
    )
    evaluation = task.evaluation.of(outcomes, classifier.labels)
    return Judged(rows, outcomes, evaluation, course.damage.reasons)


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


def choose_split(
    classifier: Classifier, source: DataSource, wanted: str | None, warn: Callable[[str], None]
) -> tuple[str, Split]:
    made_by = classifier.metadata
    fraction, seed = made_by.get("val_fraction", 0.2), made_by.get("seed", 0)
    if wanted in ("test", "all"):
        fraction = 0  # Nothing need be held out, and of one image per class nothing could be.
    columns = Columns.of_metadata(made_by)
    data = open_data(source, val_fraction=fraction, seed=seed, columns=columns)
    if task_of(data) is not task_of(classifier):
        raise VitralError(
            f"{data.source} has {task_of(data).words}, and the model was trained for "
            f"{task_of(classifier).words}; give it data of its own kind, or train a model on this"
        )
    doubts: list[str] = []
    if data.held_out:
        same = data.split("val").fingerprint == made_by.get("held_out")
        if wanted == "val" and not same:
            doubts.append(
                f"these are not the images that were held out when the model was trained; it may "
                f"have seen some of them ({data.source} has changed, or is other data)"
            )
        if wanted is None and "test" not in data.splits and not same:
            data, wanted = open_data(source, val_fraction=0, columns=columns), "all"
            if "held_out" not in made_by:
                doubts.append(
                    "no record says which images this model was trained on; all are judged, and some of them "
                    "it may have learned by heart"
                )
    name = wanted or ("test" if "test" in data.splits else "val")
    if name not in (*data.splits, "all"):
        others = [split for split in SPLITS if split in data.splits or (split == "val" and name == "test")]
        raise VitralError(
            f"{data.source} has no {name!r} split; it has {', '.join(map(repr, others))}; "
            "'all' takes every image"
        )
    images = joined([*data.splits.values()]) if name == "all" else data.split(name)
    images = relabelled(images, data.classes, classifier.labels)
    data.told(warn)
    for doubt in doubts:
        warn(doubt)
    return name, images


def relabelled(split: Split, classes: tuple[str, ...], labels: tuple[str, ...]) -> Split:
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
    return replace(split, labels=task_of(split).renumber(split.labels, index, len(labels)))
