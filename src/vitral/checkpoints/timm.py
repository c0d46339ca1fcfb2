"""timm's layout: `vision_transformer.py`, `deit.py`, `eva.py` and `beit.py`, hub folders and bare files.

A hub folder names an architecture; what that name stands for and neither tensors nor ``model_args``
tell is in `FAMILIES`. Everything else is read off keys and shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vitral.blocks import height_and_width
from vitral.checkpoints.files import Weights
from vitral.checkpoints.layout import (
    IMAGENET,
    Draft,
    Reading,
    Source,
    count_layers,
    imagenet_labels,
    merge,
    square,
    usual_heads,
)
from vitral.checkpoints.tables import QKV, QV, UNBATCHED, Row, apart, joined, row, stacked
from vitral.errors import VitralError
from vitral.model import ViTConfig
from vitral.preprocess import Preprocess

NAME = "timm"


def _layer(**options: Any) -> Draft:
    return {"layer": options}


def _rotary(**options: Any) -> Draft:
    return {"layer": {"attention": {"rotary": options}}}


_DINOV3 = _rotary(places="centered", temperature=100.0, halves=True)
_PE = merge({"norm": {"eps": 1e-5}}, _rotary(column_first=True, offset=1.0))
_PE_GIGANTIC = merge({"num_heads": 16}, _rotary(offset=0.0, reference_grid=(32, 32)))

# What an architecture's name says; all rows that match apply, later ones over earlier ones.
FAMILIES: tuple[tuple[str, Draft], ...] = (
    (r"vit_.*_clip_", {"norm": {"eps": 1e-5}}),
    (r"quickgelu", _layer(feed_forward={"activation": "quick_gelu"})),
    (r"(patch32_siglip|giantopt_patch16_siglip|so400m_patch16_siglip|large_patch16_siglip(_gap)?_512)",
     _layer(feed_forward={"activation": "gelu_tanh"})),
    (r"giantopt", {"num_heads": 16}),
    (r"vit_base_patch16_gap_224", {"num_heads": 16}),
    (r"beit3", {"norm": {"eps": 1e-5}}),
    (r"aimv2", {"norm": {"eps": 1e-5}}),
    (r"aimv2_large", {"num_heads": 8}),
    (r"aimv2_huge", {"num_heads": 12}),
    (r"_rpn_", _layer(order="residual_post")),
    (r"flexivit", {"embedding": {"resize": "bilinear"}}),
    (r"radio", {"embedding": {"resize": "bilinear"}}),
    (r"(base|huge)_patch16_radio_v3", {"embedding": {"resize": "bilinear_corners"}}),
    (r"test_vit3", {"head": {"pool_prefix": True}}),
    (r"^eva02_(tiny|small|base|large)|rope_reg", _rotary(reference_grid=(16, 16))),
    (r"^eva02_enormous", _layer(order="residual_post")),
    (r"_rope_(ape_)?\d", _rotary(column_first=True, temperature=100.0)),
    (r"_rope_mixed", _rotary(kind="mixed", column_first=True, temperature=10.0)),
    (r"dinov3|lingbot", merge({"norm": {"eps": 1e-5}}, _DINOV3)),
    (r"huge_plus_patch16_dinov3", {"num_heads": 20}),
    (r"vit_pe_", _PE),
    (r"vit_pe_core", {"head": {"pool_heads": 8, "pool_prefix": True}}),
    (r"vit_pe_core_base", _rotary(reference_grid=(14, 14))),
    (r"vit_pe_core_(tiny|small|large)", _rotary(reference_grid=(24, 24))),
    (r"vit_pe_(lang|spatial)", _rotary(reference_grid=(32, 32))),
    (r"vit_pe_.*gigantic", _PE_GIGANTIC),
)  # fmt: skip

_POOLING = {"token": "class", "avg": "mean", "map": "map"}
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_erf": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip


# --- Keys ----------------------------------------------------------------------------------------


def rows(config: ViTConfig) -> list[Row]:
    layers = range(config.num_layers)
    shared = config.layer.attention.relative_bias == "shared"
    block, ours = "blocks.{i}", "layers.{i}"
    attention, theirs = f"{ours}.attention", f"{block}.attn"
    return [
        row("embedding.class_token", "cls_token"),
        row("embedding.distillation_token", "dist_token"),
        row("embedding.register_tokens", "reg_token"),
        row("embedding.positions.table", "pos_embed", UNBATCHED),
        row("embedding.patches.projection.{p}", "patch_embed.proj.{p}"),
        row("embedding.patch_norm.{p}", "patch_embed.norm.{p}"),
        row("embedding.norm.{p}", "norm_pre.{p}"),
        *_parallel_rows(config),
        row(f"{ours}.attention_norm.{{p}}", f"{block}.norm1.{{p}}"),
        row(f"{attention}.qkv.{{p}}", f"{theirs}.qkv.{{p}}"),
        row(f"{attention}.qkv.{{p}}", [f"{theirs}.{x}_proj.{{p}}" for x in "qkv"], QKV),
        row(f"{attention}.qv_bias", [f"{theirs}.{x}_bias" for x in "qv"], QV),
        row(f"{attention}.qv_bias", [f"{theirs}.{x}_proj.bias" for x in "qv"], QV),
        row(f"{attention}.q_norm.{{p}}", f"{theirs}.q_norm.{{p}}"),
        row(f"{attention}.k_norm.{{p}}", f"{theirs}.k_norm.{{p}}"),
        row(f"{attention}.norm.{{p}}", f"{theirs}.norm.{{p}}"),
        row(f"{attention}.out.{{p}}", f"{theirs}.proj.{{p}}"),
        row(f"{ours}.attention_scale.gamma", f"{block}.ls1.gamma"),
        row(f"{ours}.attention_scale.gamma", f"{block}.gamma_1"),
        row(f"{ours}.feed_forward_norm.{{p}}", f"{block}.norm2.{{p}}"),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{block}.mlp.fc1.{{p}}"),
        row(
            f"{ours}.feed_forward.expand.{{p}}",
            [f"{block}.mlp.fc1_g.{{p}}", f"{block}.mlp.fc1_x.{{p}}"],
            joined(1, 1),
        ),
        row(f"{ours}.feed_forward.norm.{{p}}", f"{block}.mlp.norm.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{block}.mlp.fc2.{{p}}"),
        row(f"{ours}.feed_forward_scale.gamma", f"{block}.ls2.gamma"),
        row(f"{ours}.feed_forward_scale.gamma", f"{block}.gamma_2"),
        *([row("relations.0.table", "rel_pos_bias.relative_position_bias_table")] if shared else []),
        row("relations.{i}.table", f"{theirs}.relative_position_bias_table"),
        row([f"relations.{i}.frequencies" for i in layers], "rope.freqs", stacked(axis=1)),
        row("norm.{p}", "norm.{p}"),
        row("pooled_norm.{p}", "fc_norm.{p}"),
        row("attention_pool.query", "attn_pool.latent"),
        row("attention_pool.qkv.{p}", ["attn_pool.q.{p}", "attn_pool.kv.{p}"], joined(1, 2)),
        row("attention_pool.out.{p}", "attn_pool.proj.{p}"),
        row("attention_pool.norm.{p}", "attn_pool.norm.{p}"),
        row("attention_pool.feed_forward.expand.{p}", "attn_pool.mlp.fc1.{p}"),
        row("attention_pool.feed_forward.contract.{p}", "attn_pool.mlp.fc2.{p}"),
        row("head.{p}", "head.{p}"),
        row("distillation_head.{p}", "head_dist.{p}"),
    ]


def _parallel_rows(config: ViTConfig) -> list[Row]:
    """`ParallelScalingBlock`: one product for the MLP's hidden layer and q, k, v."""
    if config.layer.order != "parallel":
        return []
    ours, block = "layers.{i}", "blocks.{i}"
    both = [f"{ours}.feed_forward.expand", f"{ours}.attention.qkv"]
    cut = apart([config.hidden_dim, 3 * config.embed_dim])
    return [
        row(f"{ours}.attention_norm.{{p}}", f"{block}.in_norm.{{p}}"),
        row([f"{name}.weight" for name in both], f"{block}.in_proj.weight", cut),
        row([f"{name}.bias" for name in both], f"{block}.in_proj.bias", cut),
        row(f"{ours}.feed_forward.expand.bias", f"{block}.mlp_bias"),
        row(f"{ours}.attention.q_norm.{{p}}", f"{block}.q_norm.{{p}}"),
        row(f"{ours}.attention.k_norm.{{p}}", f"{block}.k_norm.{{p}}"),
        row(f"{ours}.attention.out.{{p}}", f"{block}.attn_out_proj.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{block}.mlp_out_proj.{{p}}"),
        row(f"{ours}.attention_scale.gamma", f"{block}.ls.gamma"),
    ]


