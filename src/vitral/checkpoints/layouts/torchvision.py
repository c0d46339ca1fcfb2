"""torchvision's `vit_*` state dicts."""

from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.layouts import preprocessing
from vitral.checkpoints.layouts.key_table import UNBATCHED, Row, layer_modules, modules, row, without
from vitral.checkpoints.layouts.labels import assumed_labels
from vitral.checkpoints.layouts.layout import (
    RawCheckpoint,
    Reading,
    Writing,
    count_layers,
    square,
    usual_heads,
)
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.errors import VitralError

ARGUMENTS_FILE = "vision_transformer.json"


_LAYER = "encoder.layers.encoder_layer_{i}."


def rows(config: ViTConfig) -> list[Row]:
    del config
    return [
        row("embedding.class_token", "class_token"),
        row("embedding.positions.table", "encoder.pos_embedding", UNBATCHED),
        *modules(
            {
                "embedding.patches.projection": "conv_proj",
                "norm": "encoder.ln",
                "hidden.0": "heads.pre_logits",
                "head": "heads.head",
            }
        ),
        row("layers.{i}.attention.qkv.{p}", f"{_LAYER}self_attention.in_proj_{{p}}"),
        *layer_modules(_LAYER, "ln_1", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3"),
        # As named before torchvision 0.13.
        *layer_modules(_LAYER, "ln_1", "self_attention.out_proj", "ln_2", "mlp.linear_1", "mlp.linear_2"),
    ]


def recognizes(raw: RawCheckpoint) -> bool:
    return "conv_proj.weight" in raw.weights and "encoder.pos_embedding" in raw.weights


def read(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    weights, block = raw.weights, "encoder.layers.encoder_layer_{i}"
    width, channels, patch, _ = weights.shape("conv_proj.weight")
    side = square(weights.shape("encoder.pos_embedding")[1] - 1)
    depth = count_layers(weights, f"{block}.ln_1.weight")
    expand = next(
        (n for n in ("mlp.0", "mlp.linear_1") if f"{block}.{n}.weight".format(i=0) in weights), None
    )
    if side is None or depth == 0 or expand is None:
        raise VitralError(f"{raw.name} looks like torchvision's ViT, but positions or layers are not its")
    classes = weights.shape("heads.head.weight")[0] if "heads.head.weight" in weights else 0
    hidden = "heads.pre_logits.weight"
    return Reading(
        {
            "img_size": side * patch,
            "patch_size": patch,
            "in_channels": channels,
            "embed_dim": width,
            "num_layers": depth,
            "num_heads": usual_heads(raw, width, asked),
            "mlp_ratio": weights.shape(f"{block}.{expand}.weight".format(i=0))[0] / width,
            "num_classes": classes,
            "dropout": 0.0,
            "embedding": {"resize": "bicubic_corners"},
            "head": {"hidden_dim": weights.shape(hidden)[0] if hidden in weights else None},
        },
        rows,
        weights,
        lambda img_size: preprocessing.torchvision(img_size, width, patch),
        assumed_labels(raw, classes),
    )


def write(checkpoint: Checkpoint) -> Writing:
    """Makes ``model.pth``, a state dict, and the arguments of the `VisionTransformer` that loads it."""
    config = checkpoint.model.config
    height, width = height_and_width(config.img_size)
    arguments = {
        "image_size": height,
        "patch_size": config.patch_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "hidden_dim": config.embed_dim,
        "mlp_dim": config.hidden_dim,
        "num_classes": config.num_classes,
        "representation_size": config.head.hidden_dim,
    }
    if height != width:
        raise VitralError(f"torchvision's ViT takes square images; this model's are {height}x{width}")
    if config.in_channels != 3:
        raise VitralError(f"torchvision's ViT takes 3 channels; this model takes {config.in_channels}")
    if not config.num_classes:
        raise VitralError("torchvision's ViT has a head; this model has none")
    return Writing(without(rows(config), "linear_"), "model.pth", {ARGUMENTS_FILE: arguments})
