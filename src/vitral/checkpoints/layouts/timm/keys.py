"""timm's key table."""

from vitral.checkpoints.layouts.key_table import (
    QV,
    UNBATCHED,
    Row,
    cut,
    joined,
    layer_modules,
    layer_scales,
    modules,
    row,
    separate_qkv,
    stacked,
)
from vitral.model.config import ViTConfig

_OURS, _BLOCK = "layers.{i}.", "blocks.{i}."
_MODULES = {
    "embedding.patches.projection": "patch_embed.proj",
    "embedding.patch_norm": "patch_embed.norm",
    "embedding.norm": "norm_pre",
    "norm": "norm",
    "pooled_norm": "fc_norm",
    "attention_pool.out": "attn_pool.proj",
    "attention_pool.norm": "attn_pool.norm",
    "attention_pool.feed_forward.expand": "attn_pool.mlp.fc1",
    "attention_pool.feed_forward.contract": "attn_pool.mlp.fc2",
    "head": "head",
    "distillation_head": "head_dist",
}
_OPTIONAL = {
    "attention.qkv": "attn.qkv",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "attention.norm": "attn.norm",
    "feed_forward.norm": "mlp.norm",
}

_OF_PARALLEL = {
    "attention_norm": "in_norm",
    "attention.q_norm": "q_norm",
    "attention.k_norm": "k_norm",
    "attention.out": "attn_out_proj",
    "feed_forward.contract": "mlp_out_proj",
}


def rows(config: ViTConfig) -> list[Row]:
    gate_and_value = [f"{_BLOCK}mlp.fc1_{part}.{{p}}" for part in ("g", "x")]
    return [
        row("embedding.class_token", "cls_token"),
        row("embedding.distillation_token", "dist_token"),
        row("embedding.register_tokens", "reg_token"),
        row("embedding.positions.table", "pos_embed", UNBATCHED),
        *modules(_MODULES),
        row("attention_pool.query", "attn_pool.latent"),
        row("attention_pool.qkv.{p}", ["attn_pool.q.{p}", "attn_pool.kv.{p}"], joined(1, 2)),
        *_relation_rows(config),
        *(_parallel_rows(config) if config.layer.order == "parallel" else []),
        *layer_modules(_BLOCK, "norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
        *modules(_OPTIONAL, _OURS, _BLOCK),
        *separate_qkv(*(f"{_BLOCK}attn.{x}_proj" for x in "qkv")),
        row(f"{_OURS}attention.qv_bias", [f"{_BLOCK}attn.{x}_bias" for x in "qv"], QV),
        row(f"{_OURS}feed_forward.expand.{{p}}", gate_and_value, joined(1, 1)),
        *layer_scales(f"{_BLOCK}ls1.gamma", f"{_BLOCK}ls2.gamma"),
        *layer_scales(f"{_BLOCK}gamma_1", f"{_BLOCK}gamma_2"),
    ]


def _relation_rows(config: ViTConfig) -> list[Row]:
    """BEiT's tables of relative places, of all layers or of each, and RoPE-Mixed's frequencies."""
    shared = config.layer.attention.relative_bias == "shared"
    frequencies = [f"relations.{i}.frequencies" for i in range(config.num_layers)]
    return [
        *([row("relations.0.table", "rel_pos_bias.relative_position_bias_table")] if shared else []),
        row("relations.{i}.table", f"{_BLOCK}attn.relative_position_bias_table"),
        row(frequencies, "rope.freqs", stacked(axis=1)),
    ]


def _parallel_rows(config: ViTConfig) -> list[Row]:
    """`ParallelScalingBlock`: one product for the MLP's hidden layer and q, k, v."""
    both = [f"{_OURS}feed_forward.expand", f"{_OURS}attention.qkv"]
    sizes = cut([config.hidden_dim, 3 * config.embed_dim])
    return [
        *modules(_OF_PARALLEL, _OURS, _BLOCK),
        row([f"{name}.weight" for name in both], f"{_BLOCK}in_proj.weight", sizes),
        row([f"{name}.bias" for name in both], f"{_BLOCK}in_proj.bias", sizes),
        row(f"{_OURS}feed_forward.expand.bias", f"{_BLOCK}mlp_bias"),
        row(f"{_OURS}attention_scale.gamma", f"{_BLOCK}ls.gamma"),
    ]