# --- Reading -------------------------------------------------------------------------------------


def recognises(source: Source) -> bool:
    return "architecture" in source.config and isinstance(source.config["architecture"], str)


def read(source: Source, asked: Mapping[str, Any]) -> Reading:
    name, arguments = source.config["architecture"], source.config.get("model_args") or {}
    about = source.config.get("pretrained_cfg") or source.config
    family = merge(*(draft for pattern, draft in FAMILIES if re.search(pattern, name)))
    size = arguments.get("img_size") or tuple(about.get("input_size", (3, 224, 224)))[1:]
    pooling = arguments.get("global_pool") or source.config.get("global_pool")
    draft = merge(
        read_shapes(source, merge(family, _arguments(arguments), asked), height_and_width(_as_size(size))),
        {"embedding": {"resize": "bicubic_antialias"}},
        family,
        {"pooling": _POOLING[pooling]} if pooling in _POOLING else {},
        _arguments(arguments),
    )
    classes = draft["num_classes"]
    names = about.get("label_names") or source.config.get("label_names")
    return Reading(
        draft,
        rows,
        source.weights,
        lambda img_size: _preprocess(about, img_size),
        tuple(names) if names and len(names) == classes else imagenet_labels(classes),
        {"architecture": name, "model_args": dict(arguments), "tag": about.get("tag")},
    )


