"""What a model costs: each stage's shape, parameters and FLOPs, and what the patch size changes."""

import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitral.blocks import height_and_width
from vitral.devices import Placement
from vitral.model import VisionTransformer, ViTConfig

PATCH_SIZES = (8, 14, 16, 32)


@dataclass(frozen=True)
class Stage:
    """One step of the forward pass, for one image; FLOPs count a multiplication and an addition as two."""

    name: str
    shape: tuple[int, ...]  # of the output
    parameters: int
    flops: int


@dataclass(frozen=True)
class PatchCost:
    """One image through the same encoder with another patch size."""

    patch_size: int
    patches: int  # N
    attention_flops: int  # O(N^2 D): q k^T and the mixing of values
    linear_flops: int  # O(N D^2): everything else
    milliseconds: float | None  # measured here; None if not asked for


def stages(config: ViTConfig) -> list[Stage]:
    """The stages of a model, the embedding's parts, each layer, norm and head, in order."""
    model = _on_meta(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    flops = _flops(model, config)
    wanted = ["embedding.stem", "embedding.patches", "embedding"]
    wanted += [f"layers.{index}" for index in range(config.num_layers)] + ["norm", "head"]
    named = {name: module for name, module in model.named_modules() if name in wanted}
    found = []
    for name in wanted:
        module = named[name]
        parameters, own_flops = _parameters(module), flops.get(name, 0)
        if name == "embedding":
            # The class token and positions: what its parts, listed above, leave.
            parameters -= sum(_parameters(named[f"embedding.{part}"]) for part in ("stem", "patches"))
            own_flops, name = 0, "embedding.class_token + positions"
        if not isinstance(module, nn.Identity):
            shape = shapes["embedding" if name.startswith("embedding.class") else name]
            found.append(Stage(name, shape[1:], parameters, own_flops))
    return found


def patch_costs(config: ViTConfig, placement: Placement | None) -> list[PatchCost]:
    """The cost at each of `PATCH_SIZES` that divides the image; timed if a placement is given."""
    height, width = height_and_width(config.img_size)
    sizes = sorted({*PATCH_SIZES, config.patch_size})
    reduction = 2 ** len(config.stem)
    return [
        _patch_cost(replace(config, patch_size=size), placement)
        for size in sizes
        if not (height % size or width % size or size % reduction)
    ]


def _patch_cost(config: ViTConfig, placement: Placement | None) -> PatchCost:
    rows, columns = config.grid
    tokens = rows * columns + config.prefix
    attention = 4 * tokens**2 * config.embed_dim * config.num_layers
    total = sum(stage.flops for stage in stages(config))
    milliseconds = None if placement is None else 1e3 * _seconds_an_image(config, placement)
    return PatchCost(config.patch_size, rows * columns, attention, total - attention, milliseconds)


def _on_meta(config: ViTConfig) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer.from_config(config).eval()


def _flops(model: VisionTransformer, config: ViTConfig) -> dict[str, int]:
    images = torch.empty(1, config.in_channels, *height_and_width(config.img_size), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    prefix = f"{type(model).__name__}."
    return {
        name.removeprefix(prefix): sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
    }


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.inference_mode()
def _seconds_an_image(config: ViTConfig, placement: Placement, budget_seconds: float = 2.0) -> float:
    """The best of several single-image passes with random weights."""
    with placement.device:
        model = VisionTransformer.from_config(config).eval()
        images = torch.randn(1, config.in_channels, *height_and_width(config.img_size))
    best, began_at = float("inf"), time.monotonic()
    while time.monotonic() - began_at < budget_seconds or best == float("inf"):
        started_at = time.monotonic()
        with placement.autocast():
            model(images).sum().item()  # .item() waits for the device
        best = min(best, time.monotonic() - started_at)
    return best
