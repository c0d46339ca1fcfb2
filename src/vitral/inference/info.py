"""`info`: what a model is, stage by stage, and what its patch size costs."""

import time
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

import torch

from vitral.checkpoints.folder import Checkpoint, is_checkpoint, load_checkpoint
from vitral.model.config import ViTConfig, height_and_width
from vitral.model.cost import PatchCost, Stage, patch_costs, stages
from vitral.model.merging import Merge
from vitral.model.variants import configure
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError


@dataclass(frozen=True)
class ModelInfo:
    """An architecture and what it costs; FLOPs and parameters are of one image at `config.img_size`."""

    name: str
    config: ViTConfig
    stages: tuple[Stage, ...] = field(repr=False)  # in the order in which an image goes through them
    patch_costs: tuple[PatchCost, ...] = field(repr=False)  # of the same model with other patch sizes
    checkpoint: Checkpoint | None = field(default=None, repr=False)  # None: a variant's name alone

    @property
    def parameters(self) -> int:
        return sum(stage.parameters for stage in self.stages)

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    def __repr__(self) -> str:
        flops = f"{self.flops / 1e9:.3g} GFLOPs per image"
        return f"<ModelInfo {self.name}: {self.parameters:,} parameters, {flops}>"


def info(
    model: str | PathLike,
    placement: Placement | None = None,
    *,
    merge: Merge | None = None,
    **overrides: Any,
) -> ModelInfo:
    """Describe a model: every stage with its shape, parameters and FLOPs, and what the patch size costs.

    Args:
        model: a variant's name, such as "ViT-B/16", or any checkpoint.
        placement: where to time an image for each patch size; None: nowhere.
        merge: patches that merge in each layer, as `load` takes it.
        overrides: fields of `ViTConfig`, such as ``img_size=384``.

    Raises:
        VitralError: if there is no such model, or an override does not fit it.
    """
    checkpoint = load_checkpoint(str(model), **overrides) if is_checkpoint(str(model)) else None
    config = checkpoint.model.config if checkpoint else configure(str(model), overrides)
    clock = None if placement is None else partial(seconds_an_image, placement=placement, merge=merge)
    try:
        found = tuple(stages(config, merge))
    except ValueError as error:
        raise VitralError(str(error)) from error
    return ModelInfo(str(model), config, found, tuple(patch_costs(config, clock, merge)), checkpoint)


@torch.inference_mode()
def seconds_an_image(
    config: ViTConfig, placement: Placement, budget_seconds: float = 2.0, merge: Merge | None = None
) -> float:
    """Measure the best of several passes of a single image, each with random weights."""
    with placement.device:
        model = placement.place(VisionTransformer.from_config(config)).eval()
        model.merge_tokens(merge)
        images = torch.randn(1, config.in_channels, *height_and_width(config.img_size))
    best, began_at = float("inf"), time.monotonic()
    while time.monotonic() - began_at < budget_seconds or best == float("inf"):
        started_at = time.monotonic()
        with placement.autocast():
            model(images).sum().item()  # .item() waits for the device
        best = min(best, time.monotonic() - started_at)
    return best
