"""timm's key table."""

from vitral.checkpoints.layouts.key_table import (
    QV,
    UNBATCHED,
    Row,
    cut,
    joined,
    modules,
    row,
    separate_qkv,
    stacked,
)
from vitral.model.config import ViTConfig

_OURS, _THEIRS = "layers.{i}.", "blocks.{i}."


def rows(config: ViTConfig) -> list[Row]:
    return [
        row("embedding.class_token", "cls_token"),
        row("embedding.distillation_token", "dist_token"),
        row("embedding.register_tokens", "reg_token"),
        row("embedding.positions.table", "pos_embed", UNBATCHED),
        *modules(
            {
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
        ),
        row("attention_pool.query", "attn_pool.latent"),
        row("attention_pool.qkv.{p}", ["attn_pool.q.{p}", "attn_pool.kv.{p}"], joined(1, 2)),
        *_relation_rows(config),
        *(_parallel_rows(config) if config.layer.order == "parallel" else []),
        *_layer_rows(),
    ]


def _layer_rows() -> list[Row]:
    attention, theirs = f"{_OURS}attention", f"{_THEIRS}attn"
    return [
        *modules(
            {
                "attention_norm": "norm1",
                "attention.qkv": "attn.qkv",
                "attention.q_norm": "attn.q_norm",
                "attention.k_norm": "attn.k_norm",
                "attention.norm": "attn.norm",
                "attention.out": "attn.proj",
                "feed_forward_norm": "norm2",
                "feed_forward.expand": "mlp.fc1",
                "feed_forward.norm": "mlp.norm",
                "feed_forward.contract": "mlp.fc2",
            },
            _OURS,
            _THEIRS,
        ),
        *separate_qkv(attention, *(f"{theirs}.{x}_proj" for x in "qkv")),
        row(f"{attention}.qv_bias", [f"{theirs}.{x}_bias" for x in "qv"], QV),
        row(
            f"{_OURS}feed_forward.expand.{{p}}",
            [f"{_THEIRS}mlp.fc1_{part}.{{p}}" for part in ("g", "x")],
            joined(1, 1),
        ),
        row(f"{_OURS}attention_scale.gamma", f"{_THEIRS}ls1.gamma"),
        row(f"{_OURS}attention_scale.gamma", f"{_THEIRS}gamma_1"),
        row(f"{_OURS}feed_forward_scale.gamma", f"{_THEIRS}ls2.gamma"),
        row(f"{_OURS}feed_forward_scale.gamma", f"{_THEIRS}gamma_2"),
    ]


def _relation_rows(config: ViTConfig) -> list[Row]:
    """BEiT's tables of relative places, of all layers or of each, and RoPE-Mixed's frequencies."""
    shared = config.layer.attention.relative_bias == "shared"
    frequencies = [f"relations.{i}.frequencies" for i in range(config.num_layers)]
    return [
        *([row("relations.0.table", "rel_pos_bias.relative_position_bias_table")] if shared else []),
        row("relations.{i}.table", f"{_THEIRS}attn.relative_position_bias_table"),
        row(frequencies, "rope.freqs", stacked(axis=1)),
    ]


def _parallel_rows(config: ViTConfig) -> list[Row]:
    """`ParallelScalingBlock`: one product for the MLP's hidden layer and q, k, v."""
    both = [f"{_OURS}feed_forward.expand", f"{_OURS}attention.qkv"]
    sizes = cut([config.hidden_dim, 3 * config.embed_dim])
    return [
        *modules(
            {
                "attention_norm": "in_norm",
                "attention.q_norm": "q_norm",
                "attention.k_norm": "k_norm",
                "attention.out": "attn_out_proj",
                "feed_forward.contract": "mlp_out_proj",
            },
            _OURS,
            _THEIRS,
        ),
        row([f"{name}.weight" for name in both], f"{_THEIRS}in_proj.weight", sizes),
        row([f"{name}.bias" for name in both], f"{_THEIRS}in_proj.bias", sizes),
        row(f"{_OURS}feed_forward.expand.bias", f"{_THEIRS}mlp_bias"),
        row(f"{_OURS}attention_scale.gamma", f"{_THEIRS}ls.gamma"),
    ]
