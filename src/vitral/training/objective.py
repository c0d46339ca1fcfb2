"""What training minimizes: cross-entropy or binary, weighted by class, with or without a teacher.

Axes: B batch, L classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.checkpoints.folder import load_checkpoint
from vitral.data.split import Split, class_counts
from vitral.evaluation.task import SINGLE_LABEL, task_of
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, as_classifier
from vitral.recipes.schema import Criterion, Loss
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError


@dataclass(frozen=True)
class Objective:
    """The mean loss of a batch.

    Args:
        loss: its kind; or a callable of logits and targets, both (B, L), that gives the mean loss.
        label_smoothing: share of the targets that is spread over all classes.
        weights: of the classes, (L,), with mean 1 over the training images; or, of multi-label data, of
            each class where it is absent and where it is present, (2, L). None for all alike.
        distillation: what to distil from and how, if anything.
    """

    loss: Loss | Callable[[Tensor, Tensor], Tensor]
    label_smoothing: float = 0.0
    weights: Tensor | None = None
    distillation: "Distillation | None" = None

    def __call__(self, heads: Sequence[Tensor], targets_BL: Tensor, images_BCHW: Tensor) -> Tensor:
        """The loss of each head's logits (B, L), in float32, as a scalar.

        Args:
            heads: the logits of the head and, for DeiT's token, of the distillation head.
            targets_BL: probabilities of the classes; for "binary", those above 0 are present.
            images_BCHW: what the model saw, for the teacher.
        """
        loss = self.supervised(heads[0].float(), targets_BL)
        if self.distillation is None:
            return loss
        share = self.distillation.share
        # The last head is the distillation token's, where there is one (DeiT, §4).
        return (1 - share) * loss + share * self.distillation(heads[-1].float(), images_BCHW)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed of the teacher, a line each."""
        return self.distillation.teacher.classifier.notes if self.distillation else ()

    def supervised(self, logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
        if callable(self.loss):
            return self.loss(logits_BL, targets_BL)
        smoothing = self.label_smoothing
        if self.loss != "binary":
            return F.cross_entropy(logits_BL, targets_BL, self.weights, label_smoothing=smoothing)
        # Mixed images show both classes (ResNet strikes back, arXiv:2110.00476, §2.2; DeiT-III's code).
        present_BL = (targets_BL > 0).float()
        smoothed_BL = present_BL * (1 - smoothing) + smoothing / targets_BL.shape[1]
        weights = self.weights
        if weights is not None and weights.ndim == 2:
            # Not torch's pos_weight: that would weigh a smoothed target's share of "present" too, which for
            # a rare class would outweigh that it is absent.
            weights = torch.where(present_BL > 0, weights[1], weights[0])
        return F.binary_cross_entropy_with_logits(logits_BL, smoothed_BL, weights)


@dataclass(frozen=True)
class Distillation:
    """The loss against a teacher's answers: DeiT's eq. 3 ("hard") or eq. 2 ("soft").

    Args:
        teacher: images (B, C, H, W) -> its logits (B, L).
        kind: "hard" for the teacher's label, "soft" for its probabilities.
        share: of the whole loss that is the teacher's.
        temperature: of "soft".
    """

    teacher: "Teacher"
    kind: Literal["hard", "soft"] = "hard"
    share: float = 0.5
    temperature: float = 3.0

    def __call__(self, logits_BL: Tensor, images_BCHW: Tensor) -> Tensor:
        teacher_BL = self.teacher(images_BCHW)
        if self.kind == "hard":
            return F.cross_entropy(logits_BL, teacher_BL.argmax(1))
        return self.temperature**2 * F.kl_div(
            (logits_BL / self.temperature).log_softmax(1),
            (teacher_BL / self.temperature).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )


class Teacher:
    """A classifier's logits for images that were preprocessed for another model.

    Args:
        classifier: the teacher.
        seen: how the images were preprocessed.
        labels: the student's, in its order.

    Raises:
        VitralError: if the teacher lacks one of the labels, or is multi-label.
    """

    def __init__(self, classifier: Classifier, seen: Preprocess, labels: Sequence[str]) -> None:
        if task_of(classifier) is not SINGLE_LABEL:
            raise VitralError("the teacher is multi-label; distil from a model of one class per image")
        missing = sorted(set(labels) - set(classifier.labels))
        if missing:
            raise VitralError(
                f"the teacher lacks the class {missing[0]!r}; its labels are "
                f"{', '.join(classifier.labels[:5])}, ...; distil from a model of the same labels"
            )
        self.classifier = classifier
        device = classifier.placement.device
        places = {label: place for place, label in reversed(list(enumerate(classifier.labels)))}
        self.columns = torch.tensor([places[label] for label in labels], device=device)
        wanted = classifier.preprocess
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (seen.mean, seen.std))
        own_mean, own_std = (
            torch.tensor(values, device=device)[:, None, None] for values in (wanted.mean, wanted.std)
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        own_BCHW = images_BCHW * self.scale + self.shift
        size = self.classifier.preprocess.img_size
        if own_BCHW.shape[2:] != torch.Size(size):
            own_BCHW = F.interpolate(own_BCHW, size, mode="bicubic", antialias=True)
        with self.classifier.placement.autocast():
            logits_BL = self.classifier.model(own_BCHW)
        return logits_BL.float()[:, self.columns]


def build_objective(
    criterion: Criterion, train: Split, preprocess: Preprocess, labels: Sequence[str], placement: Placement
) -> Objective:
    """The objective of these settings for the training images.

    Raises:
        VitralError: if the teacher cannot be loaded or has other labels.
    """
    weights = None
    if criterion.class_weights == "balanced":
        weights = placement.put(torch.from_numpy(balanced_weights(train.labels, len(labels))).float())
    distillation = None
    if criterion.teacher:
        alike = Placement.choose(placement.device.type)  # pyrefly: ignore[bad-argument-type]
        classifier = as_classifier(load_checkpoint(criterion.teacher), alike)
        distillation = Distillation(
            Teacher(classifier, preprocess, labels),
            criterion.distillation,
            criterion.distillation_share,
            criterion.distillation_temperature,
        )
    return Objective(criterion.loss, criterion.label_smoothing, weights, distillation)


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """N / (L n_c) for each class, scikit-learn's "balanced" (King and Zeng, 2001), (L,).

    Of multi-label data the same of each class's own two answers: N / (2 n_absent) and N / (2 n_present),
    (2, L), so that absent and present weigh alike, and each class as much as any other.
    """
    counts = class_counts(labels, num_classes)
    if labels.ndim == 1:
        return len(labels) / (num_classes * counts)
    # An answer that no training image has is never weighed.
    return len(labels) / (2 * np.maximum([len(labels) - counts, counts], 1))
