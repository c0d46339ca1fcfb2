"""Temperature scaling: one number that makes a trained classifier's probabilities mean what they say.

Dividing all logits by it changes no prediction (On Calibration of Modern Neural Networks,
arXiv:1706.04599, §4.2).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.evaluation.single_label import SingleLabelOutcomes, calibration_error
from vitral.runtime.errors import VitralError

# The spread of temperatures fitted on so many images is a tenth of their size; what it leaves as calibration
# error, 3 %, is what an uncalibrated model may well have less of (docs/log.md).
LEAST_IMAGES = 100
# More tell a temperature no better, and their logits take memory.
CALIBRATION_IMAGES = 10_000
_LARGEST_LOG = math.log(100.0)


def fit_temperature(logits_BL: Tensor, labels_B: Tensor) -> float:
    """The temperature T > 0 for which softmax(logits / T) gives the labels the least cross-entropy.

    The labels count as B images, a uniform guess as one image more: where every image is right, the least
    cross-entropy alone would be at T = 0, a certainty that no number of images can prove (the same doubt
    as in Platt's scaling, 1999, §2.2).

    Args:
        logits_BL: of images that the model was not trained on.
        labels_B: their classes.

    Raises:
        VitralError: if there are no images, or logits are not finite.
    """
    from scipy.optimize import minimize_scalar

    if not len(labels_B) or not bool(torch.isfinite(logits_BL).all()):
        raise VitralError(
            f"a temperature needs finite logits of some images; these are of {len(labels_B)} images"
        )
    logits_BL, labels_B = logits_BL.detach().double().cpu(), labels_B.cpu()
    doubt = 1 / (len(labels_B) + 1)

    def loss(log_temperature: float) -> float:
        scaled_BL = logits_BL / math.exp(log_temperature)
        return float(F.cross_entropy(scaled_BL, labels_B, label_smoothing=doubt))

    # In 1 / T the loss is convex, so that over log T it has one minimum.
    found = minimize_scalar(
        loss, bounds=(-_LARGEST_LOG, _LARGEST_LOG), method="bounded", options={"xatol": 1e-7}
    )
    return math.exp(found.x)


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does on the images that it was fitted on."""

    temperature: float
    n: int
    raw_ece: float  # expected calibration error (`evaluate.calibration_error`) at temperature 1
    ece: float  # at the fitted one


def calibrate(logits_BL: Tensor, labels_B: Tensor) -> Calibration | None:
    """A temperature from held-out images, and the calibration error without and with it.

    None if there are fewer than `LEAST_IMAGES`: the probabilities are then better left as they are.
    """
    if len(labels_B) < LEAST_IMAGES:
        return None
    temperature = fit_temperature(logits_BL, labels_B)
    raw_ece, ece = (_ece(logits_BL / t, labels_B) for t in (1.0, temperature))
    return Calibration(temperature, len(labels_B), raw_ece, ece)


def _ece(logits_BL: Tensor, labels_B: Tensor) -> float:
    outcomes = SingleLabelOutcomes.of(logits_BL, labels_B)
    return calibration_error(outcomes.confidences, outcomes.labels == outcomes.predictions)
