"""ViT, DeiT, MAE, MSN, I-JEPA, BEiT and data2vec: ``encoder.layer.{i}.attention.attention.query``."""

from vitral.checkpoints.formats.weights import Weights
from vitral.checkpoints.layouts.key_table import UNBATCHED, Row, modules, row, separate_qkv
from vitral.checkpoints.layouts.layout import Draft
from vitral.checkpoints.layouts.transformers.style import Config, Style, has_head
from vitral.model.config import ViTConfig

_OURS, _THEIRS = "layers.{i}.", "encoder.layer.{i}."
_ATTENTION = f"{_THEIRS}attention.attention."
_BEITS = ("beit", "data2vec-vision")


def _rows(config: ViTConfig) -> list[Row]:
    shared = config.layer.attention.relative_bias == "shared"
    table = "relative_position_bias.relative_position_bias_table"
    return [
        row("embedding.class_token", "embeddings.cls_token"),
        row("embedding.distillation_token", "embeddings.distillation_token"),
        row("embedding.positions.table", "embeddings.position_embeddings", UNBATCHED),
        *modules(
            {
                "embedding.patches.projection": "embeddings.patch_embeddings.projection",
                "norm": "layernorm",
                "pooled_norm": "pooler.layernorm",
                "hidden.0": "pooler.dense",
                "head": "classifier",
                "distillation_head": "distillation_classifier",
            }
        ),
        *modules({"head": "cls_classifier"}),
        *modules(
            {
                "attention_norm": "layernorm_before",
                "attention.out": "attention.output.dense",
                "feed_forward_norm": "layernorm_after",
                "feed_forward.expand": "intermediate.dense",
                "feed_forward.contract": "output.dense",
            },
            _OURS,
            _THEIRS,
        ),
        *separate_qkv(f"{_OURS}attention", *(_ATTENTION + x for x in ("query", "key", "value"))),
        row(f"{_OURS}attention_scale.gamma", f"{_THEIRS}lambda_1"),
        row(f"{_OURS}feed_forward_scale.gamma", f"{_THEIRS}lambda_2"),
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
