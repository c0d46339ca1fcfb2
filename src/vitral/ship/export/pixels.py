"""From the pixels of images to logits and probabilities, as one program that every format is made of."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vitral.inference.classifier import Classifier
from vitral.model.kernels import PORTABLE, set_kernels
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

INPUTS, OUTPUTS = ("pixels",), ("logits", "probabilities")


class PixelsModel(nn.Module):
    """uint8 RGB (B, H, W, 3) -> logits (B, L) and probabilities (B, L), float32: all that `predict` computes.

    What the host does before is decoding, turning, resizing and cropping, or `picture.picture_model`.

    Args:
        classifier: whose model, mean, std and temperature are taken; its model is copied, and stays as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        model = copy.deepcopy(classifier.model).to("cpu", torch.float32).eval()
        # Attention whose bias depends on weights that learn cannot be exported to ONNX.
        self.model = model.requires_grad_(requires_grad=False)
        set_kernels(self.model, PORTABLE)
        preprocess = classifier.preprocess
        self.channels, self.temperature = preprocess.channels, classifier.temperature
        self.multi_label = classifier.multi_label
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocess, name)).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels_BCHW = pixels[..., : self.channels].permute(0, 3, 1, 2).float()
        logits_BL = self.model((pixels_BCHW / 255 - self.mean) / self.std).float()
        scaled_BL = logits_BL / self.temperature
        return logits_BL, scaled_BL.sigmoid() if self.multi_label else scaled_BL.softmax(dim=1)


def exported(classifier: Classifier, *, any_size: bool = False) -> ExportedProgram:
    """Traces `PixelsModel` for batches of any size, and if asked for images of any size.

    Args:
        classifier: what to export.
        any_size: for any height and width that the patch divides; else for those of the preprocessing.

    Raises:
        VitralError: if the model cannot be traced, or is right at its own size alone.
    """
    height, width = classifier.preprocess.img_size
    dimensions: dict[int, Any] = {0: Dim("batch", min=1)}
    if any_size:
        refuse_one_size(classifier.model)
        patch = classifier.model.config.patch_size
        dimensions |= {1: patch * Dim("rows", min=1), 2: patch * Dim("columns", min=1)}
        # Another size than the model's own, for no rule may be traced that holds there alone.
        height, width = height + patch, width + 2 * patch
    # Two images: of one, torch takes the batch for a constant.
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    try:
        program = torch.export.export(PixelsModel(classifier), (example,), dynamic_shapes=(dimensions,))
    except Exception as error:
        name, reason = type(classifier.model).__name__, next(iter(str(error).strip().splitlines()), "")
        raise VitralError(
            f"{name} cannot be exported: torch.export says {type(error).__name__} {reason}"
        ) from error
    _forget_sources([program.graph_module])
    return program


def _forget_sources(modules: Sequence[nn.Module]) -> None:
    """Takes out of the program from which lines of which files of this machine it came."""
    for module in modules:
        for node in module.graph.nodes:  # pyrefly: ignore[missing-attribute]
            node.meta.pop("stack_trace", None)


# --- Images of any size ----------------------------------------------------------------------------


def refuse_one_size(model: nn.Module) -> None:
    """Raises VitralError if a graph for any size would not be the model at every size."""
    if not isinstance(model, VisionTransformer):
        raise VitralError(
            f"only Vitral's own models are exported for images of any size; a {type(model).__name__} is for "
            "one size"
        )
    config = model.config
    attention = config.layer.attention
    why = None
    if attention.relative_bias != "none" and attention.relative_resize == "geometric":
        why = "its relative positions are resized by a search, which no graph can do (the rule 'geometric')"
    elif attention.relative_bias != "none":
        why = "its relative positions are resized at every other size, and a graph would do so at its own too"
    elif config.position == "learned" and config.embedding.resize == "bicubic_offset":
        why = "its positions are resized by DINOv2's rule 'bicubic_offset', which is another at the own size"
    if why:
        raise VitralError(f"the model is exported for one size alone: {why}; export once for each --img-size")
