"""From a model of ours to a folder that `timm.create_model` loads."""

import re
from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.layouts.key_table import Row, without
from vitral.checkpoints.layouts.layout import Draft, Writing
from vitral.checkpoints.layouts.timm.families import family_of
from vitral.checkpoints.layouts.timm.keys import rows
from vitral.checkpoints.layouts.timm.preprocessing import write_pretrained_cfg
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.settings import deep_merge

# Architectures that stand for what model_args, being JSON, cannot say: class, kind of block and MLP, eps.
# The first whose conditions hold is named; model_args then set all numbers.
_BASES: tuple[tuple[str, str, Draft], ...] = (
    ("beit", "beit_base_patch16_224", {"norm": {"eps": 1e-6}}),
    ("eva", "eva02_base_patch14_224", {"norm": {"eps": 1e-6}}),
    ("eva", "vit_base_patch16_dinov3", {"norm": {"eps": 1e-5}}),
    ("distilled", "deit_base_distilled_patch16_224", {"norm": {"eps": 1e-6}}),
    ("vit", "vit_base_patch16_xp_224", {"norm": {"kind": "rms"}, "layer": {"order": "parallel"}}),
    ("vit", "vit_pwee_patch16_reg1_gap_256", {"norm": {"kind": "layer"}, "layer": {"order": "parallel"}}),
    ("vit", "vit_base_patch16_rpn_224", {"layer": {"order": "residual_post"}}),
    ("vit", "aimv2_large_patch14_224", {"norm": {"kind": "rms"}, "embedding": {"patch_norm": True}}),
    ("vit", "vit_giant_patch14_dinov2", {"layer": {"feed_forward": {"gated": True}}}),
    ("vit", "vit_base_patch16_clip_224", {"norm": {"eps": 1e-5}}),
    ("vit", "vit_base_patch16_224", {}),
)  # fmt: skip
_SEPARATE_GATE = ("aimv2",)  # bases whose gated MLP keeps gate and value apart


def _class_of(config: ViTConfig) -> str:
    attention = config.layer.attention
    if attention.relative_bias != "none":
        return "beit"
    if attention.rotary or attention.biases == "qv":
        return "eva"
    return "distilled" if config.embedding.distillation_token else "vit"


def _has(config: Any, draft: Mapping[str, Any]) -> bool:
    return all(
        _has(getattr(config, name), value) if isinstance(value, Mapping) else getattr(config, name) == value
        for name, value in draft.items()
    )


def write(checkpoint: Checkpoint) -> Writing:
    """Makes a hub folder: ``config.json`` and ``model.safetensors``, which `timm.create_model` loads."""
    config, kind = checkpoint.model.config, _class_of(checkpoint.model.config)
    fitting = [name for k, name, draft in _BASES if k == kind and _has(config, draft)]
    # An eps that no architecture of that class has is the nearest one's; the certificate shows the cost.
    base = fitting[0] if fitting else next(name for k, name, _ in _BASES if k == kind)
    base = _origin(checkpoint, kind) or base
    arguments = _common_arguments(config) | _CLASS_ARGUMENTS[kind](config)
    return Writing(
        _written_rows(config, kind, base),
        "model.safetensors",
        {
            "config.json": {
                "architecture": base,
                "num_classes": config.num_classes,
                "num_features": config.embed_dim,
                "global_pool": arguments["global_pool"],
                "model_args": arguments,
                "pretrained_cfg": write_pretrained_cfg(checkpoint),
                **({"label_names": list(checkpoint.labels)} if checkpoint.labels else {}),
            }
        },
    )


_CLASS_NAMES = {
    "eva": r"^eva02_(tiny|small|base|large)_|^vit_\w+_dinov3",
    "beit": r"^beit",
    "vit": r"^vit_|^deit3?_",
}


def _origin(checkpoint: Checkpoint, kind: str) -> str | None:
    """Returns the architecture that the model came from, if it has what arguments cannot say."""
    name = checkpoint.metadata.get("origin", {}).get("architecture")
    if not isinstance(name, str) or not re.search(_CLASS_NAMES.get(kind, "(?!)"), name):
        return None
    told = {"norm": {"eps": 1e-6}, "layer": {"order": "pre"}, "num_heads": checkpoint.model.config.num_heads}
    return name if _has(checkpoint.model.config, deep_merge(told, family_of(name))) else None


def _written_rows(config: ViTConfig, kind: str, base: str) -> list[Row]:
    """Leaves out of the names that one tensor of ours may have in timm those of other classes."""
    separate = config.layer.feed_forward.gated and (
        base.startswith(_SEPARATE_GATE) or (kind in ("eva", "beit") and config.layer.feed_forward.norm)
    )
    unused = r"blocks\.\{i\}\.attn\.[qkv]_proj"
    unused += r"|\.ls\d\.gamma" if kind in ("eva", "beit") else r"|\.gamma_\d"
    unused += r"|mlp\.fc1\.\{p\}" if separate else r"|mlp\.fc1_"
    return without(rows(config), unused)


