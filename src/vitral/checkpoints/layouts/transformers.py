"""transformers' hub folders: ViT, DeiT, DINOv2 and 3, CLIP, SigLIP 1 and 2, MAE, MSN, I-JEPA, BEiT, data2vec.

``config.json`` tells almost everything; `FAMILIES` has a row for each ``model_type`` with what its code
fixes. Keys are those on disk, which transformers keeps while its classes are renamed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    labels_of,
    no_preprocessing,
    per_channel,
    square,
)
from vitral.checkpoints.layouts.tables import QKV, QV, UNBATCHED, VECTOR, Row, Transform, each, joined, row
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import deep_merge

NAME = "transformers"
# Its `problem_type`s beside one class an image: pipelines take a sigmoid, or the numbers themselves.
MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # since version 5, of models with a text tower


@dataclass(frozen=True)
class Family:
    """What a ``model_type`` stands for."""

    keys: str  # the style of its keys, one of `_STYLES`
    draft: Draft
    prefix: str = ""  # before the keys of the encoder where a head stands beside it
    ignored: str = "(?!)"
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # of its config class, for what config.json omits


_BEIT = {
    "embedding": {"class_token": True, "resize": "bicubic"},
    "layer": {"attention": {"biases": "qv", "relative_resize": "bilinear"}},
}
_TEXT = r"^(text_model|text_projection|logit_scale|logit_bias)|position_ids$"
_DINOV3 = {
    "position": "none",
    "layer": {"attention": {"rotary": {"places": "centered", "temperature": 100.0, "halves": True}}},
}

FAMILIES = {
    "vit": Family("vit", {"embedding": {"resize": "bicubic"}}, "vit."),
    "deit": Family(
        "vit", {"embedding": {"resize": "bicubic", "distillation_token": True}}, "deit."
    ),
    "vit_mae": Family("vit", {"embedding": {"resize": "bicubic"}}, "vit.", r"^decoder\."),
    "vit_msn": Family(
        "vit", {"embedding": {"resize": "bicubic"}}, "vit.", defaults={"layer_norm_eps": 1e-6}
    ),
    "ijepa": Family("vit", {"pooling": "mean", "embedding": {"resize": "bicubic"}}, "ijepa.", r"pooler\."),
    "beit": Family("vit", _BEIT, "beit.", r"^lm_head\.|relative_position_index"),
    "data2vec-vision": Family("vit", _BEIT, "data2vec_vision.", r"relative_position_index"),
    "dinov2": Family(
        "dinov2",
        {"embedding": {"resize": "bicubic"}},
        "dinov2.",
        defaults={"layer_norm_eps": 1e-6, "mlp_ratio": 4},
    ),
    "dinov2_with_registers": Family(
        "dinov2",
        {"embedding": {"resize": "bicubic_antialias", "positioned": "class"}},
        "dinov2_with_registers.",
        defaults={"layer_norm_eps": 1e-6, "mlp_ratio": 4, "num_register_tokens": 4},
    ),
    "dinov3_vit": Family(
        "dinov3",
        _DINOV3,
        defaults={"layer_norm_eps": 1e-5, "num_register_tokens": 0, "rope_theta": 100.0},
    ),
    "clip_vision_model": Family(
        "clip",
        {"embedding": {"resize": "bicubic", "norm": True, "patch_bias": False}, "head": {"bias": False}},
        "vision_model.",
        _TEXT,
        {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "image_size": 224, "patch_size": 32},
    ),
    "siglip_vision_model": Family(
        "clip",
        {"pooling": "map", "embedding": {"resize": "bicubic"}},
        "vision_model.",
        _TEXT,
        {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "image_size": 224, "patch_size": 16},
    ),
    "siglip2_vision_model": Family(
        "siglip2",
        {"pooling": "map", "embedding": {"resize": "bilinear_antialias"}},
        "vision_model.",
        _TEXT,
        {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "patch_size": 16, "num_patches": 256},
    ),
}  # fmt: skip

# Of the config classes that serve all families, for what config.json omits.
_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
# Configs of two towers, and the model_type of their vision tower.
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip


# --- Keys ----------------------------------------------------------------------------------------


def _vit_rows(config: ViTConfig) -> list[Row]:
    shared = config.layer.attention.relative_bias == "shared"
    ours, theirs = "layers.{i}", "encoder.layer.{i}"
    attention = f"{theirs}.attention.attention"
    bias = "relative_position_bias.relative_position_bias_table"
    return [
        row("embedding.class_token", "embeddings.cls_token"),
        row("embedding.distillation_token", "embeddings.distillation_token"),
        row("embedding.positions.table", "embeddings.position_embeddings", UNBATCHED),
        row("embedding.patches.projection.{p}", "embeddings.patch_embeddings.projection.{p}"),
        row(f"{ours}.attention_norm.{{p}}", f"{theirs}.layernorm_before.{{p}}"),
        row(
            f"{ours}.attention.qkv.{{p}}", [f"{attention}.{x}.{{p}}" for x in ("query", "key", "value")], QKV
        ),
        row(f"{ours}.attention.qv_bias", [f"{attention}.{x}.bias" for x in ("query", "value")], QV),
        row(f"{ours}.attention.out.{{p}}", f"{theirs}.attention.output.dense.{{p}}"),
        row(f"{ours}.attention_scale.gamma", f"{theirs}.lambda_1"),
        row(f"{ours}.feed_forward_norm.{{p}}", f"{theirs}.layernorm_after.{{p}}"),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{theirs}.intermediate.dense.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{theirs}.output.dense.{{p}}"),
        row(f"{ours}.feed_forward_scale.gamma", f"{theirs}.lambda_2"),
        *([row("relations.0.table", f"encoder.{bias}")] if shared else []),
        row("relations.{i}.table", f"{attention}.{bias}"),
        row("norm.{p}", "layernorm.{p}"),
        row("pooled_norm.{p}", "pooler.layernorm.{p}"),
        row("hidden.0.{p}", "pooler.dense.{p}"),
        row("head.{p}", "classifier.{p}"),
        row("head.{p}", "cls_classifier.{p}"),
        row("distillation_head.{p}", "distillation_classifier.{p}"),
    ]


def _dinov2_rows(config: ViTConfig) -> list[Row]:
    del config
    ours, theirs = "layers.{i}", "encoder.layer.{i}"
    attention = f"{theirs}.attention.attention"
    return [
        row("embedding.class_token", "embeddings.cls_token"),
        row("embedding.register_tokens", "embeddings.register_tokens"),
        row("embedding.positions.table", "embeddings.position_embeddings", UNBATCHED),
        row("embedding.patches.projection.{p}", "embeddings.patch_embeddings.projection.{p}"),
        row(f"{ours}.attention_norm.{{p}}", f"{theirs}.norm1.{{p}}"),
        row(
            f"{ours}.attention.qkv.{{p}}", [f"{attention}.{x}.{{p}}" for x in ("query", "key", "value")], QKV
        ),
        row(f"{ours}.attention.out.{{p}}", f"{theirs}.attention.output.dense.{{p}}"),
        row(f"{ours}.attention_scale.gamma", f"{theirs}.layer_scale1.lambda1"),
        row(f"{ours}.feed_forward_norm.{{p}}", f"{theirs}.norm2.{{p}}"),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{theirs}.mlp.fc1.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{theirs}.mlp.fc2.{{p}}"),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{theirs}.mlp.weights_in.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{theirs}.mlp.weights_out.{{p}}"),
        row(f"{ours}.feed_forward_scale.gamma", f"{theirs}.layer_scale2.lambda1"),
        row("norm.{p}", "layernorm.{p}"),
        row("head.{p}", "classifier.{p}"),
    ]


def _dinov3_rows(config: ViTConfig) -> list[Row]:
    del config
    ours, theirs = "layers.{i}", "layer.{i}"
    attention = f"{theirs}.attention"
    return [
        row("embedding.class_token", "embeddings.cls_token"),
        row("embedding.register_tokens", "embeddings.register_tokens"),
        row("embedding.patches.projection.{p}", "embeddings.patch_embeddings.{p}"),
        row(f"{ours}.attention_norm.{{p}}", f"{theirs}.norm1.{{p}}"),
        row(f"{ours}.attention.qkv.{{p}}", [f"{attention}.{x}_proj.{{p}}" for x in "qkv"], QKV),
        row(f"{ours}.attention.qv_bias", [f"{attention}.{x}_proj.bias" for x in "qv"], QV),
        row(f"{ours}.attention.out.{{p}}", f"{attention}.o_proj.{{p}}"),
        row(f"{ours}.attention_scale.gamma", f"{theirs}.layer_scale1.lambda1"),
        row(f"{ours}.feed_forward_norm.{{p}}", f"{theirs}.norm2.{{p}}"),
        row(
            f"{ours}.feed_forward.expand.{{p}}",
            [f"{theirs}.mlp.{x}_proj.{{p}}" for x in ("gate", "up")],
            joined(1, 1),
        ),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{theirs}.mlp.up_proj.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{theirs}.mlp.down_proj.{{p}}"),
        row(f"{ours}.feed_forward_scale.gamma", f"{theirs}.layer_scale2.lambda1"),
        row("norm.{p}", "norm.{p}"),
    ]


def _patchified(config: ViTConfig) -> Transform:
    """SigLIP 2 maps flattened patches, ordered row, column, channel."""
    p = config.patch_size
    return each(
        lambda x: x.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2), lambda x: x.permute(0, 2, 3, 1).flatten(1)
    )


def _siglip2_rows(config: ViTConfig) -> list[Row]:
    linear = row(
        "embedding.patches.projection.weight", "embeddings.patch_embedding.weight", _patchified(config)
    )
    return [linear, *_clip_rows(config)]


def _clip_rows(config: ViTConfig) -> list[Row]:
    del config
    ours, theirs = "layers.{i}", "encoder.layers.{i}"
    return [
        row("embedding.class_token", "embeddings.class_embedding", VECTOR),
        row("embedding.patches.projection.{p}", "embeddings.patch_embedding.{p}"),
        row("embedding.positions.table", "embeddings.position_embedding.weight"),
        row("embedding.norm.{p}", "pre_layrnorm.{p}"),
        row(f"{ours}.attention_norm.{{p}}", f"{theirs}.layer_norm1.{{p}}"),
        row(f"{ours}.attention.qkv.{{p}}", [f"{theirs}.self_attn.{x}_proj.{{p}}" for x in "qkv"], QKV),
        row(f"{ours}.attention.out.{{p}}", f"{theirs}.self_attn.out_proj.{{p}}"),
        row(f"{ours}.feed_forward_norm.{{p}}", f"{theirs}.layer_norm2.{{p}}"),
        row(f"{ours}.feed_forward.expand.{{p}}", f"{theirs}.mlp.fc1.{{p}}"),
        row(f"{ours}.feed_forward.contract.{{p}}", f"{theirs}.mlp.fc2.{{p}}"),
        row("norm.{p}", "post_layernorm.{p}"),
        row("attention_pool.query", "head.probe"),
        row("attention_pool.qkv.{p}", "head.attention.in_proj_{p}"),
        row("attention_pool.out.{p}", "head.attention.out_proj.{p}"),
        row("attention_pool.norm.{p}", "head.layernorm.{p}"),
        row("attention_pool.feed_forward.expand.{p}", "head.mlp.fc1.{p}"),
        row("attention_pool.feed_forward.contract.{p}", "head.mlp.fc2.{p}"),
        row("head.{p}", "visual_projection.{p}"),
        row("head.{p}", "classifier.{p}"),
    ]


_STYLES = {
    "vit": _vit_rows,
    "dinov2": _dinov2_rows,
    "dinov3": _dinov3_rows,
    "clip": _clip_rows,
    "siglip2": _siglip2_rows,
}


# --- Reading -------------------------------------------------------------------------------------


def recognises(source: Source) -> bool:
    return "model_type" in source.config


def read(source: Source, asked: Mapping[str, Any]) -> Reading:
    config, kind = dict(source.config), source.config["model_type"]
    if kind in _TOWERS:
        projection = config.get("projection_dim")
        config = {
            "projection_dim": projection,
            **config.get("vision_config", {}),
            "id2label": config.get("id2label"),
        }
        kind = _TOWERS[kind]
    if kind not in FAMILIES:
        raise VitralError(
            f"{source.name}: model_type {kind!r} is not among those that Vitral reads: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    weights = _without_prefix(source.weights, family.prefix)
    config = {**_DEFAULTS, **family.defaults, **{k: v for k, v in config.items() if v is not None}}
    draft = _draft(source, config, kind, weights)
    ignored = rf"mask_token$|{family.ignored}"
    if draft["pooling"] == "mean" and family.keys in ("clip", "siglip2"):
        ignored += r"|^head\.|^post_layernorm\." if draft["head"]["norm"] == "none" else r"|^head\."
    if draft.get("embedding", {}).get("register_tokens") == 0:
        ignored += r"|^embeddings\.register_tokens$"  # saved all the same, of size nought
    if draft["head"].get("hidden_dim") is None:
        ignored += r"|^pooler\.dense\."
    classes = draft["num_classes"]
    return Reading(
        draft,
        _STYLES[family.keys],
        weights,
        lambda img_size: _preprocess(source.preprocessor, img_size, kind, draft["in_channels"]),
        _labels(source, classes),
        {"config": {k: v for k, v in source.config.items() if k not in ("id2label", "label2id")}},
        ignored,
        multi_label=source.config.get("problem_type") == MULTI_LABEL,
        regression=source.config.get("problem_type") == REGRESSION,
        notes=()
        if source.preprocessor
        else no_preprocessing(source, asked, f"published models of {kind} take"),
    )


def _labels(source: Source, classes: int) -> tuple[str, ...]:
    """Raises ValueError if ``id2label`` names other classes than there are."""
    names: Mapping[str, Any] = source.config.get("id2label") or {}
    if all(name in (f"LABEL_{index}", None) for index, name in names.items()):
        return labels_of(source, classes)
    if classes and set(names) != {str(index) for index in range(classes)}:
        raise ValueError(f"id2label names {len(names)} classes, its head has {classes}")
    return tuple(names[str(index)] for index in range(classes))


def _without_prefix(weights: Weights, prefix: str) -> Weights:
    # transformers writes MSN's layers without the prefix that it gives the rest.
    return Renamed(weights, {name.removeprefix(prefix): name for name in weights})


def _draft(source: Source, config: Mapping[str, Any], kind: str, weights: Weights) -> Draft:
    family = FAMILIES[kind]
    width, patch = config["hidden_size"], config["patch_size"]
    if not isinstance(patch, int):
        raise VitralError(f"{source.name}: patches are {patch} pixels; Vitral's are square")
    if config["hidden_act"] not in ACTIVATIONS:
        raise VitralError(
            f"{source.name}: hidden_act {config['hidden_act']!r} is not among {', '.join(ACTIVATIONS)}"
        )
    size = config["image_size"]
    if kind == "siglip2_vision_model":
        size = (square(config["num_patches"]) or 1) * patch
    head = next((n for n in _HEADS if f"{n}.weight" in weights), None)
    draft: Draft = {
        "img_size": size if isinstance(size, int) else tuple(size),
        "patch_size": patch,
        "in_channels": config["num_channels"],
        "embed_dim": width,
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_classes": weights.shape(f"{head}.weight")[0] if head else 0,
        "dropout": 0.0,
        "pooling": "class",
        "norm": {"eps": config["layer_norm_eps"]},
        "layer": {
            "attention": {"biases": "qkv" if config.get("qkv_bias", True) else "none"},
            "feed_forward": {"activation": ACTIVATIONS[config["hidden_act"]]},
        },
        "head": {"norm": "tokens"},
    }
    return deep_merge(
        draft,
        family.draft,
        _HIDDEN[family.keys](config, weights),
        _OPTIONS[family.keys](config, kind, weights),
    )


_HEADS = ("classifier", "cls_classifier", "visual_projection")


def _vit_hidden(config: Mapping[str, Any], weights: Weights) -> Draft:
    del weights
    return {"mlp_ratio": config.get("intermediate_size", 4 * config["hidden_size"]) / config["hidden_size"]}


def _dinov2_hidden(config: Mapping[str, Any], weights: Weights) -> Draft:
    gated = bool(config.get("use_swiglu_ffn"))
    hidden = _dinov2_width(config["hidden_size"], config["mlp_ratio"], gated=gated)
    del weights
    activation = {"activation": "silu"} if gated else {}
    return {
        "mlp_ratio": hidden / config["hidden_size"],
        "layer": {"feed_forward": {"gated": gated, **activation}},
    }


def _dinov2_width(embed_dim: int, mlp_ratio: float, *, gated: bool) -> int:
    """SwiGLU's hidden width is two thirds of the ratio's, rounded up to eights."""
    hidden = int(embed_dim * mlp_ratio)
    return (hidden * 2 // 3 + 7) // 8 * 8 if gated else hidden


_HIDDEN = {
    "siglip2": _vit_hidden,
    "vit": _vit_hidden,
    "dinov2": _dinov2_hidden,
    "dinov3": _vit_hidden,
    "clip": _vit_hidden,
}


def _vit_options(config: Mapping[str, Any], kind: str, weights: Weights) -> Draft:
    draft: Draft = {}
    if kind in ("beit", "data2vec-vision"):
        relative = "none"
        if config.get("use_relative_position_bias"):
            relative = "layer"
        elif config.get("use_shared_relative_position_bias"):
            relative = "shared"
        absolute = bool(config.get("use_absolute_position_embeddings"))
        scale = config.get("layer_scale_init_value", 0.1)
        draft = {
            "position": "learned" if absolute else "none",
            "layer": {"layer_scale": scale or None, "attention": {"relative_bias": relative}},
        }
        if "pooler.layernorm.weight" in weights:
            draft |= {"pooling": "mean", "head": {"norm": "pooled"}}
        elif "layernorm.weight" not in weights:
            draft["head"] = {"norm": "none"}
    has_head = any(f"{name}.weight" in weights for name in _HEADS)
    if kind in ("vit", "deit") and "pooler.dense.weight" in weights and not has_head:
        draft["head"] = {"hidden_dim": weights.shape("pooler.dense.weight")[0]}
    if kind == "deit":
        second = "distillation_classifier.weight" in weights
        draft["head"] = {**draft.get("head", {}), "distillation_head": second}
    return draft


def _dinov2_options(config: Mapping[str, Any], kind: str, weights: Weights) -> Draft:
    draft: Draft = {"layer": {"layer_scale": config.get("layerscale_value", 1.0)}}
    if kind == "dinov2_with_registers":
        draft["embedding"] = {"register_tokens": config["num_register_tokens"]}
    if "classifier.weight" in weights:
        draft["pooling"] = "class_mean"
    return draft


def _dinov3_options(config: Mapping[str, Any], kind: str, weights: Weights) -> Draft:
    del kind, weights
    which = "".join(
        letter
        for letter, name, default in (("q", "query", True), ("k", "key", False), ("v", "value", True))
        if config.get(f"{name}_bias", default)
    )
    if which not in ("qkv", "qv", ""):
        raise VitralError(
            f"only {' and '.join(which)} of q, k and v have biases; Vitral knows all, q and v, or none"
        )
    return {
        "embedding": {"register_tokens": config["num_register_tokens"]},
        "layer": {
            "layer_scale": config.get("layerscale_value", 1.0),
            "attention": {
                "biases": which or "none",
                "out_bias": config.get("proj_bias", True),
                "rotary": {"temperature": config["rope_theta"]},
            },
            "feed_forward": {
                "gated": bool(config.get("use_gated_mlp")),
                "bias": config.get("mlp_bias", True),
            },
        },
    }


def _clip_options(config: Mapping[str, Any], kind: str, weights: Weights) -> Draft:
    del config
    classifier = "classifier.weight" in weights
    if kind == "clip_vision_model":
        # Its classifier is on the mean of patch tokens as the last layer left them.
        mean = {"pooling": "mean", "embedding": {"class_token": True}, "head": {"norm": "none", "bias": True}}
        return mean if classifier else {}
    return {"pooling": "mean"} if classifier or "head.probe" not in weights else {}


_OPTIONS = {
    "vit": _vit_options,
    "dinov2": _dinov2_options,
    "dinov3": _dinov3_options,
    "clip": _clip_options,
    "siglip2": _clip_options,
}


# --- Preprocessing -------------------------------------------------------------------------------

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_ONE_SIDE = ("CLIP", "Bit", "Siglip")  # their sizes of one number are the shorter side's; others' are both


# What the models that each family's authors published come with.
_SQUASHED: Draft = {"resize": "squash", "interpolation": "bilinear"}
_COVERED: Draft = {"crop_fraction": 0.875, "interpolation": "bicubic", **IMAGENET}
_PUBLISHED: dict[str, Draft] = {
    "vit": _SQUASHED,
    "deit": {**_COVERED, "resize": "squash"},
    "vit_mae": {**_SQUASHED, **IMAGENET},
    "vit_msn": {**_SQUASHED, **IMAGENET},
    "ijepa": {**_SQUASHED, **IMAGENET},
    "beit": _SQUASHED,
    "data2vec-vision": _SQUASHED,
    "dinov2": _COVERED,
    "dinov2_with_registers": _COVERED,
    "dinov3_vit": {**_SQUASHED, **IMAGENET},
    "clip_vision_model": {"interpolation": "bicubic", **CLIP},
    "siglip_vision_model": {"resize": "squash", "interpolation": "bicubic"},
    "siglip2_vision_model": _SQUASHED,
}


def _preprocess(
    about: Mapping[str, Any], img_size: tuple[int, int], kind: str = "vit", in_channels: int = 3
) -> Preprocess:
    """From a ``preprocessor_config.json``; without one, as the family's published models."""
    if not about:
        return Preprocess(img_size, **_per_channel(_PUBLISHED[kind], in_channels))
    size, crop = about.get("size"), about.get("crop_size") if about.get("do_center_crop") else None
    processor = about.get("image_processor_type") or about.get("feature_extractor_type") or ""
    if isinstance(size, int) and processor.startswith(_ONE_SIDE):
        size = {"shortest_edge": size}
    resized, squash = _sides(size, img_size)
    target = _sides(crop, img_size)[0] if crop else resized
    if not squash and not crop:
        target = img_size
    scale = 255 * about.get("rescale_factor", 1 / 255) if about.get("do_rescale", True) else 255.0
    normalize = about.get("do_normalize", True)
    mean = per_channel((about.get("image_mean") or IMAGENET["mean"]) if normalize else [0.0], in_channels)
    std = per_channel((about.get("image_std") or IMAGENET["std"]) if normalize else [1.0], in_channels)
    return Preprocess(
        target,
        resize="squash" if squash else "shortest",
        crop_fraction=min(target[0] / resized[0], 1.0),
        interpolation=_RESAMPLE.get(about.get("resample", 2), "bilinear"),  # type: ignore[arg-type]
        # They normalize pixels * rescale_factor; ours are pixels / 255.
        mean=tuple(value / scale for value in mean),  # pyrefly: ignore[bad-argument-type]
        std=tuple(value / scale for value in std),  # pyrefly: ignore[bad-argument-type]
        crop_rounding="down",
    )


