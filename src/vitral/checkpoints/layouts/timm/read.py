"""From timm's files to a description of the model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vitral.checkpoints.formats.weights import Renamed
from vitral.checkpoints.layouts.labels import assumed_labels
from vitral.checkpoints.layouts.layout import Draft, RawCheckpoint, Reading
from vitral.checkpoints.layouts.preprocessing import assumed_note, timm_published
from vitral.checkpoints.layouts.timm.families import family_of, layer, rotary
from vitral.checkpoints.layouts.timm.keys import rows
from vitral.checkpoints.layouts.timm.preprocessing import read_preprocess
from vitral.checkpoints.layouts.timm.shapes import read_shapes
from vitral.model.config import height_and_width
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import deep_merge

_PLAIN = re.compile(r"(vit|naflexvit|flexivit|deit3?|eva|eva02|beit|beitv2|beit3|aimv2)_\w+")
_POOLING = {"token": "class", "avg": "mean", "map": "map"}
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_erf": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip
_WRAPPED = "timm_model."  # by transformers' TimmWrapper classes


def recognizes(raw: RawCheckpoint) -> bool:
    return isinstance(_config(raw).get("architecture"), str)


def _config(raw: RawCheckpoint) -> Mapping[str, Any]:
    """Returns a hub folder's config; of a bare file, what timm's training script saves with the weights."""
    if raw.config:
        return raw.config
    name, told = raw.weights.about.get("arch"), raw.weights.about.get("args", {})
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        return {}
    if "patch_embed.proj.weight" not in raw.weights:
        return {}
    side = re.search(r"_(\d{3})$", name)
    told = {field: told.get(field) for field in ("mean", "std", "crop_pct", "interpolation")}
    size = {"input_size": (3, int(side[1]), int(side[1]))} if side else {}
    about = timm_published(name) | {field: value for field, value in told.items() if value} | size
    return {"architecture": name, "pretrained_cfg": about}


def read(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    config = _config(raw)
    name, arguments = config["architecture"], config.get("model_args") or {}
    about = config.get("pretrained_cfg") or config
    weights = raw.weights
    if all(key.startswith(_WRAPPED) for key in weights):
        weights = Renamed(weights, {key.removeprefix(_WRAPPED): key for key in weights})
    family, told = family_of(name), _read_arguments(arguments)
    size = arguments.get("img_size") or tuple(about.get("input_size", (3, 224, 224)))[1:]
    pooling = arguments.get("global_pool") or config.get("global_pool")
    shapes = read_shapes(
        replace(raw, weights=weights), deep_merge(family, told, asked), height_and_width(_as_size(size))
    )
    draft = deep_merge(
        shapes,
        {"embedding": {"resize": "bicubic_antialias"}},
        family,
        {"pooling": _POOLING[pooling]} if pooling in _POOLING else {},
        told,
    )
    labels, notes = _labels(raw, config, about, draft["num_classes"])
    if not about.get("mean"):
        notes += assumed_note(raw, asked, "published models of that name take")
    prepared = timm_published(name) | dict(about)
    return Reading(
        draft,
        rows,
        weights,
        lambda img_size: read_preprocess(prepared, img_size, draft["in_channels"]),
        labels,
        {"architecture": name, "model_args": dict(arguments), "tag": about.get("tag")},
        multi_label=config.get("problem_type") == "multi_label_classification",
        regression=config.get("problem_type") == "regression",
        notes=notes,
    )


def _labels(
    raw: RawCheckpoint, config: Mapping[str, Any], about: Mapping[str, Any], classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names the classes, with a note on them. Raises ValueError if others are named than there are."""
    names = about.get("label_names") or config.get("label_names")
    if isinstance(names, Mapping):
        names = list(names.values())
    if names and all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = None
    if names and classes:
        if len(names) != classes:
            raise ValueError(f"label_names are {len(names)}, its head has {classes} classes")
        return tuple(names), ()
    labels = assumed_labels(raw, classes, about.get("tag"), about.get("hf_hub_id"))
    changed = config.get("model_args") and labels[:1] == ("tench",)
    tag = about.get("tag")
    told = (
        f"{raw.name} does not name its 1,000 classes; Vitral takes ImageNet's names, because it is tagged "
        f"{tag}"
    )
    return labels, (told,) if changed else ()


def _as_size(size: Any) -> Any:
    return tuple(size) if isinstance(size, Sequence) else size


def _read_arguments(arguments: Mapping[str, Any]) -> Draft:
    """Reads of ``model_args`` what no tensor says."""
    draft: Draft = {}
    if "num_heads" in arguments:
        draft["num_heads"] = arguments["num_heads"]
    if isinstance(arguments.get("act_layer"), str):
        if arguments["act_layer"] not in _ACTIVATIONS:
            raise VitralError(f"act_layer {arguments['act_layer']!r} is not among {', '.join(_ACTIVATIONS)}")
        draft = deep_merge(draft, layer(feed_forward={"activation": _ACTIVATIONS[arguments["act_layer"]]}))
    if "use_post_norm" in arguments:
        draft = deep_merge(draft, layer(order="residual_post" if arguments["use_post_norm"] else "pre"))
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
    return rotary(**found) if found else {}