def _common_arguments(config: ViTConfig) -> Draft:
    hidden = config.hidden_dim
    return {
        "img_size": list(height_and_width(config.img_size)),
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "global_pool": {"class": "token", "mean": "avg", "map": "map"}.get(config.pooling, config.pooling),
        "embed_dim": config.embed_dim,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        # A little more than the ratio, which timm multiplies and rounds down.
        "mlp_ratio": (hidden + 0.01) / config.embed_dim,
        "qkv_bias": config.layer.attention.biases != "none",
        "init_values": config.layer.layer_scale,
    }


def _vit_arguments(config: ViTConfig) -> Draft:
    attention, feed_forward, embedding = config.layer.attention, config.layer.feed_forward, config.embedding
    packed = feed_forward.gated and not embedding.patch_norm
    arguments: Draft = {
        "qk_norm": attention.qk_norm,
        "scale_attn_norm": attention.norm,
        "scale_mlp_norm": feed_forward.norm,
        "proj_bias": attention.out_bias,
        "class_token": config.class_token,
        "pos_embed": "learn" if config.position == "learned" else "none",
        "no_embed_class": embedding.positioned == "patches",
        "reg_tokens": embedding.register_tokens,
        "pre_norm": embedding.norm,
        "final_norm": config.head.norm != "none",
        "fc_norm": config.head.norm == "pooled",
        "pool_include_prefix": config.head.pool_prefix,
        "act_layer": feed_forward.activation,
    }
    if packed:
        arguments["mlp_ratio"] = (2 * config.hidden_dim + 0.01) / config.embed_dim
    if config.norm.kind == "rms" and not embedding.patch_norm and config.layer.order != "parallel":
        arguments["norm_layer"] = "rmsnorm"
    if config.layer.order == "parallel":
        # Its blocks know no sub-norms, and take q, k, v and MLP biases from one argument.
        arguments["scale_attn_norm"] = arguments["scale_mlp_norm"] = False
    return arguments


def _distilled_arguments(config: ViTConfig) -> Draft:
    return {"qk_norm": config.layer.attention.qk_norm, "act_layer": config.layer.feed_forward.activation}


def _eva_arguments(config: ViTConfig) -> Draft:
    attention, feed_forward, embedding = config.layer.attention, config.layer.feed_forward, config.embedding
    rotary = attention.rotary
    arguments: Draft = {
        "qkv_fused": True,
        "qk_norm": attention.qk_norm,
        "swiglu_mlp": feed_forward.gated,
        "swiglu_align_to": 0,
        "scale_mlp": feed_forward.norm,
        "scale_attn_inner": attention.norm,
        "attn_type": "rope" if attention.biases == "qkv" else "eva",
        "class_token": config.class_token,
        "num_reg_tokens": embedding.register_tokens,
        "no_embed_class": embedding.positioned == "patches",
        "use_abs_pos_emb": config.position == "learned",
        "use_rot_pos_emb": rotary is not None,
        "use_post_norm": config.layer.order == "residual_post",
        "use_pre_transformer_norm": embedding.norm,
        "use_post_transformer_norm": config.head.norm == "tokens",
        "use_fc_norm": config.head.norm == "pooled",
        "attn_pool_num_heads": config.head.pool_heads,
        "attn_pool_mlp_ratio": config.head.pool_mlp_ratio,
        "dynamic_img_size": False,
    }
    if rotary is None:
        return arguments
    kind = {"axial": "cat", "mixed": "mixed"}[rotary.kind]
    return arguments | {
        "rope_type": "dinov3" if rotary.places == "centered" else kind,
        "rope_grid_offset": rotary.offset,
        "rope_grid_indexing": "xy" if rotary.column_first else "ij",
        "rope_temperature": rotary.temperature,
        "rope_rotate_half": rotary.halves,
        "ref_feat_shape": list(rotary.reference_grid) if rotary.reference_grid else None,
    }


def _beit_arguments(config: ViTConfig) -> Draft:
    return {
        "use_abs_pos_emb": config.position == "learned",
        "use_rel_pos_bias": config.layer.attention.relative_bias == "layer",
        "use_shared_rel_pos_bias": config.layer.attention.relative_bias == "shared",
        "scale_mlp": config.layer.feed_forward.norm,
        "swiglu_mlp": config.layer.feed_forward.gated,
        "use_fc_norm": config.head.norm == "pooled",
    }


_CLASS_ARGUMENTS = {
    "vit": _vit_arguments,
    "distilled": _distilled_arguments,
    "eva": _eva_arguments,
    "beit": _beit_arguments,
}
