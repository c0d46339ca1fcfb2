"""`Parts`: what a researcher passes in the place of ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.optim import Optimizer

from vitral.model.vit import VisionTransformer


@dataclass(frozen=True)
class Parts:
    """Callables in the place of a run's own; None: its own.

    No file of the run says what they are: whoever resumes it passes them again.
    """

    # Logits (B, L) in float32 and targets (B, L), probabilities of the classes -> the mean loss, a scalar.
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    # Groups of parameters, as torch's optimizers take them -> an optimizer; the schedule sets its rates.
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None
    # A picture -> its pixels, normalized, (C, H, W); what is random in it follows torch's generator.
    transform: Callable[[Image.Image], Tensor] | None = None
    # Told of the model before its first step; it may freeze parameters or set weights.
    prepare: Callable[[VisionTransformer], object] | None = None


OURS = Parts()
