"""The authors' own files: DINO, DINOv2, DINOv3, DeiT, MAE, I-JEPA; OpenAI's and OpenCLIP's ``visual.*``.

They carry no config. Most use timm's names, so a bare file in timm's layout is read here too.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from vitral.checkpoints.formats.weights import Renamed, Weights
from vitral.checkpoints.layouts import preprocessing
from vitral.checkpoints.layouts.key_table import (
    TRANSPOSED,
    VECTOR,
    Row,
    Transform,
    joined,
    layer_modules,
    layer_scales,
    modules,
    row,
)
from vitral.checkpoints.layouts.labels import assumed_labels
from vitral.checkpoints.layouts.layout import Draft, RawCheckpoint, Reading, count_layers, square, usual_heads
from vitral.checkpoints.layouts.preprocessing import assumed_note
from vitral.checkpoints.layouts.timm import keys as timm
from vitral.checkpoints.layouts.timm.shapes import read_shapes
from vitral.model.config import ViTConfig
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import deep_merge

OPEN_CLIP_FILE = "open_clip_config.json"


def recognizes(raw: RawCheckpoint) -> bool:
    return _family(raw.weights) is not None


def read(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    family = _family(raw.weights)
    assert family is not None
    return family(raw, asked)


def _family(weights: Weights) -> Callable[[RawCheckpoint, Mapping[str, Any]], Reading] | None:
    """Tells the families by keys that only they have."""
    if any(re.fullmatch(r"(visual\.)?(class_embedding|conv1\.weight)", name) for name in weights):
        return _read_clip
    if "storage_tokens" in weights or "rope_embed.periods" in weights:
        return _read_dinov3
    if "patch_embed.proj.weight" in weights and "mask_token" in weights and "pos_embed" in weights:
        return _read_dinov2
    if "patch_embed.proj.weight" in weights or "visual.trunk.patch_embed.proj.weight" in weights:
        return _read_timm_names
    return None


def _asked_size(asked: Mapping[str, Any]) -> tuple[int, int] | None:
    size = asked.get("img_size")
    return None if size is None or isinstance(size, int) else (size[0], size[1])


# --- timm's names: DINO, DeiT, MAE, I-JEPA ---------------------------------------------------------


def _read_timm_names(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    weights, trunk = raw.weights, "visual.trunk."
    if f"{trunk}patch_embed.proj.weight" in weights:
        weights = Renamed(weights, {n.removeprefix(trunk): n for n in weights if n.startswith(trunk)})
    raw = replace(raw, weights=weights)
    is_clip = "norm_pre.weight" in weights
    draft = deep_merge(
        read_shapes(raw, asked, _asked_size(asked)),
        {"embedding": {"resize": "bicubic"}, "norm": {"eps": 1e-5 if is_clip else 1e-6}},
        _clip_activation(raw, asked) if is_clip else {},
    )
    _require_rotary(raw, draft, asked)
    channels = draft["in_channels"]
    return Reading(
        draft,
        timm.rows,
        weights,
        (lambda size: preprocessing.clip(size, channels, raw.open_clip))
        if is_clip
        else (lambda size: preprocessing.dinov2(size, channels)),
        assumed_labels(raw, draft["num_classes"]),
        ignored=r"^(decoder|mask_token)|^head\.(mlp|last_layer)",
        notes=() if is_clip else assumed_note(raw, asked, "DINO, DeiT and MAE take, ImageNet's mean and std"),
    )


def _clip_activation(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Draft:
    """Reads CLIP's activation off OpenCLIP's config. Raises VitralError if nothing tells it."""
    if asked.get("layer", {}).get("feed_forward", {}).get("activation") is not None:
        return {}
    model = raw.open_clip.get("model_cfg")
    if not isinstance(model, Mapping):
        raise VitralError(
            f"{raw.name}: CLIP's weights do not say their activation; pass "
            "layer.feed_forward.activation=quick_gelu (OpenAI, DFN, MetaCLIP) or =gelu (LAION, DataComp)"
        )
    return {"layer": {"feed_forward": {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}}}


def _require_rotary(raw: RawCheckpoint, draft: Draft, asked: Mapping[str, Any]) -> None:
    """Raises VitralError about RoPE-ViT and EVA-02, whose angles are in no tensor, unless they are given."""
    layer = draft["layer"]
    placeless = draft["position"] == "none" and "relative_bias" not in layer["attention"]
    eva02 = layer["feed_forward"]["gated"] and layer["attention"]["biases"] == "qv"
    if (placeless or eva02) and "rotary" not in asked.get("layer", {}).get("attention", {}):
        raise VitralError(
            f"{raw.name}: a bare file does not describe rotary positions; load a hub folder, or pass "
            "layer.attention.rotary.kind=axial and its other settings"
        )


# --- DINOv2 ----------------------------------------------------------------------------------------


def _dinov2_rows(config: ViTConfig) -> list[Row]:
    ours, block = "layers.{i}", "blocks.{i}"
    return [
        row("embedding.register_tokens", "register_tokens"),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{block}.mlp.w12.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{block}.mlp.w3.{{p}}"),
        *timm.rows(config),
    ]


def _read_dinov2(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    weights = raw.weights
    aliases = {
        re.sub(r"mlp\.w12\.", "mlp.fc1.", re.sub(r"mlp\.w3\.", "mlp.fc2.", n)).replace(
            "register_tokens", "reg_token"
        ): n
        for n in weights
    }
    renamed = RawCheckpoint(raw.name, raw.path, Renamed(weights, aliases))
    registers = "register_tokens" in weights
    # Registers came with antialiasing and without the offset (their hub/backbones.py).
    resize = "bicubic_antialias" if registers else "bicubic_offset"
    draft = deep_merge(read_shapes(renamed, asked, _asked_size(asked)), {"embedding": {"resize": resize}})
    if draft["num_classes"] and weights.shape("head.weight")[1] == 2 * draft["embed_dim"]:
        draft["pooling"] = "class_mean"  # their linear evaluation's head
    return Reading(
        draft,
        _dinov2_rows,
        weights,
        lambda size: preprocessing.dinov2(size, draft["in_channels"]),
        assumed_labels(raw, draft["num_classes"]),
        ignored=r"^mask_token$",
    )


# --- DINOv3 ----------------------------------------------------------------------------------------

# The bias of q, k and v is one tensor of which a mask holds k's part at zero.
_WITHOUT_K = Transform(
    lambda found: [torch.cat([found[0].chunk(3)[0], found[0].chunk(3)[2]])],
    lambda found: [
        torch.cat([found[0].chunk(2)[0], torch.zeros_like(found[0].chunk(2)[0]), found[0].chunk(2)[1]])
    ],
)


def _dinov3_rows(config: ViTConfig) -> list[Row]:
    ours, block = "layers.{i}", "blocks.{i}"
    return [
        row("embedding.register_tokens", "storage_tokens"),
        row(f"{ours}.attention.qv_bias", f"{block}.attn.qkv.bias", _WITHOUT_K),
        row(
            f"{ours}.feed_forward.expand.{{p}}",
            [f"{block}.mlp.w1.{{p}}", f"{block}.mlp.w2.{{p}}"],
            joined(1, 1),
        ),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{block}.mlp.w3.{{p}}"),
        *[r for r in timm.rows(config) if r.ours != ("layers.{i}.attention.qkv.{p}",)],
        row(f"{ours}.attention.qkv.weight", f"{block}.attn.qkv.weight"),
    ]


def _read_dinov3(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    weights = raw.weights
    gated = "blocks.0.mlp.w1.weight" in weights
    names = {n.replace("storage_tokens", "reg_token").replace("mlp.w3.", "mlp.fc2."): n for n in weights}
    if gated:
        names |= {n.replace("mlp.w1.", "mlp.fc1_g.").replace("mlp.w2.", "mlp.fc1_x."): n for n in weights}
    renamed = RawCheckpoint(raw.name, raw.path, Renamed(weights, names))
    masked = "blocks.0.attn.qkv.bias" in weights
    draft = deep_merge(
        read_shapes(renamed, asked, _asked_size(asked)),
        {
            "norm": {"eps": 1e-5},
            "position": "none",
            "layer": {
                "attention": {
                    "biases": "qv" if masked else "none",
                    "rotary": {"places": "centered", "temperature": 100.0, "halves": True},
                }
            },
        },
    )
    return Reading(
        draft,
        _dinov3_rows,
        weights,
        lambda size: preprocessing.dinov3(size, draft["in_channels"]),
        assumed_labels(raw, draft["num_classes"]),
        ignored=r"^mask_token$|rope_embed\.|bias_mask$|^local_cls_norm|^cls_norm",
    )


# --- CLIP ------------------------------------------------------------------------------------------


def _clip_rows(config: ViTConfig) -> list[Row]:
    del config
    layer = "transformer.resblocks.{i}."
    return [
        row("embedding.class_token", "class_embedding", VECTOR),
        row("embedding.positions.table", "positional_embedding"),
        *modules({"embedding.patches.projection": "conv1", "embedding.norm": "ln_pre", "norm": "ln_post"}),
        row("layers.{i}.attention.qkv.{p}", f"{layer}attn.in_proj_{{p}}"),
        *layer_modules(layer, "ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        *layer_scales(f"{layer}ls_1.gamma", f"{layer}ls_2.gamma"),
        row("head.weight", "proj", TRANSPOSED),
    ]


def _read_clip(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    tower = any(name.startswith("visual.") for name in raw.weights)
    weights = raw.weights
    if tower:
        weights = Renamed(weights, {n.removeprefix("visual."): n for n in weights if n.startswith("visual.")})
    width, channels, patch, _ = weights.shape("conv1.weight")
    depth = count_layers(weights, "transformer.resblocks.{i}.ln_1.weight")
    side = square(weights.shape("positional_embedding")[0] - 1) if "positional_embedding" in weights else None
    if depth == 0 or side is None:
        raise VitralError(f"{raw.name} looks like CLIP's vision tower, but is no plain ViT")
    draft: Draft = {
        "img_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "embed_dim": width,
        "num_layers": depth,
        "num_heads": usual_heads(raw, width, asked),
        "mlp_ratio": weights.shape("transformer.resblocks.0.mlp.c_fc.weight")[0] / width,
        "num_classes": weights.shape("proj")[1] if "proj" in weights else 0,
        "dropout": 0.0,
        "norm": {"eps": 1e-5},
        "embedding": {
            "norm": "ln_pre.weight" in weights,
            "patch_bias": "conv1.bias" in weights,
            "resize": "bicubic",
        },
        "layer": {"layer_scale": 1.0 if "transformer.resblocks.0.ls_1.gamma" in weights else None},
        "head": {"bias": False},
    }
    return Reading(
        deep_merge(draft, _clip_activation(raw, asked)),
        _clip_rows,
        weights,
        lambda size: preprocessing.clip(size, channels, raw.open_clip),
    )
