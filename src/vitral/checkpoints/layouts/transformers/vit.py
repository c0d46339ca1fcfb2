"""ViT, DeiT, MAE, MSN, I-JEPA, BEiT and data2vec: ``encoder.layer.{i}.attention.attention.query``."""

from vitral.checkpoints.formats.weights import Weights
from vitral.checkpoints.layouts.key_table import (
    UNBATCHED,
    Row,
    layer_modules,
    layer_scales,
    modules,
    row,
    separate_qkv,
)
from vitral.checkpoints.layouts.layout import Draft
from vitral.checkpoints.layouts.transformers.style import Config, Style, has_head
from vitral.model.config import ViTConfig

_LAYER = "encoder.layer.{i}."
_ATTENTION = f"{_LAYER}attention.attention."
_MODULES = {
    "embedding.patches.projection": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "pooled_norm": "pooler.layernorm",
    "hidden.0": "pooler.dense",
    "head": "classifier",
    "distillation_head": "distillation_classifier",
}
_BEITS = ("beit", "data2vec-vision")


def _rows(config: ViTConfig) -> list[Row]:
    shared = config.layer.attention.relative_bias == "shared"
    table = "relative_position_bias.relative_position_bias_table"
    return [
        row("embedding.class_token", "embeddings.cls_token"),
        row("embedding.distillation_token", "embeddings.distillation_token"),
        row("embedding.positions.table", "embeddings.position_embeddings", UNBATCHED),
        *modules(_MODULES),
        *modules({"head": "cls_classifier"}),
        *layer_modules(
            _LAYER,
            "layernorm_before",
            "attention.output.dense",
            "layernorm_after",
            "intermediate.dense",
            "output.dense",
        ),
        *separate_qkv(*(_ATTENTION + x for x in ("query", "key", "value"))),
        *layer_scales(f"{_LAYER}lambda_1", f"{_LAYER}lambda_2"),
        *([row("relations.0.table", f"encoder.{table}")] if shared else []),
        row("relations.{i}.table", _ATTENTION + table),
    ]


def _read(config: Config, kind: str, weights: Weights) -> Draft:
    draft = _read_beit(config, weights) if kind in _BEITS else {}
    if kind in ("vit", "deit") and "pooler.dense.weight" in weights and not has_head(weights):
        draft["head"] = {"hidden_dim": weights.shape("pooler.dense.weight")[0]}
    if kind == "deit":
        second = "distillation_classifier.weight" in weights
        draft["head"] = {**draft.get("head", {}), "distillation_head": second}
    return draft


def _read_beit(config: Config, weights: Weights) -> Draft:
    relative = "none"
    if config.get("use_relative_position_bias"):
        relative = "layer"
    elif config.get("use_shared_relative_position_bias"):
        relative = "shared"
    absolute = bool(config.get("use_absolute_position_embeddings"))
    scale = config.get("layer_scale_init_value", 0.1)
    draft: Draft = {
        "position": "learned" if absolute else "none",
        "layer": {"layer_scale": scale or None, "attention": {"relative_bias": relative}},
    }
    if "pooler.layernorm.weight" in weights:
        draft |= {"pooling": "mean", "head": {"norm": "pooled"}}
    elif "layernorm.weight" not in weights:
        draft["head"] = {"norm": "none"}
    return draft


def _write(config: ViTConfig, kind: str) -> Draft:
    if kind not in _BEITS:
        hidden = {"pooler_output_size": config.head.hidden_dim} if config.head.hidden_dim else {}
        return {"qkv_bias": config.layer.attention.biases == "qkv", **hidden}
    relative = config.layer.attention.relative_bias
    return {
        "use_relative_position_bias": relative == "layer",
        "use_shared_relative_position_bias": relative == "shared",
        "use_absolute_position_embeddings": config.position == "learned",
        "use_mask_token": False,
        "use_mean_pooling": config.pooling == "mean" or config.head.norm == "none",
        "layer_scale_init_value": config.layer.layer_scale or 0,
    }


STYLE = Style(
    _rows,
    _read,
    ignored=lambda draft: r"^pooler\.dense\." if draft["head"].get("hidden_dim") is None else "(?!)",
    write=_write,
    unused=lambda config: r"^classifier" if config.head.distillation_head else r"^cls_classifier",
)
