"""timm's ``pretrained_cfg``, both ways."""

from collections.abc import Mapping
from typing import Any

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.layouts.layout import Draft
from vitral.checkpoints.layouts.preprocessing import IMAGENET, per_channel
from vitral.images.preprocess import Preprocess

_CROP_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


def read_preprocess(about: Mapping[str, Any], img_size: tuple[int, int], in_channels: int = 3) -> Preprocess:
    """Reads a ``pretrained_cfg`` as `timm.data.resolve_data_config` does."""
    interpolation = about.get("interpolation") or "bicubic"
    return Preprocess(
        img_size,
        resize=_CROP_MODES[about.get("crop_mode") or "center"],  # type: ignore[arg-type]
        crop_fraction=about.get("crop_pct") or 0.875,
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=per_channel(about.get("mean") or IMAGENET["mean"], in_channels),  # pyrefly: ignore
        std=per_channel(about.get("std") or IMAGENET["std"], in_channels),  # pyrefly: ignore
    )


def write_pretrained_cfg(checkpoint: Checkpoint) -> Draft:
    preprocess, licence = checkpoint.preprocess, checkpoint.metadata.get("licence")
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
        **({"license": licence} if licence else {}),
    }
