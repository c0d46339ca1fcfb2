"""What decoding JPEGs more coarsely changes: of the grey levels, the logits and the answers."""

import time
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from vitral.data.split import Split, evenly
from vitral.images.preprocess import Decoding
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import ImageError

_IMAGES = 64
_AT_ONCE = 32


@dataclass(frozen=True)
class DecodingCost:
    """One way of decoding beside that of every pixel, on the same images."""

    decoding: Decoding
    images: int
    levels: float  # mean difference of the model's pixels, of 255
    most_levels: int  # the largest of them
    logits: float  # mean difference
    most_logits: float
    same: int  # images that get the same answer
    # Times as many images a second, from file to the model's pixels; never twice the same.
    faster: float = field(compare=False)

    def __str__(self) -> str:
        return (
            f"decoding={self.decoding}: {self.levels:.2f} grey levels off on average, {self.most_levels} at "
            f"most; logits {self.logits:.3f}, {self.most_logits:.2f} at most; {self.same} of {self.images} "
            f"answers stay; {self.faster:.1f} times as fast"
        )


def decoding_costs(classifier: Classifier, images: Split) -> tuple[DecodingCost, ...]:
    """Measure each other way of decoding on at most 64 images, spread evenly; damaged ones are left out.

    None where no image comes out otherwise: of PNGs, and of JPEGs hardly larger than the model sees them.
    """
    rows = evenly(len(images), _IMAGES).tolist()
    pixels, seconds = {}, {}
    for decoding in get_args(Decoding):
        begun = time.process_time()
        pixels[decoding] = _pixels(classifier, decoding, images, rows)
        seconds[decoding] = time.process_time() - begun
    if not len(pixels["full"]):
        return ()
    logits = {decoding: _logits(classifier, found) for decoding, found in pixels.items()}
    costs = []
    for decoding in get_args(Decoding)[1:]:
        levels = np.abs(pixels[decoding].astype(int) - pixels["full"].astype(int))
        off_BL = (logits[decoding] - logits["full"]).abs()
        same = logits[decoding].argmax(1) == logits["full"].argmax(1)
        costs.append(
            DecodingCost(
                decoding,
                len(levels),
                float(levels.mean()),
                int(levels.max()),
                float(off_BL.mean()),
                float(off_BL.max()),
                int(same.sum()),
                seconds["full"] / max(seconds[decoding], 1e-9),
            )
        )
    return tuple(costs) if any(cost.most_levels for cost in costs) else ()


def _pixels(classifier: Classifier, decoding: Decoding, images: Split, rows: list[int]) -> np.ndarray:
    preprocess, found = replace(classifier.preprocess, decoding=decoding), []
    for row in rows:
        try:
            found.append(preprocess.pixels(images.images[row]))
        except ImageError:
            continue
    return np.stack(found) if found else np.empty(0, np.uint8)


@torch.inference_mode()
def _logits(classifier: Classifier, pixels_BHWC: np.ndarray) -> Tensor:
    model, was_training = classifier.model, classifier.model.training
    parts = []
    try:
        model.eval()
        for pixels in torch.from_numpy(pixels_BHWC).split(_AT_ONCE):
            images_BCHW = classifier.preprocess.normalize_pixels(classifier.placement.put(pixels))
            with classifier.placement.autocast():
                parts.append(model(images_BCHW).float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts)
