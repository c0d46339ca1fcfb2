"""timm's layout: `vision_transformer.py`, `deit.py`, `eva.py` and `beit.py`, hub folders and bare files.

A hub folder names an architecture; what that name stands for and neither tensors nor ``model_args``
tell is in `FAMILIES`. Everything else is read off keys and shapes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vitral.checkpoints.formats import Renamed, Weights
from vitral.checkpoints.layouts.layout import (
    CLIP,
    IMAGENET,
    Checkpoint,
    Draft,
    Reading,
    Source,
    Writing,
    count_layers,
    labels_of,
    no_preprocessing,
    per_channel,
    square,
    usual_heads,
)
from vitral.checkpoints.layouts.tables import QKV, QV, UNBATCHED, Row, apart, joined, row, stacked
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import deep_merge

NAME = "timm"


def _layer(**options: Any) -> Draft:
    return {"layer": options}


def _rotary(**options: Any) -> Draft:
    return {"layer": {"attention": {"rotary": options}}}


_DINOV3 = _rotary(places="centered", temperature=100.0, halves=True)
_PE = deep_merge({"norm": {"eps": 1e-5}}, _rotary(column_first=True, offset=1.0))
_PE_GIGANTIC = deep_merge({"num_heads": 16}, _rotary(offset=0.0, reference_grid=(32, 32)))

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
    (r"dinov3|lingbot", deep_merge({"norm": {"eps": 1e-5}}, _DINOV3)),
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


_PLAIN = re.compile(r"(vit|naflexvit|flexivit|deit3?|eva|eva02|beit|beitv2|beit3|aimv2)_\w+")
_WRAPPED = "timm_model."  # by transformers' TimmWrapper classes


def recognises(source: Source) -> bool:
    return isinstance(_described(source).get("architecture"), str)


def _described(source: Source) -> Mapping[str, Any]:
    """A hub folder's config; of a bare file, what timm's training script saves with the weights."""
    if source.config:
        return source.config
    name, told = source.weights.about.get("arch"), source.weights.about.get("args", {})
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        return {}
    if "patch_embed.proj.weight" not in source.weights:
        return {}
    side = re.search(r"_(\d{3})$", name)
    told = {field: told.get(field) for field in ("mean", "std", "crop_pct", "interpolation")}
    size = {"input_size": (3, int(side[1]), int(side[1]))} if side else {}
    about = published(name) | {field: value for field, value in told.items() if value} | size
    return {"architecture": name, "pretrained_cfg": about}


def read(source: Source, asked: Mapping[str, Any]) -> Reading:
    config = _described(source)
    name, arguments = config["architecture"], config.get("model_args") or {}
    about = config.get("pretrained_cfg") or config
    weights = source.weights
    if all(key.startswith(_WRAPPED) for key in weights):
        weights = Renamed(weights, {key.removeprefix(_WRAPPED): key for key in weights})
    source = replace(source, weights=weights)
    family = deep_merge(*(draft for pattern, draft in FAMILIES if re.search(pattern, name)))
    size = arguments.get("img_size") or tuple(about.get("input_size", (3, 224, 224)))[1:]
    pooling = arguments.get("global_pool") or config.get("global_pool")
    draft = deep_merge(
        read_shapes(
            source, deep_merge(family, _arguments(arguments), asked), height_and_width(_as_size(size))
        ),
        {"embedding": {"resize": "bicubic_antialias"}},
        family,
        {"pooling": _POOLING[pooling]} if pooling in _POOLING else {},
        _arguments(arguments),
    )
    labels, notes = _labels(source, config, about, draft["num_classes"])
    if not about.get("mean"):
        notes += no_preprocessing(source, asked, "published models of that name take")
    return Reading(
        draft,
        rows,
        weights,
        lambda img_size: _preprocess(published(name) | dict(about), img_size, draft["in_channels"]),
        labels,
        {"architecture": name, "model_args": dict(arguments), "tag": about.get("tag")},
        multi_label=config.get("problem_type") == "multi_label_classification",
        regression=config.get("problem_type") == "regression",
        notes=notes,
    )


def _labels(
    source: Source, config: Mapping[str, Any], about: Mapping[str, Any], classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, and what to say of them. Raises ValueError if others are named than are."""
    names = about.get("label_names") or config.get("label_names")
    if isinstance(names, Mapping):
        names = list(names.values())
    if names and all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = None
    if names and classes:
        if len(names) != classes:
            raise ValueError(f"label_names are {len(names)}, its head has {classes} classes")
        return tuple(names), ()
    labels = labels_of(source, classes, about.get("tag"), about.get("hf_hub_id"))
    changed = config.get("model_args") and labels[:1] == ("tench",)
    tag = about.get("tag")
    told = f"{source.name} does not name its 1,000 classes; taken are ImageNet's, for it is tagged {tag}"
    return labels, (told,) if changed else ()