def _per_channel(options: Draft, in_channels: int) -> Draft:
    halves = {"mean": (0.5,), "std": (0.5,)} | options
    return halves | {name: per_channel(halves[name], in_channels) for name in ("mean", "std")}


def _sides(size: Any, img_size: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    """(height, width) and whether the aspect is given up."""
    if isinstance(size, Mapping):
        if size.get("shortest_edge"):
            return height_and_width(size["shortest_edge"]), False
        if size.get("height"):
            return (size["height"], size["width"]), True
        return img_size, True
    if isinstance(size, Sequence):
        return (size[0], size[1]), True
    return (height_and_width(size), True) if size else (img_size, True)


# --- Writing -------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint) -> Writing:
    """A hub folder that the ``model_type`` nearest to the model loads: config, preprocessing, weights."""
    config = checkpoint.model.config
    kind, known = _home(checkpoint, _model_type(config))
    family = FAMILIES[kind]
    architecture, prefix = _CLASSES[kind][0 if config.num_classes == 0 else 1]
    if config.head.distillation_head:
        architecture += "WithTeacher"
    described = {
        **known,
        "architectures": [architecture],
        "model_type": kind,
        "dtype": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
        **_common(config),
        **_WRITTEN[family.keys](config, kind),
    }
    if checkpoint.multi_label or checkpoint.metadata.get("regression"):
        described["problem_type"] = MULTI_LABEL if checkpoint.multi_label else REGRESSION
    # A head without names is as long all the same; a projection of CLIP's is no classifier.
    numbered = tuple(f"LABEL_{index}" for index in range(config.num_classes)) if config.head.bias else ()
    if labels := checkpoint.labels or numbered:
        described["id2label"] = {str(index): label for index, label in enumerate(labels)}
        described["label2id"] = {label: index for index, label in enumerate(labels)}
    return Writing(
        _written_rows(config, kind),
        "model.safetensors",
        {"config.json": described, PREPROCESSOR_FILE: _preprocessor(checkpoint.preprocess, kind)},
        family.prefix if prefix else "",
        r"classifier\.|^visual_projection\.",
    )


# For each model_type the class without a head and with one, and whether its encoder's keys have the prefix.
_CLASSES = {
    "vit": (("ViTModel", False), ("ViTForImageClassification", True)),
    "deit": (("DeiTModel", False), ("DeiTForImageClassification", True)),
    "vit_mae": (("ViTMAEModel", False), ("ViTForImageClassification", True)),
    "vit_msn": (("ViTMSNModel", False), ("ViTMSNForImageClassification", True)),
    "ijepa": (("IJepaModel", False), ("IJepaForImageClassification", True)),
    "beit": (("BeitModel", False), ("BeitForImageClassification", True)),
    "data2vec-vision": (("Data2VecVisionModel", False), ("Data2VecVisionForImageClassification", True)),
    "dinov2": (("Dinov2Model", False), ("Dinov2ForImageClassification", True)),
    "dinov2_with_registers": (
        ("Dinov2WithRegistersModel", False),
        ("Dinov2WithRegistersForImageClassification", True),
    ),
    "dinov3_vit": (("DINOv3ViTModel", False), ("DINOv3ViTModel", False)),
    "clip_vision_model": (("CLIPVisionModel", False), ("CLIPVisionModelWithProjection", True)),
    "siglip_vision_model": (("SiglipVisionModel", False), ("SiglipVisionModel", False)),
}


# The kinds whose code computes the same as another's, so that a model goes home to the one that it came from.
_ALIKE = {
    "vit": ("vit_mae", "vit_msn", "deit"),
    "vit_msn": ("vit_mae",),
    "siglip_vision_model": ("ijepa",),
    "beit": ("data2vec-vision",),
    "data2vec-vision": ("beit",),
    "dinov2": ("dinov2_with_registers",),
}
# What of a config is about how it was saved, not about what the model is.
_OF_SAVING = (
    "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "problem_type",
    "num_labels", "_num_labels", "quantization_config",
)  # fmt: skip


def takes_class_and_mean(config: ViTConfig) -> bool:
    """Whether the only classifier of the model's kind reads the class token and the patches' mean."""
    kinds = ("dinov2", "dinov2_with_registers")
    return bool(config.num_classes) and config.pooling in ("class", "mean") and _model_type(config) in kinds


def lacks_classifier(config: ViTConfig) -> str | None:
    """Why the library has no class for the model's head, if so."""
    kind = _model_type(config)
    if not config.num_classes or config.stem:
        return None
    if kind == "dinov3_vit":
        return "it has no classifier for DINOv3's family (rotary positions)"
    if kind == "siglip_vision_model" and config.pooling == "map":
        return "its classifier for SigLIP's family reads the mean of tokens, this one an attention pool"
    if kind == "clip_vision_model" and config.pooling == "class" and config.head.bias:
        return (
            "what it has on CLIP's class token is a projection without a bias, this is a classifier with one"
        )
    return None


def _home(checkpoint: Checkpoint, kind: str) -> tuple[str, Mapping[str, Any]]:
    """The model_type that the model came from, and what else its config says, if its code is as good."""
    origin = checkpoint.metadata.get("origin", {}).get("config", {})
    came_from = _TOWERS.get(origin.get("model_type"), origin.get("model_type"))
    plain = not checkpoint.model.config.num_classes or came_from != "vit_mae"
    if came_from == kind or (came_from in _ALIKE.get(kind, ()) and plain):
        tower = origin.get("vision_config", origin) if origin.get("model_type") in _TOWERS else origin
        return came_from, {name: value for name, value in tower.items() if name not in _OF_SAVING}
    return kind, {}


def _model_type(config: ViTConfig) -> str:
    """The one whose code computes what the model does, or comes nearest."""
    embedding, attention = config.embedding, config.layer.attention
    if attention.rotary is not None:
        return "dinov3_vit"
    if attention.relative_bias != "none" or attention.biases == "qv":
        # Without a head, only data2vec's class has no norm after the layers.
        return "beit" if config.head.norm != "none" else "data2vec-vision"
    if embedding.norm:
        return "clip_vision_model"
    if config.pooling == "map" or (config.pooling == "mean" and not config.num_classes):
        return "siglip_vision_model"
    if embedding.register_tokens:
        return "dinov2_with_registers"
    if config.layer.layer_scale is not None or config.pooling == "class_mean":
        return "dinov2"
    if embedding.distillation_token:
        return "deit"
    if config.pooling == "mean":
        return "ijepa"
    # ViTModel always has the tanh layer that it calls a pooler; ViTMSNModel is the same without.
    return "vit" if config.num_classes or config.head.hidden_dim else "vit_msn"


def _written_rows(config: ViTConfig, kind: str) -> list[Row]:
    """Of the names that one tensor of ours may have, those of this class."""
    gated, keys = config.layer.feed_forward.gated, FAMILIES[kind].keys
    unused = {
        "vit": r"^classifier" if config.head.distillation_head else r"^cls_classifier",
        "dinov2": r"mlp\.fc[12]" if gated else r"weights_(in|out)",
        "dinov3": r"^(?!.*gate_proj).*up_proj" if gated else r"gate_proj",
        "clip": r"^classifier" if config.pooling == "class" else r"^visual_projection",
    }[keys]
    return [r for r in _STYLES[keys](config) if not re.search(unused, " ".join(r.theirs))]


def _common(config: ViTConfig) -> Draft:
    height, width = height_and_width(config.img_size)
    acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    acts["gelu_tanh"] = "gelu_pytorch_tanh"
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "hidden_act": acts[config.layer.feed_forward.activation],
        "layer_norm_eps": config.norm.eps,
    }


