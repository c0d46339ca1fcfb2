"""`Answers`: what a model says of held-out images, from one pass; every analysis is computed from them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from vitral.data.columns import Columns
from vitral.data.image_data import DataSource, open_data
from vitral.data.split import Split
from vitral.data.subsets import thinned
from vitral.evaluation.evaluate import EvaluationOptions, choose_split, judge, relabelled
from vitral.evaluation.evaluation import Evaluation, distinct
from vitral.evaluation.mistakes import Mistakes, find_mistakes
from vitral.evaluation.outcomes import Outcomes
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import build

# A GiB of float32: 50,000 images of 5,000 classes. Ten million images of 1,000 would be 40 GB.
MOST_NUMBERS = 2**28


@dataclass(frozen=True)
class Answers:
    """What a model says of the n images of a split that could be read.

    The rows of `log_probabilities` and of `outcomes` are the images in the order of `rows`.
    """

    split_name: str  # "train", "val", "test" or "all"
    split: Split  # its images, damaged ones too; labels are indices into `classes`
    rows: np.ndarray  # (n,) of the split
    classes: tuple[str, ...]  # (L,), which differ from each other
    log_probabilities: np.ndarray  # (n, L) float32, of what `Classifier.predict` gives
    outcomes: Outcomes
    evaluation: Evaluation
    # Whether the model never learnt from the images: True for test images and for those that its training
    # held out, False where training images are among them, None where no record says.
    held_out: bool | None
    damaged: tuple[tuple[str, str], ...] = ()  # name and reason of each image that could not be read

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray:
        """The truth: (n,) indices into `classes`, or (n, L) of which of them an image shows."""
        return self.outcomes.labels

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Give what the model says as probabilities (n, L)."""
        return np.exp(self.log_probabilities)

    @cached_property
    def mistakes(self) -> Mistakes:
        """Find the wrong answers, the surest first."""
        return find_mistakes(self.split, self.rows, self.outcomes, self.classes)

    def name(self, position: int) -> str:
        """Give the name by which the source knows image `position` of the n."""
        return self.split.names[int(self.rows[position])]


def answers_of(
    classifier: Classifier,
    source: DataSource,
    *,
    images: int | None = None,
    warn: Callable[[str], None] = lambda _: None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> Answers:
    """Ask a model about labelled images, each once, and keep all that it says.

    Args:
        classifier: a model with labels.
        source: as `open_data` takes it.
        images: at most so many, evenly over the split's order; None: all.
        warn: told of each damaged image and of doubts about the split.
        on_images: told how many images are done, of how many.
        options: fields of `EvaluationOptions`, such as ``split="val"``.

    Raises:
        VitralError: as `evaluate_classifier`, or if the answers would not fit into memory.
    """
    wanted = build(EvaluationOptions, options)
    name, split = choose_split(classifier, source, wanted.split, warn)
    held_out = _held_out(classifier, name, split)
    if images is not None and images < len(split):
        split = thinned(split, images)
    _refuse_too_many(len(split), len(classifier.labels))
    kept: list[Tensor] = []
    judged = judge(classifier, split, wanted, warn, on_images, kept.append)
    return Answers(
        name,
        split,
        judged.rows,
        tuple(distinct(classifier.labels)),
        np.concatenate([log_probabilities_BL.cpu().numpy() for log_probabilities_BL in kept]),
        judged.outcomes,
        judged.evaluation,
        held_out,
        tuple(judged.damaged.items()),
    )


def training_images(classifier: Classifier, source: DataSource) -> Split:
    """Give the images of a source that the model learnt from, if the source is that of its training.

    As of `Answers.split`, the labels are indices into the model's own.

    Raises:
        VitralError: if the source cannot be used, or has classes that the model lacks.
    """
    made_by = classifier.metadata
    options = {"val_fraction": made_by.get("val_fraction", 0.2), "seed": made_by.get("seed", 0)}
    data = open_data(source, **options, columns=Columns.of_metadata(made_by))
    return relabelled(data.split("train"), data.classes, classifier.labels)


def _held_out(classifier: Classifier, name: str, split: Split) -> bool | None:
    if name == "test" or split.fingerprint == classifier.metadata.get("held_out"):
        return True
    return None if name == "val" else False


def _refuse_too_many(count: int, num_classes: int) -> None:
    if count * num_classes > MOST_NUMBERS:
        raise VitralError(
            f"the answers for {count:,} images and {num_classes:,} classes would take "
            f"{4 * count * num_classes / 1e9:.1f} GB; look at fewer: images={MOST_NUMBERS // num_classes:,}"
        )
