"""Decides how a checkpoint's images are prepared when none of its files says so.

Each library's models are then prepared as those that it published: a table for each library. The user is
told what was taken (`assumed_note`) unless all published models of that kind take the same.
"""

import re
from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.layouts.layout import Draft, RawCheckpoint
from vitral.images.preprocess import Preprocess
from vitral.runtime.settings import deep_merge

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_HALVES = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

_SQUASHED: Draft = {"resize": "squash", "interpolation": "bilinear"}
# The shorter side to 256 of 224 pixels.
_COVERED: Draft = {"crop_fraction": 0.875, "interpolation": "bicubic", **IMAGENET}


def prepare(img_size: tuple[int, int], in_channels: int, options: Mapping[str, Any]) -> Preprocess:
    """Makes a Preprocess with as many means and deviations as the model has channels."""
    filled: Draft = _HALVES | dict(options)
    for_each: Draft = {name: per_channel(filled[name], in_channels) for name in ("mean", "std")}
    return Preprocess(img_size, **(filled | for_each))


def per_channel(values: Any, in_channels: int = 3) -> tuple[float, ...]:
    """Returns a number for each channel, from one or three in JSON. Raises ValueError if they are no numbers.

    Of models of another count than the numbers', timm repeats a single one; three become their mean.
    """
    numbers = tuple(float(value) for value in values)
    if len(numbers) == in_channels:
        return numbers
    return (sum(numbers) / len(numbers),) * in_channels


def assumed_note(raw: RawCheckpoint, asked: Mapping[str, Any], taken: str) -> tuple[str, ...]:
    """Says what was taken, unless the user `asked` for another."""
    if "preprocess" in asked:
        return ()
    return (
        f"{raw.name} does not say how its images were prepared; Vitral takes what {taken}. If that is wrong: "
        "vitral convert MODEL OUT preprocess.mean=[...] preprocess.std=[...]",
    )


# --- timm, by the architecture's name; all rows that match apply, later ones over earlier ones -----

_TIMM: tuple[tuple[str, Draft], ...] = (
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


def timm_published(architecture: str) -> Draft:
    """Returns the fields of a ``pretrained_cfg`` that go with an architecture's name."""
    return deep_merge(*(draft for pattern, draft in _TIMM if re.search(pattern, architecture)))


# --- transformers, by model_type --------------------------------------------------------------------

_TRANSFORMERS: dict[str, Draft] = {
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


def transformers_published(kind: str, img_size: tuple[int, int], in_channels: int) -> Preprocess:
    """Prepares images as the authors of a ``model_type``'s models do."""
    return prepare(img_size, in_channels, _TRANSFORMERS[kind])


# --- Files without a config -------------------------------------------------------------------------


def google(img_size: tuple[int, int]) -> Preprocess:
    """Prepares images as Google's pipelines: to the square whatever the aspect, scaled to -1..1."""
    return Preprocess(img_size, **_SQUASHED)


def dinov2(img_size: tuple[int, int], in_channels: int) -> Preprocess:
    """Prepares images as DINO, DINOv2, DeiT and MAE are evaluated."""
    return prepare(img_size, in_channels, _COVERED)


def dinov3(img_size: tuple[int, int], in_channels: int) -> Preprocess:
    return prepare(img_size, in_channels, {**_SQUASHED, **IMAGENET})


def clip(img_size: tuple[int, int], in_channels: int, open_clip: Mapping[str, Any]) -> Preprocess:
    """Prepares images as OpenCLIP's config says, and otherwise as OpenAI's models."""
    told = open_clip.get("preprocess_cfg") or {}
    options = {
        "mean": told.get("mean") or CLIP["mean"],
        "std": told.get("std") or CLIP["std"],
        "interpolation": told.get("interpolation") or "bicubic",
        "resize": told.get("resize_mode") or "shortest",
    }
    return prepare(img_size, in_channels, options)


def torchvision(img_size: tuple[int, int], width: int, patch: int) -> Preprocess:
    """Prepares images as for torchvision's weights: at 224 px trained there, above from SWAG end to end.

    SWAG's linear probes are of 224 px too, and only H/14, which was not trained there, is told from them.
    """
    if img_size == (224, 224) and patch != 14:
        resized = 242 if (width, patch) == (1024, 16) else 256
        return Preprocess(img_size, crop_fraction=224 / resized, interpolation="bilinear", **IMAGENET)
    return Preprocess(img_size, interpolation="bicubic", **IMAGENET)