def _write_vit(config: ViTConfig, kind: str) -> Draft:
    if kind not in ("beit", "data2vec-vision"):
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


def _write_dinov2(config: ViTConfig, kind: str) -> Draft:
    gated = config.layer.feed_forward.gated
    ratio = next(
        (r for r in range(1, 17) if _dinov2_width(config.embed_dim, r, gated=gated) == config.hidden_dim), 0
    )
    if not ratio:
        raise VitralError(
            f"transformers cannot hold this model: an MLP of width {config.hidden_dim} is none of DINOv2's "
            f"for embed_dim {config.embed_dim}"
        )
    registers = {"num_register_tokens": config.embedding.register_tokens}
    return {
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "layerscale_value": config.layer.layer_scale,
        "qkv_bias": config.layer.attention.biases == "qkv",
        **(registers if kind == "dinov2_with_registers" else {}),
    }


def _write_dinov3(config: ViTConfig, kind: str) -> Draft:
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


def _write_clip(config: ViTConfig, kind: str) -> Draft:
    if kind == "clip_vision_model":
        return {"projection_dim": config.num_classes} if config.num_classes else {}
    return {"vision_use_head": config.pooling == "map"}


_WRITTEN = {"vit": _write_vit, "dinov2": _write_dinov2, "dinov3": _write_dinov3, "clip": _write_clip}

