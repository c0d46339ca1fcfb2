"""From a hub folder of transformers' to a description of the model."""

from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.formats.weights import Renamed, Weights
from vitral.checkpoints.layouts.labels import assumed_labels
from vitral.checkpoints.layouts.layout import Draft, RawCheckpoint, Reading, square
from vitral.checkpoints.layouts.preprocessing import assumed_note
from vitral.checkpoints.layouts.transformers.families import (
    ACTIVATIONS,
    DEFAULTS,
    FAMILIES,
    MULTI_LABEL,
    REGRESSION,
    TOWERS,
)
from vitral.checkpoints.layouts.transformers.preprocessing import read_preprocess
from vitral.checkpoints.layouts.transformers.style import HEADS, Config
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import deep_merge


def recognizes(raw: RawCheckpoint) -> bool:
    return "model_type" in raw.config


def read(raw: RawCheckpoint, asked: Mapping[str, Any]) -> Reading:
    kind, config = _vision_config(raw)
    family = FAMILIES[kind]
    # transformers writes MSN's layers without the prefix that it gives the rest.
    weights = Renamed(raw.weights, {name.removeprefix(family.prefix): name for name in raw.weights})
    draft = _draft(raw, config, kind, weights)
    return Reading(
        draft,
        family.style.rows,
        weights,
        lambda img_size: read_preprocess(raw.preprocessor, img_size, kind, draft["in_channels"]),
        _labels(raw, draft["num_classes"]),
        {"config": {k: v for k, v in raw.config.items() if k not in ("id2label", "label2id")}},
        rf"mask_token$|{family.ignored}|{family.style.ignored(draft)}",
        multi_label=raw.config.get("problem_type") == MULTI_LABEL,
        regression=raw.config.get("problem_type") == REGRESSION,
        notes=() if raw.preprocessor else assumed_note(raw, asked, f"published models of {kind} take"),
    )


def _vision_config(raw: RawCheckpoint) -> tuple[str, Config]:
    """Returns the model_type of the images' encoder, and its config with its class's defaults."""
    config, kind = dict(raw.config), raw.config["model_type"]
    if kind in TOWERS:
        kind, config = TOWERS[kind], dict(config.get("vision_config", {}))
    if kind not in FAMILIES:
        raise VitralError(
            f"{raw.name}: model_type {kind!r} is not among those that Vitral reads: {', '.join(FAMILIES)}"
        )
    told = {name: value for name, value in config.items() if value is not None}
    return kind, {**DEFAULTS, **FAMILIES[kind].defaults, **told}


def _labels(raw: RawCheckpoint, classes: int) -> tuple[str, ...]:
    """Names the classes. Raises ValueError if ``id2label`` names other classes than there are."""
    names: Mapping[str, Any] = raw.config.get("id2label") or {}
    if all(name in (f"LABEL_{index}", None) for index, name in names.items()):
        return assumed_labels(raw, classes)
    if classes and set(names) != {str(index) for index in range(classes)}:
        raise ValueError(f"id2label names {len(names)} classes, its head has {classes}")
    return tuple(names[str(index)] for index in range(classes))


def _draft(raw: RawCheckpoint, config: Config, kind: str, weights: Weights) -> Draft:
    family, patch = FAMILIES[kind], config["patch_size"]
    if not isinstance(patch, int):
        raise VitralError(f"{raw.name}: patches are {patch} pixels; Vitral's are square")
    if config["hidden_act"] not in ACTIVATIONS:
        raise VitralError(
            f"{raw.name}: hidden_act {config['hidden_act']!r} is not among {', '.join(ACTIVATIONS)}"
        )
    size = config["image_size"]
    if kind == "siglip2_vision_model":
        size = (square(config["num_patches"]) or 1) * patch
    head = next((name for name in HEADS if f"{name}.weight" in weights), None)
    width = config["hidden_size"]
    draft: Draft = {
        "img_size": size if isinstance(size, int) else tuple(size),
        "patch_size": patch,
        "in_channels": config["num_channels"],
        "embed_dim": width,
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config.get("intermediate_size", 4 * width) / width,
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
    return deep_merge(draft, family.draft, family.style.read(config, kind, weights))
