"""What every foreign layout gives: recognition, a config, a key table, preprocessing; and the way back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import isqrt
from pathlib import Path
from typing import Any

from vitral.checkpoints.files import Weights
from vitral.checkpoints.tables import Row
from vitral.config import merged
from vitral.errors import VitralError
from vitral.model import VisionTransformer, ViTConfig
from vitral.preprocess import Preprocess

Draft = dict[str, Any]  # fields of a ViTConfig, its groups as mappings

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

# Heads are 64 channels wide, but for these widths (timm's and the authors' models).
_HEADS = {
    64: 2, 96: 3, 1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16, 2048: 16, 2432: 32, 3072: 24, 4096: 32,
}  # fmt: skip
_USUAL_WIDTHS = {*_HEADS, 128, 192, 256, 320, 384, 512, 640, 768, 832, 896, 1024, 1536}


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was found."""

    name: str  # as the user wrote it
    path: Path  # the folder or file
    weights: Weights
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json, if there is one
    preprocessor: Mapping[str, Any] = field(default_factory=dict)  # preprocessor_config.json, if there is one
    licence: str | None = None


@dataclass(frozen=True)
class Reading:
    """What a layout makes of a source."""

    draft: Draft
    rows: Callable[[ViTConfig], Sequence[Row]]
    weights: Weights  # under the names of `rows`
    preprocess: Callable[[tuple[int, int]], Preprocess]  # from the model's image size
    labels: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)  # what the way back needs
    ignored: str = "(?!)"  # a pattern of keys that are no part of the model
    multi_label: bool = False  # whether it was trained with a sigmoid, where the source says


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that its use needs."""

    model: VisionTransformer
    preprocess: Preprocess
    labels: tuple[str, ...]  # empty for a model without a head
    metadata: dict[str, Any] = field(default_factory=dict)  # where it comes from, how data was split
    temperature: float = 1.0  # probabilities are softmax(logits / temperature); fitted on held-out images
    multi_label: bool = False  # each class for itself: probabilities are sigmoid(logits / temperature)


@dataclass(frozen=True)
class Writing:
    """What a layout makes of a model: its key table, and the files that describe it."""

    rows: Sequence[Row]
    weights_file: str
    descriptions: Mapping[str, Mapping[str, Any]]  # file name -> content, written as JSON
    prefix: str = ""  # before all keys but those of `beside`
    beside: str = "(?!)"  # a pattern of keys that have no prefix, such as those of a head


def merge(*drafts: Mapping[str, Any]) -> Draft:
    """Later ones win, field by field within groups."""
    return reduce(merged, drafts, {})


def usual_heads(source: Source, width: int, asked: Mapping[str, Any]) -> int:
    """How many heads a model of this width has, which no tensor tells.

    Raises:
        VitralError: if it is not known and not among the `asked` fields.
    """
    if "num_heads" in asked:
        return asked["num_heads"]
    if width not in _USUAL_WIDTHS:
        raise VitralError(
            f"{source.name}: the weights do not say how many heads a width of {width} has; pass num_heads=..."
        )
    return _HEADS.get(width, width // 64)


def square(count: int) -> int | None:
    """The side of a square grid of `count` patches, if it is one."""
    side = isqrt(count)
    return side if side * side == count > 0 else None


def count_layers(weights: Weights, pattern: str) -> int:
    """How many layers there are of keys such as ``blocks.{i}.norm1.weight``."""
    count = 0
    while pattern.replace("{i}", str(count)) in weights:
        count += 1
    return count


def imagenet_labels(num_classes: int) -> tuple[str, ...]:
    """Names for the classes of a head that does not say them: ImageNet-1k's for 1,000 classes."""
    if num_classes == 1000:
        from torchvision.models import ViT_B_16_Weights

        return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
    return tuple(f"class {index}" for index in range(num_classes))


def triple(values: Any) -> tuple[float, float, float]:
    """Of RGB, from a list in JSON. Raises ValueError unless there are three numbers."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def unique(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels of which none is another's (ImageNet has two cranes and two maillots)."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return tuple(found)