_PROCESSORS = {"clip": "CLIPImageProcessor", "dinov2": "BitImageProcessor"}


def _preprocessor(preprocess: Preprocess, kind: str) -> Draft:
    height, width = preprocess.img_size
    numbers = {ours: theirs for theirs, ours in _RESAMPLE.items()}
    about: Draft = {
        "image_processor_type": _PROCESSORS.get(FAMILIES[kind].keys, "ViTImageProcessor"),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "resample": numbers[preprocess.interpolation],
    }
    if preprocess.resize == "longest":
        raise VitralError(
            "transformers cannot hold this model: its image processors do not pad the longest side"
        )
    larger_h, larger_w = (int(side / preprocess.crop_fraction + 1e-6) for side in (height, width))
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    if preprocess.resize == "squash":
        # DeiT's class is ViT's with a crop.
        about["image_processor_type"] = (
            "ViTImageProcessor" if preprocess.crop_fraction == 1 else "DeiTImageProcessor"
        )
        size = {"size": {"height": larger_h, "width": larger_w}}
        return about | size | (crop if preprocess.crop_fraction < 1 else {})
    if about["image_processor_type"] == "ViTImageProcessor":
        about["image_processor_type"] = "BitImageProcessor"
    return about | {"size": {"shortest_edge": min(larger_h, larger_w)}} | crop
