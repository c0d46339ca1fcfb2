"""torchvision's `vit_*` state dicts."""

from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.layout import (
    IMAGENET,
    Reading,
    Source,
    count_layers,
    imagenet_labels,
    square,
    usual_heads,
)
from vitral.checkpoints.tables import UNBATCHED, Row, row
from vitral.errors import VitralError
from vitral.model import ViTConfig
from vitral.preprocess import Preprocess

NAME = "torchvision"


def rows(config: ViTConfig) -> list[Row]:
    del config
    ours, theirs = "layers.{i}", "encoder.layers.encoder_layer_{i}"
    return [
        row("embedding.class_token", "class_token"),
        row("embedding.patches.projection.{p}", "conv_proj.{p}"),
        row("embedding.positions.table", "encoder.pos_embedding", UNBATCHED),
        row(f"{ours}.attention_norm.{{p}}", f"{theirs}.ln_1.{{p}}"),
        row(f"{ours}.attention.qkv.{{p}}", f"{theirs}.self_attention.in_proj_{{p}}"),
        row(f"{ours}.attention.out.{{p}}", f"{theirs}.self_attention.out_proj.{{p}}"),
        row(f"{ours}.feed_forward_norm.{{p}}", f"{theirs}.ln_2.{{p}}"),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{theirs}.mlp.0.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{theirs}.mlp.3.{{p}}"),
        # As named before torchvision 0.13.
        row(f"{ours}.feed_forward.expand.{{p}}", f"{theirs}.mlp.linear_1.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{theirs}.mlp.linear_2.{{p}}"),
        row("norm.{p}", "encoder.ln.{p}"),
        row("hidden.0.{p}", "heads.pre_logits.{p}"),
        row("head.{p}", "heads.head.{p}"),
    ]


def recognises(source: Source) -> bool:
    return "conv_proj.weight" in source.weights and "encoder.pos_embedding" in source.weights


def read(source: Source, asked: Mapping[str, Any]) -> Reading:
    weights, block = source.weights, "encoder.layers.encoder_layer_{i}"
    width, channels, patch, _ = weights.shape("conv_proj.weight")
    side = square(weights.shape("encoder.pos_embedding")[1] - 1)
    depth = count_layers(weights, f"{block}.ln_1.weight")
    expand = next(
        (n for n in ("mlp.0", "mlp.linear_1") if f"{block}.{n}.weight".format(i=0) in weights), None
    )
    if side is None or depth == 0 or expand is None:
        raise VitralError(f"{source.name} looks like torchvision's ViT, but positions or layers are not its")
    classes = weights.shape("heads.head.weight")[0] if "heads.head.weight" in weights else 0
    hidden = "heads.pre_logits.weight"
    return Reading(
        {
            "img_size": side * patch,
            "patch_size": patch,
            "in_channels": channels,
            "embed_dim": width,
            "num_layers": depth,
            "num_heads": usual_heads(source, width, asked),
            "mlp_ratio": weights.shape(f"{block}.{expand}.weight".format(i=0))[0] / width,
            "num_classes": classes,
            "dropout": 0.0,
            "embedding": {"resize": "bicubic_corners"},
            "head": {"hidden_dim": weights.shape(hidden)[0] if hidden in weights else None},
        },
        rows,
        weights,
        _preprocess,
        imagenet_labels(classes),
    )


def _preprocess(img_size: tuple[int, int]) -> Preprocess:
    """Of the weights that torchvision publishes: at 224 px trained there, above from SWAG end to end."""
    if img_size == (224, 224):
        return Preprocess(img_size, crop_fraction=224 / 256, interpolation="bilinear", **IMAGENET)
    return Preprocess(img_size, interpolation="bicubic", **IMAGENET)
