"""`Parts`: what a researcher passes in the place of ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from vitral.images.preprocess import Preprocess
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError, one_line


@dataclass(frozen=True)
class Parts:
    """Callables in the place of a run's own; None: its own.

    No file of the run says what they are: whoever resumes it passes them again.
    """

    # Images (B, 3, H, W) -> logits (B, L), the classes in the data's order; its own weights are trained.
    model: nn.Module | None = None
    # Logits (B, L) in float32 and targets (B, L), probabilities of the classes -> the mean loss, a scalar.
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    # Groups of parameters, as torch's optimizers take them -> an optimizer; the schedule sets its rates.
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None
    # A picture -> its pixels, normalized, (C, H, W); what is random in it follows torch's generator.
    transform: Callable[[Image.Image], Tensor] | None = None
    # Told of the model before its first step; it may freeze parameters or set weights.
    prepare: Callable[[Any], object] | None = None


OURS = Parts()


def refuse_other_logits(
    model: nn.Module, preprocess: Preprocess, labels: Sequence[str], placement: Placement
) -> None:
    """Asks a module for the logits of two images, which also gives lazy layers their weights.

    Raises:
        VitralError: if it cannot take the images, or does not give a logit for each label.
    """
    name, shape = type(model).__name__, (2, preprocess.channels, *preprocess.img_size)
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(shape, device=placement.device))
    except Exception as error:  # whatever code it is
        raise VitralError(f"the module {name} cannot take images {shape}: {one_line(error)}") from error
    gave = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if gave != (2, len(labels)):
        raise VitralError(f"the module {name} gives {gave} for 2 images, and not logits (2, {len(labels)})")
