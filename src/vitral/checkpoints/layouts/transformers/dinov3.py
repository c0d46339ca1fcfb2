"""DINOv3: ``layer.{i}.attention.q_proj``, rotary positions."""

from vitral.checkpoints.formats.weights import Weights
from vitral.checkpoints.layouts.key_table import (
    Row,
    joined,
    layer_modules,
    layer_scales,
    modules,
    row,
    separate_qkv,
)
from vitral.checkpoints.layouts.layout import Draft
from vitral.checkpoints.layouts.transformers.dinov2 import without_registers
from vitral.checkpoints.layouts.transformers.style import Config, Style
from vitral.model.config import ViTConfig
from vitral.runtime.errors import VitralError

_LAYER = "layer.{i}."


def _rows(config: ViTConfig) -> list[Row]:
    del config
    gate_and_up = [f"{_LAYER}mlp.{x}_proj.{{p}}" for x in ("gate", "up")]
    return [
        row("embedding.class_token", "embeddings.cls_token"),
        row("embedding.register_tokens", "embeddings.register_tokens"),
        *modules({"embedding.patches.projection": "embeddings.patch_embeddings", "norm": "norm"}),
        row("layers.{i}.feed_forward.expand.{p}", gate_and_up, joined(1, 1)),
        *layer_modules(_LAYER, "norm1", "attention.o_proj", "norm2", "mlp.up_proj", "mlp.down_proj"),
        *separate_qkv(*(f"{_LAYER}attention.{x}_proj" for x in "qkv")),
        *layer_scales(f"{_LAYER}layer_scale1.lambda1", f"{_LAYER}layer_scale2.lambda1"),
    ]


def _read(config: Config, kind: str, weights: Weights) -> Draft:
    del kind, weights
    biased = "".join(
        letter
        for letter, name, default in (("q", "query", True), ("k", "key", False), ("v", "value", True))
        if config.get(f"{name}_bias", default)
    )
    if biased not in ("qkv", "qv", ""):
        raise VitralError(
            f"only {' and '.join(biased)} of q, k and v have biases; Vitral knows all, q and v, or none"
        )
    return {
        "embedding": {"register_tokens": config["num_register_tokens"]},
        "layer": {
            "layer_scale": config.get("layerscale_value", 1.0),
            "attention": {
                "biases": biased or "none",
                "out_bias": config.get("proj_bias", True),
                "rotary": {"temperature": config["rope_theta"]},
            },
            "feed_forward": {
                "gated": bool(config.get("use_gated_mlp")),
                "bias": config.get("mlp_bias", True),
            },
        },
    }


def _write(config: ViTConfig, kind: str) -> Draft:
    del kind
    attention, rotary = config.layer.attention, config.layer.attention.rotary
    return {
        "num_register_tokens": config.embedding.register_tokens,
        "layerscale_value": config.layer.layer_scale,
        "query_bias": attention.biases != "none",
        "key_bias": attention.biases == "qkv",
        "value_bias": attention.biases != "none",
        "proj_bias": attention.out_bias,
        "mlp_bias": config.layer.feed_forward.bias,
        "use_gated_mlp": config.layer.feed_forward.gated,
        "rope_theta": rotary.temperature if rotary else 100.0,
    }


STYLE = Style(
    _rows,
    _read,
    without_registers,
    _write,
    unused=lambda config: r"^(?!.*gate_proj).*up_proj" if config.layer.feed_forward.gated else r"gate_proj",
)
