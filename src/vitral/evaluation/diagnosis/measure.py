"""How a classifier answers under each change, on the same images, each decoded once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from vitral.data.batches import Batch
from vitral.evaluation.diagnosis.changes import Change
from vitral.images.picture import ImageSource
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import VitralError

# Losses are compared at the temperature that suits each way of running the model best, too: else a model
# that is too sure of itself would seem to gain from whatever blurs its images.
_TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-12, 17))
_AS_IT_IS = _TEMPERATURES.index(1.0)


@dataclass(frozen=True)
class Views:
    """An image of any kind -> its pixels as each of V ways of fitting gives them, bytes (V, C, H, W)."""

    fits: tuple[Preprocess, ...]

    def __call__(self, source: ImageSource) -> Tensor:
        image = self.fits[0].open(source)
        return torch.stack([pil_to_tensor(fit.fit(image))[: fit.channels] for fit in self.fits])


@dataclass(frozen=True)
class Answers:
    """What became of each image under one change; T counts temperatures, N images."""

    right_N: np.ndarray
    losses_TN: np.ndarray  # nats

    @classmethod
    def of(cls, logits_BL: Tensor, labels_B: Tensor) -> "Answers":
        logits_BL = logits_BL.float()
        logits_TBL = torch.stack([logits_BL / temperature for temperature in _TEMPERATURES])
        labels_TB = labels_B.expand(len(_TEMPERATURES), -1)
        losses_TB = F.cross_entropy(logits_TBL.movedim(2, 1), labels_TB, reduction="none")
        right_B = logits_BL.argmax(1) == labels_B
        return cls(right_B.cpu().numpy(), losses_TB.double().cpu().numpy())

    @classmethod
    def merge(cls, parts: Sequence["Answers"]) -> "Answers":
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

    def turned(self, other: "Answers") -> tuple[int, int]:
        """How many images are right here and wrong there, and the reverse."""
        return int((self.right_N & ~other.right_N).sum()), int((other.right_N & ~self.right_N).sum())


@torch.inference_mode()
def measure(
    classifier: Classifier,
    changes: Sequence[Change],
    views: Views,
    batches: Iterable[Batch],
    on_batch: Callable[[Batch], None],
) -> list[Answers]:
    """One for each change, the first for none, of the same images."""
    model, was_training = classifier.model, classifier.model.training
    parts: list[list[Answers]] = []
    model.eval()
    try:
        for batch in batches:
            if len(batch.labels):
                parts.append(_batch_answers(classifier, changes, views, batch))
            on_batch(batch)
    finally:
        model.train(was_training)
    if not parts:
        raise VitralError("none of the images could be read, so there is nothing to diagnose")
    return [Answers.merge(of_change) for of_change in zip(*parts, strict=True)]


def _batch_answers(
    classifier: Classifier, changes: Sequence[Change], views: Views, batch: Batch
) -> list[Answers]:
    placement = classifier.placement
    pixels_BVCHW, labels_B = placement.put(batch.images), placement.put(batch.labels)
    as_it_is_BCHW = None
    found: list[Answers] = []
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
        found.append(Answers.of(logits_BL.float() / classifier.temperature, labels_B))
    return found


def _normalized(pixels_BCHW: Tensor, preprocess: Preprocess) -> Tensor:
    """As `Preprocess.normalize` does with one image, bit for bit."""
    return normalize(pixels_BCHW.to(torch.float32) / 255, list(preprocess.mean), list(preprocess.std))
