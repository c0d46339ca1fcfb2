"""torchvision's `vit_*` state dicts."""

from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.layouts.layout import (
    IMAGENET,
    Checkpoint,
    Reading,
    Source,
    Writing,
    count_layers,
    labels_of,
    square,
    usual_heads,
)
from vitral.checkpoints.layouts.tables import UNBATCHED, Row, row
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.errors import VitralError

NAME = "torchvision"
ARGUMENTS_FILE = "vision_transformer.json"


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
        lambda img_size: _preprocess(img_size, width, patch),
        labels_of(source, classes),
    )


def _preprocess(img_size: tuple[int, int], width: int, patch: int) -> Preprocess:
    """Of the weights that torchvision publishes: at 224 px trained there, above from SWAG end to end.

    SWAG's linear probes are of 224 px too, and only H/14, which was not trained there, is told apart.
    """
    if img_size == (224, 224) and patch != 14:
        resized = 242 if (width, patch) == (1024, 16) else 256
        return Preprocess(img_size, crop_fraction=224 / resized, interpolation="bilinear", **IMAGENET)
    return Preprocess(img_size, interpolation="bicubic", **IMAGENET)


def write(checkpoint: Checkpoint) -> Writing:
    """``model.pth``, a state dict, and the arguments of the `VisionTransformer` that loads it."""
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
    unused = [r for r in rows(config) if "linear_" in r.theirs[0]]
    written = [r for r in rows(config) if r not in unused]
    return Writing(written, "model.pth", {ARGUMENTS_FILE: arguments})