def _as_size(size: Any) -> Any:
    return tuple(size) if isinstance(size, Sequence) else size


def _arguments(arguments: Mapping[str, Any]) -> Draft:
    """What ``model_args`` say that no tensor does."""
    draft: Draft = {}
    if "num_heads" in arguments:
        draft["num_heads"] = arguments["num_heads"]
    if isinstance(arguments.get("act_layer"), str):
        if arguments["act_layer"] not in _ACTIVATIONS:
            raise VitralError(f"act_layer {arguments['act_layer']!r} is not among {', '.join(_ACTIVATIONS)}")
        draft = merge(draft, _layer(feed_forward={"activation": _ACTIVATIONS[arguments["act_layer"]]}))
    if "pool_include_prefix" in arguments:
        draft = merge(draft, {"head": {"pool_prefix": arguments["pool_include_prefix"]}})
    if arguments.get("attn_pool_num_heads"):
        draft = merge(draft, {"head": {"pool_heads": arguments["attn_pool_num_heads"]}})
    return merge(draft, _rotary_arguments(arguments))


def _rotary_arguments(arguments: Mapping[str, Any]) -> Draft:
    found: Draft = {}
    kind = arguments.get("rope_type")
    if kind is not None:
        found["kind"] = "mixed" if kind == "mixed" else "axial"
        found["places"] = "centered" if kind == "dinov3" else "index"
    if "rope_grid_indexing" in arguments:
        found["column_first"] = arguments["rope_grid_indexing"] == "xy"
    if arguments.get("ref_feat_shape"):
        found["reference_grid"] = height_and_width(_as_size(arguments["ref_feat_shape"]))
    for theirs, ours in (
        ("rope_temperature", "temperature"),
        ("rope_grid_offset", "offset"),
        ("rope_rotate_half", "halves"),
    ):
        if theirs in arguments:
            found[ours] = arguments[theirs]
    if arguments.get("use_rot_pos_emb") is False:
        return {"layer": {"attention": {"rotary": None}}}
    return _rotary(**found) if found else {}


