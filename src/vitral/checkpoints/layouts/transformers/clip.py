"""CLIP, SigLIP and SigLIP 2: ``encoder.layers.{i}.self_attn.q_proj``, the vision tower of two."""

from dataclasses import replace

from vitral.checkpoints.formats.weights import Weights
from vitral.checkpoints.layouts.key_table import VECTOR, Row, each, layer_modules, modules, row, separate_qkv
from vitral.checkpoints.layouts.layout import Draft
from vitral.checkpoints.layouts.transformers.style import Config, Style
from vitral.model.config import ViTConfig

_LAYER = "encoder.layers.{i}."
_MODULES = {
    "embedding.patches.projection": "embeddings.patch_embedding",
    "embedding.norm": "pre_layrnorm",
    "norm": "post_layernorm",
    "attention_pool.out": "head.attention.out_proj",
    "attention_pool.norm": "head.layernorm",
    "attention_pool.feed_forward.expand": "head.mlp.fc1",
    "attention_pool.feed_forward.contract": "head.mlp.fc2",
    "head": "visual_projection",
}


def _rows(config: ViTConfig) -> list[Row]:
    del config
    return [
        row("embedding.class_token", "embeddings.class_embedding", VECTOR),
        row("embedding.positions.table", "embeddings.position_embedding.weight"),
        row("attention_pool.query", "head.probe"),
        row("attention_pool.qkv.{p}", "head.attention.in_proj_{p}"),
        *modules(_MODULES),
        *modules({"head": "classifier"}),
        *layer_modules(_LAYER, "layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        *separate_qkv(*(f"{_LAYER}self_attn.{x}_proj" for x in "qkv")),
    ]


def _siglip2_rows(config: ViTConfig) -> list[Row]:
    """SigLIP 2 maps flattened patches, ordered row, column, channel."""
    p = config.patch_size
    flattened = each(
        lambda x: x.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2), lambda x: x.permute(0, 2, 3, 1).flatten(1)
    )
    patches = row("embedding.patches.projection.weight", "embeddings.patch_embedding.weight", flattened)
    return [patches, *_rows(config)]


def _read(config: Config, kind: str, weights: Weights) -> Draft:
    del config
    classifier = "classifier.weight" in weights
    if kind == "clip_vision_model":
        # Its classifier is on the mean of patch tokens as the last layer left them.
        mean = {"pooling": "mean", "embedding": {"class_token": True}, "head": {"norm": "none", "bias": True}}
        return mean if classifier else {}
    return {"pooling": "mean"} if classifier or "head.probe" not in weights else {}


def _ignored(draft: Draft) -> str:
    if draft["pooling"] != "mean":
        return "(?!)"
    return r"^head\.|^post_layernorm\." if draft["head"]["norm"] == "none" else r"^head\."


def _write(config: ViTConfig, kind: str) -> Draft:
    if kind == "clip_vision_model":
        return {"projection_dim": config.num_classes} if config.num_classes else {}
    return {"vision_use_head": config.pooling == "map"}


STYLE = Style(
    _rows,
    _read,
    _ignored,
    _write,
    unused=lambda config: r"^classifier" if config.pooling == "class" else r"^visual_projection",
    processor="CLIPImageProcessor",
)
SIGLIP2 = replace(STYLE, rows=_siglip2_rows)
