"""From the pixels of images to logits and probabilities, as one program that every format is made of."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from vitral.inference.classifier import Classifier
from vitral.model.kernels import PORTABLE, set_kernels
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

INPUTS, OUTPUTS = ("pixels",), ("logits", "probabilities")


class PixelsModel(nn.Module):
    """uint8 RGB (B, H, W, 3) -> logits (B, L) and probabilities (B, L), float32: all that `predict` computes.

    What the host does before is decoding, turning, resizing and cropping, or `picture.picture_model`.

    Args:
        classifier: whose model (of `portable`), mean, std and temperature are taken.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier.model
        preprocess = classifier.preprocess
        self.channels, self.temperature = preprocess.channels, classifier.temperature
        self.multi_label = classifier.multi_label
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocess, name)).view(-1, 1, 1))

    @staticmethod
    def portable(model: nn.Module) -> nn.Module:
        """A copy in float32 on the CPU, with kernels that every exporter knows."""
        found = copy.deepcopy(model).to("cpu", torch.float32).eval()
        set_kernels(found, PORTABLE)
        # Attention whose bias depends on weights that learn cannot be written as ONNX.
        return found.requires_grad_(requires_grad=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        logits_BL = self.model(self.images(pixels)).float()
        return logits_BL, self.probabilities(logits_BL)

    def images(self, pixels: Tensor) -> Tensor:
        """What the model takes: (B, H, W, 3) bytes -> (B, C, H, W)."""
        pixels_BCHW = pixels[..., : self.channels].permute(0, 3, 1, 2).float()
        return (pixels_BCHW / 255 - self.mean) / self.std

    def probabilities(self, logits_BL: Tensor) -> Tensor:
        scaled_BL = logits_BL / self.temperature
        return scaled_BL.sigmoid() if self.multi_label else scaled_BL.softmax(dim=1)


def exported(module: PixelsModel, img_size: tuple[int, int], *, any_size: bool = False) -> ExportedProgram:
    """Traces a model for batches of any size, and if asked for images of any size.

    Args:
        module: what to trace.
        img_size: height and width of its images.
        any_size: for every height and width that the patch divides.

    Raises:
        VitralError: if the model cannot be traced, or is right at its own size alone.
    """
    height, width = img_size
    dimensions: dict[int, Any] = {0: Dim("batch", min=1)}
    if any_size:
        refuse_one_size(module.model)
        patch = module.model.config.patch_size
        # Torch's own antialiased resize to a single column is wrong (docs/log.md, 2026-11-27).
        dimensions |= {1: patch * Dim("rows", min=2), 2: patch * Dim("columns", min=2)}
        # Of two sides that are the same, torch would make one symbol.
        height, width = height + patch, width + 2 * patch
    # Two images: of one, torch takes the batch for a constant.
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=(dimensions,))
    except Exception as error:
        raise VitralError(
            f"{type(module.model).__name__} cannot be exported; torch.export says: {first_line(error)}"
        ) from error
    # From which lines of which files of this machine it came is nobody's business.
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def first_line(error: Exception) -> str:
    """What an exporter says, whose messages go on for pages."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__} {next(filter(None, lines), '')}"


def refuse_one_size(model: nn.Module) -> None:
    """Raises VitralError if a graph for any size would not be the model at every size."""
    if not isinstance(model, VisionTransformer):
        raise VitralError(
            f"a {type(model).__name__} is exported for one size alone: only Vitral's own models are known to "
            "be right at others; export once for each size"
        )
    config = model.config
    attention = config.layer.attention
    why = None
    if attention.relative_bias != "none" and attention.relative_resize == "geometric":
        why = "its relative positions are resized by a search, which no graph can do (the rule 'geometric')"
    elif config.position == "learned" and config.embedding.resize == "bicubic_offset":
        why = "the rule of its positions, DINOv2's 'bicubic_offset', is another at the model's own size"
    if why:
        raise VitralError(f"the model is exported for one size alone: {why}; export once for each --img-size")