def read_shapes(source: Source, known: Mapping[str, Any], img_size: tuple[int, int] | None) -> Draft:
    """What keys and shapes tell; `known` fills in what they cannot, `img_size` where positions are no square."""
    weights = source.weights
    if "patch_embed.proj.weight" not in weights:
        raise VitralError(f"{source.name} has no patch_embed.proj.weight; it is no plain ViT of timm's")
    width, channels, *patch = weights.shape("patch_embed.proj.weight")
    if len(patch) != 2 or patch[0] != patch[1]:
        raise VitralError(f"{source.name}: patches are {patch} pixels; Vitral's are square")
    parallel = "blocks.0.in_proj.weight" in weights
    first = "blocks.{i}.in_norm.weight" if parallel else "blocks.{i}.norm1.weight"
    depth = count_layers(weights, first)
    if depth == 0 or (not parallel and "blocks.0.attn.proj.weight" not in weights):
        raise VitralError(f"{source.name} has no layers as a plain ViT has them (blocks.0.attn.proj)")
    tokens = _tokens(weights)
    draft = merge(
        {
            "patch_size": patch[0],
            "in_channels": channels,
            "embed_dim": width,
            "num_layers": depth,
            "num_heads": usual_heads(source, width, known),
            "num_classes": weights.shape("head.weight")[0] if "head.weight" in weights else 0,
            "dropout": 0.0,
            "pooling": _pooling(weights),
            "norm": {"kind": "layer" if first.format(i=0).replace("weight", "bias") in weights else "rms"},
            "embedding": tokens,
            "head": {
                "norm": _final_norm(weights),
                "bias": "head.bias" in weights or "head.weight" not in weights,
                "distillation_head": "dist_token" in weights,
            },
        },
        _layer_shapes(weights, width, parallel=parallel),
    )
    if "attn_pool.mlp.fc1.weight" in weights:
        draft = merge(
            draft, {"head": {"pool_mlp_ratio": weights.shape("attn_pool.mlp.fc1.weight")[0] / width}}
        )
    return merge(draft, _positions(source, draft, img_size))


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


def _final_norm(weights: Weights) -> str:
    if "fc_norm.weight" in weights:
        return "pooled"
    return "tokens" if "norm.weight" in weights else "none"


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
    draft = _layer(
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
        draft = merge(draft, _layer(order="parallel"))
    return merge(draft, {"mlp_ratio": hidden / width})


def _positions(source: Source, draft: Draft, img_size: tuple[int, int] | None) -> Draft:
    """Image size and what the table covers, from the table's length."""
    weights, patch = source.weights, draft["patch_size"]
    found: Draft = {"position": "learned" if "pos_embed" in weights else "none"}
    attention: Draft = {}
    if "blocks.0.attn.relative_position_bias_table" in weights:
        attention["relative_bias"] = "layer"
        side = square(weights.shape("blocks.0.attn.relative_position_bias_table")[0] - 3)
        count = None if side is None else ((side + 1) // 2) ** 2
    elif "rel_pos_bias.relative_position_bias_table" in weights:
        attention["relative_bias"] = "shared"
        side = square(weights.shape("rel_pos_bias.relative_position_bias_table")[0] - 3)
        count = None if side is None else ((side + 1) // 2) ** 2
    else:
        count = None
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
                f"{source.name}: {length} positions are no square grid of patches; pass img_size=[height, width]"
            )
        found["embedding"] = {"positioned": next(iter(fitting))}
        count = next(iter(fitting.values()))
    found["img_size"] = _img_size(patch, count, img_size)
    return merge(found, _layer(attention=attention))


def _img_size(patch: int, count: int | None, img_size: tuple[int, int] | None) -> tuple[int, int]:
    if img_size is not None and count in (None, (img_size[0] // patch) * (img_size[1] // patch)):
        return img_size
    side = square(count) if count else 14
    assert side is not None
    return side * patch, side * patch


# --- Preprocessing -------------------------------------------------------------------------------

_CROP_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


def _preprocess(about: Mapping[str, Any], img_size: tuple[int, int]) -> Preprocess:
    """From a ``pretrained_cfg``, as `timm.data.resolve_data_config` reads it."""
    interpolation = about.get("interpolation", "bicubic")
    return Preprocess(
        img_size,
        resize=_CROP_MODES[about.get("crop_mode") or "center"],  # type: ignore[arg-type]
        crop_fraction=about.get("crop_pct") or 0.875,
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=tuple(about.get("mean", IMAGENET["mean"])),
        std=tuple(about.get("std", IMAGENET["std"])),
    )
