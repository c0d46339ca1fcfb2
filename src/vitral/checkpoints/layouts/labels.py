"""Names for the classes of a head that does not say them."""

import re
from pathlib import Path
from typing import Any

from vitral.checkpoints.layouts.layout import RawCheckpoint

_IMAGENET = re.compile(r"in1k|imagenet(?![-_]?2[12]k)|ilsvrc", re.IGNORECASE)
# Files as they are published: torchvision's, DeiT's and DeiT-III's, MAE's, Google's.
_PUBLISHED = re.compile(
    r"(vit_\w_\d+\w*|deit_\w+)-[0-9a-f]{8}\.pth|deit_3_\w+_(1|21)k\.pth|mae_finetuned_\w+\.pth"
    r"|ViT-[A-Z]_\d+\.npz"
)


def assumed_labels(raw: RawCheckpoint, num_classes: int, *stated: Any) -> tuple[str, ...]:
    """Names the classes of a head.

    A thousand classes are ImageNet-1k's only if the checkpoint's name, as it is published, or what a config
    has `stated` of its weights says so; others are numbered.
    """
    name = raw.name if raw.name.startswith("hf://") else Path(raw.name).name
    says = any(_IMAGENET.search(str(text)) for text in stated if text) or _IMAGENET.search(name)
    if num_classes == 1000 and (says or _PUBLISHED.fullmatch(name)):
        return imagenet_labels()
    return tuple(f"class {index}" for index in range(num_classes))


def imagenet_labels() -> tuple[str, ...]:
    """Returns the names of ImageNet-1k's thousand classes, as torchvision has them."""
    from torchvision.models import ViT_B_16_Weights

    return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
