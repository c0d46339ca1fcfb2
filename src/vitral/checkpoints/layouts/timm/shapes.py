"""What the keys and shapes of timm's tensors say of a model."""

from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.formats.weights import Weights
from vitral.checkpoints.layouts.layout import Draft, RawCheckpoint, count_layers, square, usual_heads
from vitral.checkpoints.layouts.timm.families import layer
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import deep_merge

_RELATIVE = {
    "layer": "blocks.0.attn.relative_position_bias_table",
    "shared": "rel_pos_bias.relative_position_bias_table",
}


def read_shapes(raw: RawCheckpoint, known: Mapping[str, Any], img_size: tuple[int, int] | None) -> Draft:
    """Reads a draft off keys and shapes.

    Args:
        raw: the checkpoint, its weights under timm's names.
        known: fields that no tensor says, such as the number of heads.
        img_size: (height, width), needed where positions are no square grid.

    Raises:
        VitralError: if the tensors are none of a plain ViT.
    """
    weights = raw.weights
    if "patch_embed.proj.weight" not in weights:
        raise VitralError(f"{raw.name} has no patch_embed.proj.weight; it is no plain ViT of timm's")
    width, channels, *patch = weights.shape("patch_embed.proj.weight")
    if len(patch) != 2 or patch[0] != patch[1]:
        raise VitralError(f"{raw.name}: patches are {patch} pixels; Vitral's are square")
    parallel = "blocks.0.in_proj.weight" in weights
    first = "blocks.{i}.in_norm.weight" if parallel else "blocks.{i}.norm1.weight"
    depth = count_layers(weights, first)
    if depth == 0 or (not parallel and "blocks.0.attn.proj.weight" not in weights):
        raise VitralError(f"{raw.name} has no layers as a plain ViT has them (blocks.0.attn.proj)")
    draft = deep_merge(
        {
            "patch_size": patch[0],
            "in_channels": channels,
            "embed_dim": width,
            "num_layers": depth,
            "num_heads": usual_heads(raw, width, known),
            "num_classes": weights.shape("head.weight")[0] if "head.weight" in weights else 0,
            "dropout": 0.0,
            "pooling": _pooling(weights),
            "norm": {"kind": "layer" if first.format(i=0).replace("weight", "bias") in weights else "rms"},
            "embedding": _tokens(weights),
            "head": _head(weights, width),
        },
        _layer_shapes(weights, width, parallel=parallel),
    )
    return deep_merge(draft, _positions(raw, draft, img_size))


def _tokens(weights: Weights) -> Draft:
    registers = weights.shape("reg_token")[1] if "reg_token" in weights else 0
    return {
        "class_token": "cls_token" in weights,
        "distillation_token": "dist_token" in weights,
        "register_tokens": registers,
        "patch_bias": "patch_embed.proj.bias" in weights,
        "patch_norm": "patch_embed.norm.weight" in weights,
        "norm": "norm_pre.weight" in weights,
    }


def _pooling(weights: Weights) -> str:
    if "attn_pool.latent" in weights:
        return "map"
    return "class" if "cls_token" in weights and "fc_norm.weight" not in weights else "mean"


def _head(weights: Weights, width: int) -> Draft:
    pool = "attn_pool.mlp.fc1.weight"
    norm = "tokens" if "norm.weight" in weights else "none"
    return {
        "norm": "pooled" if "fc_norm.weight" in weights else norm,
        "bias": "head.bias" in weights or "head.weight" not in weights,
        "distillation_head": "dist_token" in weights,
        **({"pool_mlp_ratio": weights.shape(pool)[0] / width} if pool in weights else {}),
    }


def _layer_shapes(weights: Weights, width: int, *, parallel: bool) -> Draft:
    def has(*names: str) -> bool:
        return any(f"blocks.0.{name}" in weights for name in names)

    def shape(*names: str) -> int:
        return next(weights.shape(f"blocks.0.{n}")[0] for n in names if f"blocks.0.{n}" in weights)

    contract = weights.shape("blocks.0.mlp_out_proj.weight" if parallel else "blocks.0.mlp.fc2.weight")
    hidden = contract[1]
    gated = has("mlp.fc1_g.weight") or (not parallel and shape("mlp.fc1.weight") == 2 * hidden)
    biases = "none"
    if has("attn.qkv.bias", "attn.k_proj.bias", "in_proj.bias"):
        biases = "qkv"
    elif has("attn.q_bias", "attn.q_proj.bias"):
        biases = "qv"
    scaled = has("ls1.gamma", "gamma_1", "ls.gamma")
    draft = layer(
        layer_scale=1e-5 if scaled else None,
        attention={
            "biases": biases,
            "out_bias": has("attn.proj.bias", "attn_out_proj.bias"),
            "qk_norm": has("attn.q_norm.weight", "q_norm.weight"),
            "norm": has("attn.norm.weight"),
        },
        feed_forward={
            "gated": gated,
            "norm": has("mlp.norm.weight"),
            "bias": has("mlp.fc2.bias", "mlp_out_proj.bias"),
            "activation": "silu" if gated else "gelu",
        },
    )
    if parallel:
        draft = deep_merge(draft, layer(order="parallel"))
    return deep_merge(draft, {"mlp_ratio": hidden / width})


def _positions(raw: RawCheckpoint, draft: Draft, img_size: tuple[int, int] | None) -> Draft:
    """Reads the image's size, and what the table covers, off the table's length."""
    weights, patch = raw.weights, draft["patch_size"]
    found: Draft = {"position": "learned" if "pos_embed" in weights else "none"}
    attention: Draft = {}
    count = None
    for kind, name in _RELATIVE.items():
        if name in weights:
            attention["relative_bias"] = kind
            side = square(weights.shape(name)[0] - 3)
            count = None if side is None else ((side + 1) // 2) ** 2
    options = draft["embedding"]
    prefix = options["class_token"] + options["distillation_token"] + options["register_tokens"]
    if "pos_embed" in weights:
        length = weights.shape("pos_embed")[-2]
        size_grid = None if img_size is None else (img_size[0] // patch) * (img_size[1] // patch)
        cover = {
            "all": length - prefix,
            "patches": length,
            "class": length - prefix + options["register_tokens"],
        }
        fitting = {name: n for name, n in cover.items() if n == size_grid} or {
            name: n for name, n in cover.items() if square(n)
        }
        if not fitting:
            raise VitralError(
                f"{raw.name}: {length} positions are no square grid of patches; pass img_size=[height, width]"
            )
        found["embedding"] = {"positioned": next(iter(fitting))}
        count = next(iter(fitting.values()))
    found["img_size"] = _img_size(patch, count, img_size)
    return deep_merge(found, layer(attention=attention))


def _img_size(patch: int, count: int | None, img_size: tuple[int, int] | None) -> tuple[int, int]:
    if img_size is not None and count in (None, (img_size[0] // patch) * (img_size[1] // patch)):
        return img_size
    side = square(count) if count else 14
    assert side is not None
    return side * patch, side * patch
