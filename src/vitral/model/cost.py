"""What a model costs: each stage's shape, parameters and FLOPs, and what the patch size changes."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitral.model.config import ViTConfig, height_and_width
from vitral.model.merging import Merge, merging_in
from vitral.model.positions.relation import Relation
from vitral.model.vit import VisionTransformer

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


def stages(config: ViTConfig, merge: Merge | None = None) -> list[Stage]:
    """The stages of a model in order: the embedding's parts, relations, layers, norms, pool and heads.

    Args:
        config: the model's.
        merge: patches that merge in each layer (`merging.plan`), which leave fewer tokens to the next.

    Raises:
        ValueError: if tokens of such a model cannot merge so.
    """
    model = _on_meta(config, merge)
    modules = dict(model.named_modules())
    names = [
        *("embedding.stem", "embedding.patches", "embedding"),
        *(f"{part}.{index}" for part in ("relations", "layers") for index in range(config.num_layers)),
        *("norm", "attention_pool", "pooled_norm", "hidden", "head", "distillation_head"),
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    wanted = [name for name in names if not isinstance(modules.get(name), nn.Identity | None)]
    for name in wanted:
        modules[name].register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: _shape(output)})
        )
    flops = _flops(model, config)
    found = [Stage(name, shapes[name], _parameters(modules[name]), flops.get(name, 0)) for name in wanted]
    # The class token and positions: what its parts, listed before it, leave.
    whole = wanted.index("embedding")
    rest = found[whole].parameters - sum(part.parameters for part in found[:whole])
    found[whole] = replace(found[whole], name="embedding.class_token + positions", parameters=rest, flops=0)
    return found


def _shape(output: Tensor | Relation) -> tuple[int, ...]:
    """For one image; what attention knows of places is the same for every one."""
    if isinstance(output, Tensor):
        return tuple(output.shape[1:])
    known = output.bias_ATT if output.rotation is None else output.rotation.cos
    assert known is not None
    return tuple(known.shape)


def patch_costs(
    config: ViTConfig,
    seconds_an_image: Callable[[ViTConfig], float] | None,
    merge: Merge | None = None,
) -> list[PatchCost]:
    """Gives the cost at each of `PATCH_SIZES` that the model can have; timed if a clock is given."""
    wanted = (replace(config, patch_size=size) for size in sorted({*PATCH_SIZES, config.patch_size}))
    return [_patch_cost(other, seconds_an_image, merge) for other in wanted if _can_be_built(other)]


def _can_be_built(config: ViTConfig) -> bool:
    """False if the patch does not divide the image, the stem the patch, or heads outnumber neighbours."""
    try:
        _on_meta(config)
    except ValueError:
        return False
    return True


def _patch_cost(
    config: ViTConfig, seconds_an_image: Callable[[ViTConfig], float] | None, merge: Merge | None
) -> PatchCost:
    rows, columns = config.grid_size
    counts = merging_in(_on_meta(config, merge).merge or [0] * config.num_layers, rows * columns)
    tokens_of_layers = accumulate(
        counts[:-1], operator.sub, initial=config.num_prefix_tokens + rows * columns
    )
    attention = sum(4 * tokens**2 * config.embed_dim for tokens in tokens_of_layers)
    total = sum(stage.flops for stage in stages(config, merge))
    milliseconds = None if seconds_an_image is None else 1e3 * seconds_an_image(config)
    return PatchCost(config.patch_size, rows * columns, attention, total - attention, milliseconds)


class _Whole(VisionTransformer):
    """With all of the last layer, as papers count, whatever the head reads of it."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.classify(self.encode(self.embedding(images_BCHW)))


def _on_meta(config: ViTConfig, merge: Merge | None = None) -> VisionTransformer:
    with torch.device("meta"):
        model = _Whole.from_config(config).eval()
    model.merge_tokens(merge)
    return model


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
