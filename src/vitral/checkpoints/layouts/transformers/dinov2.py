"""DINOv2, with registers or without: ``encoder.layer.{i}.layer_scale1.lambda1``."""

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
from vitral.checkpoints.layouts.transformers.style import Config, Style
from vitral.model.config import ViTConfig
from vitral.runtime.errors import VitralError

_LAYER = "encoder.layer.{i}."
_WITH_REGISTERS = "dinov2_with_registers"


def _rows(config: ViTConfig) -> list[Row]:
    del config
    attention = f"{_LAYER}attention.attention."
    return [
        row("embedding.class_token", "embeddings.cls_token"),
        row("embedding.register_tokens", "embeddings.register_tokens"),
        row("embedding.positions.table", "embeddings.position_embeddings", UNBATCHED),
        *modules(
            {
                "embedding.patches.projection": "embeddings.patch_embeddings.projection",
                "norm": "layernorm",
                "head": "classifier",
            }
        ),
        *layer_modules(_LAYER, "norm1", "attention.output.dense", "norm2", "mlp.fc1", "mlp.fc2"),
        *layer_modules(
            _LAYER, "norm1", "attention.output.dense", "norm2", "mlp.weights_in", "mlp.weights_out"
        ),
        *separate_qkv(*(attention + x for x in ("query", "key", "value"))),
        *layer_scales(f"{_LAYER}layer_scale1.lambda1", f"{_LAYER}layer_scale2.lambda1"),
    ]


def _hidden_dim(embed_dim: int, mlp_ratio: float, *, gated: bool) -> int:
    """SwiGLU's hidden width is two thirds of the ratio's, rounded up to eights."""
    hidden = int(embed_dim * mlp_ratio)
    return (hidden * 2 // 3 + 7) // 8 * 8 if gated else hidden


def _read(config: Config, kind: str, weights: Weights) -> Draft:
    gated = bool(config.get("use_swiglu_ffn"))
    hidden = _hidden_dim(config["hidden_size"], config["mlp_ratio"], gated=gated)
    draft: Draft = {
        "mlp_ratio": hidden / config["hidden_size"],
        "layer": {
            "layer_scale": config.get("layerscale_value", 1.0),
            "feed_forward": {"gated": gated, **({"activation": "silu"} if gated else {})},
        },
    }
    if kind == _WITH_REGISTERS:
        draft["embedding"] = {"register_tokens": config["num_register_tokens"]}
    if "classifier.weight" in weights:
        draft["pooling"] = "class_mean"
    return draft


def _write(config: ViTConfig, kind: str) -> Draft:
    width, gated = config.embed_dim, config.layer.feed_forward.gated
    ratios = (r for r in range(1, 17) if _hidden_dim(width, r, gated=gated) == config.hidden_dim)
    ratio = next(ratios, None)
    if ratio is None:
        raise VitralError(
            f"transformers cannot hold this model: an MLP of width {config.hidden_dim} is none of DINOv2's "
            f"for embed_dim {width}"
        )
    # With registers, its class has a mask token whatever the config says.
    tokens = (
        {"num_register_tokens": config.embedding.register_tokens}
        if kind == _WITH_REGISTERS
        else {"use_mask_token": False}
    )
    return {
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "layerscale_value": config.layer.layer_scale,
        "qkv_bias": config.layer.attention.biases == "qkv",
        **tokens,
    }


def without_registers(draft: Draft) -> str:
    """Returns a pattern of the registers' key, which is saved even where there are none, with no numbers."""
    none = draft.get("embedding", {}).get("register_tokens") == 0
    return r"^embeddings\.register_tokens$" if none else "(?!)"


STYLE = Style(
    _rows,
    _read,
    without_registers,
    _write,
    unused=lambda config: r"mlp\.fc[12]" if config.layer.feed_forward.gated else r"weights_(in|out)",
    processor="BitImageProcessor",
)
