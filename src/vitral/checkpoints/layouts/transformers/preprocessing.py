"""transformers' ``preprocessor_config.json``, both ways."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitral.checkpoints.layouts.layout import Draft
from vitral.checkpoints.layouts.preprocessing import IMAGENET, per_channel, transformers_published
from vitral.checkpoints.layouts.transformers.families import FAMILIES
from vitral.images.preprocess import Preprocess
from vitral.model.config import height_and_width
from vitral.runtime.errors import VitralError

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # since version 5, of models with a text tower
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_ONE_SIDE = ("CLIP", "Bit", "Siglip")  # their sizes of one number are the shorter side's; others' are both


def read_preprocess(
    about: Mapping[str, Any], img_size: tuple[int, int], kind: str = "vit", in_channels: int = 3
) -> Preprocess:
    """Reads a ``preprocessor_config.json``; without one, as the family's published models."""
    if not about:
        return transformers_published(kind, img_size, in_channels)
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


def _sides(size: Any, img_size: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    """Returns (height, width) and whether the aspect is given up."""
    if isinstance(size, Mapping):
        if size.get("shortest_edge"):
            return height_and_width(size["shortest_edge"]), False
        if size.get("height"):
            return (size["height"], size["width"]), True
        return img_size, True
    if isinstance(size, Sequence):
        return (size[0], size[1]), True
    return (height_and_width(size), True) if size else (img_size, True)


def write_preprocessor(preprocess: Preprocess, kind: str) -> Draft:
    height, width = preprocess.img_size
    numbers = {ours: theirs for theirs, ours in _RESAMPLE.items()}
    about: Draft = {
        "image_processor_type": FAMILIES[kind].style.processor,
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