# What timm's models are published with, by name; all rows that match apply, later ones over earlier ones.
_HALVES = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_PREPARED: tuple[tuple[str, Draft], ...] = (
    ("", {**_HALVES, "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}),
    (r"_gap_2[45]|_reg\d_gap_256|^flexivit|_plus_2", {"crop_pct": 0.95}),
    (r"_(3[38]\d|448|5\d\d|896)$|dinov[23]|_pe_|^aimv2|radio|^beit3", {"crop_pct": 1.0}),
    (r"^vit_(base_patch16|large|giant|huge|gigantic|base_patch16_plus)_\w*clip_|patch32_clip_256|_196$"
     r"|so150m2_patch16_reg1_gap_256", {"crop_pct": 1.0}),
    (r"vit_base_patch16_clip_224|gap_384$|^beitv2_large", {"crop_pct": 0.95}),
    (r"reg4_gap_384|so150m2?_\w*_384", {"crop_pct": 1.0}),
    (r"siglip_|vit_base_patch16_reg4_gap_256", {"crop_pct": 0.9}),
    (r"so400m_patch14_siglip_gap_(384|448|896)", {"crop_pct": 1.0}),
    (r"^eva\w*_(448|336|560)$|vit_base_patch16_clip_384|(huge|large)_patch14_clip_336|gigantic_patch14_clip_378"
     r"|vit_medium_patch16_gap_384|so150m2_patch16_reg1_gap_448", {"crop_mode": "squash"}),
    (r"^eva02_(tiny|small)|_clip_336$", {"crop_pct": 1.0}),
    (r"^eva02_(tiny|small)\w*_224", {"crop_pct": 0.9}),
    (r"^eva02_(tiny|small|large_patch14_clip)\w*_336", {"crop_mode": "center"}),
    (r"^deit|^beitv2|^beit3|dinov[23]|_rope_(mixed_|ape_|mixed_ape_)?224|vit_small_patch8_"
     r"|(huge|giant)_patch1\d_gap|intern300m|lingbot", IMAGENET),
    (r"_clip_|^eva|^aimv2|radio|betwixt_patch16_rope_reg4", CLIP),
    (r"vit_large_patch14_clip_(224|336)", _HALVES),
    (r"eva_giant_patch14_560", IMAGENET),
    (r"lingbot|sapiens", {"crop_mode": "squash", "interpolation": "bilinear", "crop_pct": 1.0}),
)  # fmt: skip


def published(name: str) -> Draft:
    """Fields of a ``pretrained_cfg`` that go with an architecture's name."""
    return deep_merge(*(draft for pattern, draft in _PREPARED if re.search(pattern, name)))


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
        draft = deep_merge(draft, _layer(feed_forward={"activation": _ACTIVATIONS[arguments["act_layer"]]}))
    if "use_post_norm" in arguments:
        draft = deep_merge(draft, _layer(order="residual_post" if arguments["use_post_norm"] else "pre"))
    if "pool_include_prefix" in arguments:
        draft = deep_merge(draft, {"head": {"pool_prefix": arguments["pool_include_prefix"]}})
    if arguments.get("attn_pool_num_heads"):
        draft = deep_merge(draft, {"head": {"pool_heads": arguments["attn_pool_num_heads"]}})
    if "attn_pool_num_heads" in arguments:  # eva.py, whose pool sees all tokens
        draft = deep_merge(draft, {"head": {"pool_prefix": arguments.get("global_pool") == "map"}})
    return deep_merge(draft, _rotary_arguments(arguments))


def _rotary_arguments(arguments: Mapping[str, Any]) -> Draft:
    found: Draft = {}
    kind = arguments.get("rope_type")
    if kind is not None:
        found["kind"] = "mixed" if kind == "mixed" else "axial"
        found["places"] = "centered" if kind == "dinov3" else "index"
    if "rope_grid_indexing" in arguments:
        found["column_first"] = arguments["rope_grid_indexing"] == "xy"
    if "ref_feat_shape" in arguments:
        reference = arguments["ref_feat_shape"]
        found["reference_grid"] = None if reference is None else height_and_width(_as_size(reference))
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
    """What keys and shapes tell; `known` and, where positions are no square, `img_size` fill in the rest."""
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
    draft = deep_merge(
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
        draft = deep_merge(
            draft, {"head": {"pool_mlp_ratio": weights.shape("attn_pool.mlp.fc1.weight")[0] / width}}
        )
    return deep_merge(draft, _positions(source, draft, img_size))


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
        draft = deep_merge(draft, _layer(order="parallel"))
    return deep_merge(draft, {"mlp_ratio": hidden / width})


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
                f"{source.name}: {length} positions are no square grid of patches; pass img_size=[height, "
                "width]"
            )
        found["embedding"] = {"positioned": next(iter(fitting))}
        count = next(iter(fitting.values()))
    found["img_size"] = _img_size(patch, count, img_size)
    return deep_merge(found, _layer(attention=attention))


def _img_size(patch: int, count: int | None, img_size: tuple[int, int] | None) -> tuple[int, int]:
    if img_size is not None and count in (None, (img_size[0] // patch) * (img_size[1] // patch)):
        return img_size
    side = square(count) if count else 14
    assert side is not None
    return side * patch, side * patch


# --- Preprocessing -------------------------------------------------------------------------------

_CROP_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


def _preprocess(about: Mapping[str, Any], img_size: tuple[int, int], in_channels: int = 3) -> Preprocess:
    """From a ``pretrained_cfg``, as `timm.data.resolve_data_config` reads it."""
    interpolation = about.get("interpolation") or "bicubic"
    return Preprocess(
        img_size,
        resize=_CROP_MODES[about.get("crop_mode") or "center"],  # type: ignore[arg-type]
        crop_fraction=about.get("crop_pct") or 0.875,
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=per_channel(about.get("mean") or IMAGENET["mean"], in_channels),  # pyrefly: ignore
        std=per_channel(about.get("std") or IMAGENET["std"], in_channels),  # pyrefly: ignore
    )


# --- Writing -------------------------------------------------------------------------------------

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


def _holds(config: Any, draft: Mapping[str, Any]) -> bool:
    return all(
        _holds(getattr(config, name), value) if isinstance(value, Mapping) else getattr(config, name) == value
        for name, value in draft.items()
    )


def write(checkpoint: Checkpoint) -> Writing:
    """A hub folder: ``config.json`` and ``model.safetensors``, which `timm.create_model` loads."""
    config, kind = checkpoint.model.config, _class_of(checkpoint.model.config)
    fitting = [name for k, name, draft in _BASES if k == kind and _holds(config, draft)]
    # An eps that no architecture of that class has is the nearest one's; the certificate shows the cost.
    base = fitting[0] if fitting else next(name for k, name, _ in _BASES if k == kind)
    base = _home(checkpoint, kind) or base
    arguments = _common_arguments(config) | _CLASS_ARGUMENTS[kind](config)
    licence = checkpoint.metadata.get("licence")
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
                "pretrained_cfg": _pretrained_cfg(checkpoint) | ({"license": licence} if licence else {}),
                **({"label_names": list(checkpoint.labels)} if checkpoint.labels else {}),
            }
        },
    )


_CLASS_NAMES = {
    "eva": r"^eva02_(tiny|small|base|large)_|^vit_\w+_dinov3",
    "beit": r"^beit",
    "vit": r"^vit_|^deit3?_",
}


def _home(checkpoint: Checkpoint, kind: str) -> str | None:
    """The architecture that the model came from, if it is of that class and has what arguments cannot say."""
    name = checkpoint.metadata.get("origin", {}).get("architecture")
    if not isinstance(name, str) or not re.search(_CLASS_NAMES.get(kind, "(?!)"), name):
        return None
    family = deep_merge(*(draft for pattern, draft in FAMILIES if re.search(pattern, name)))
    told = {"norm": {"eps": 1e-6}, "layer": {"order": "pre"}, "num_heads": checkpoint.model.config.num_heads}
    return name if _holds(checkpoint.model.config, deep_merge(told, family)) else None


def _written_rows(config: ViTConfig, kind: str, base: str) -> list[Row]:
    """Of the names that one tensor of ours may have in timm, those of this class."""
    separate = config.layer.feed_forward.gated and (
        base.startswith(_SEPARATE_GATE) or (kind in ("eva", "beit") and config.layer.feed_forward.norm)
    )
    unused = r"blocks\.\{i\}\.attn\.[qkv]_proj"
    unused += r"|\.ls\d\.gamma" if kind in ("eva", "beit") else r"|\.gamma_\d"
    unused += r"|mlp\.fc1\.\{p\}" if separate else r"|mlp\.fc1_"
    return [r for r in rows(config) if not any(re.search(unused, name) for name in r.theirs)]


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


def _pretrained_cfg(checkpoint: Checkpoint) -> Draft:
    preprocess = checkpoint.preprocess
    modes = {ours: theirs for theirs, ours in _CROP_MODES.items()}
    return {
        "input_size": [checkpoint.model.config.in_channels, *preprocess.img_size],
        "interpolation": preprocess.interpolation,
        "crop_pct": preprocess.crop_fraction,
        "crop_mode": modes[preprocess.resize],
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": checkpoint.model.config.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if checkpoint.model.config.head.distillation_head else "head",
    }
