"""What every foreign layout gives: recognition, a config, a key table, preprocessing; and the way back."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

from vitral.checkpoints.formats import Weights
from vitral.checkpoints.layouts.tables import Row
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError

Draft = dict[str, Any]  # fields of a ViTConfig, its groups as mappings

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

# Heads are 64 channels wide, but for these widths (timm's and the authors' models).
_HEADS = {
    64: 2, 96: 3, 1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16, 2048: 16, 2432: 32, 3072: 24, 4096: 32,
}  # fmt: skip
_USUAL_WIDTHS = {*_HEADS, 128, 192, 256, 320, 384, 512, 640, 768, 832, 896, 1024, 1536}


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that its use needs."""

    model: VisionTransformer
    preprocess: Preprocess
    labels: tuple[str, ...]  # empty for a model without a head
    metadata: dict[str, Any] = field(default_factory=dict)  # where it comes from, how data was split
    temperature: float = 1.0  # probabilities are softmax(logits / temperature); fitted on held-out images
    multi_label: bool = False  # each class for itself: probabilities are sigmoid(logits / temperature)
    notes: tuple[str, ...] = ()  # what no file of the source states, and what was taken; for the user to read


@dataclass(frozen=True)
class Record:
    """What a converted model has that its layout has no place for."""

    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the training: which images were held out
    labels: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    multi_label: bool | None = None

    def completed(self, found: Checkpoint) -> Checkpoint:
        """What was read, with what its files do not say."""
        fitting = len(self.labels) == found.model.config.num_classes
        multi_label = found.multi_label if self.multi_label is None else self.multi_label
        return replace(
            found,
            labels=self.labels if self.labels and fitting else found.labels,
            preprocess=self.preprocess or found.preprocess,
            multi_label=multi_label,
            notes=() if self.preprocess else found.notes,
        )


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was found."""

    name: str  # as the user wrote it
    path: Path  # the folder or file
    weights: Weights
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json, if there is one
    preprocessor: Mapping[str, Any] = field(default_factory=dict)  # of the images, by transformers' libraries
    licence: str | None = None
    open_clip: Mapping[str, Any] = field(default_factory=dict)  # open_clip_config.json, if there is one
    record: Record = field(default_factory=Record)  # what `convert` kept of a model of ours


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
    regression: bool = False  # whether its numbers are no logits of classes, where the source says
    notes: tuple[str, ...] = ()  # what no file of the source states, and what was taken


@dataclass(frozen=True)
class Writing:
    """What a layout makes of a model: its key table, and the files that describe it."""

    rows: Sequence[Row]
    weights_file: str
    descriptions: Mapping[str, Mapping[str, Any]]  # file name -> content, written as JSON
    prefix: str = ""  # before all keys but those of `beside`
    beside: str = "(?!)"  # a pattern of keys that have no prefix, such as those of a head


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


def labels_of(source: Source, num_classes: int, *stated: Any) -> tuple[str, ...]:
    """Names for the classes of a head that does not say them.

    A thousand classes are ImageNet-1k's only if the source's name, as it is published, or what a config
    has `stated` of its weights says so; others are numbered.
    """
    name = source.name if source.name.startswith("hf://") else Path(source.name).name
    says = any(_IMAGENET.search(str(text)) for text in stated if text) or _IMAGENET.search(name)
    if num_classes == 1000 and (says or _PUBLISHED.fullmatch(name)):
        return imagenet_labels()
    return tuple(f"class {index}" for index in range(num_classes))


def imagenet_labels() -> tuple[str, ...]:
    """The names of ImageNet-1k's thousand classes, as torchvision has them."""
    from torchvision.models import ViT_B_16_Weights

    return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])


_IMAGENET = re.compile(r"in1k|imagenet(?![-_]?2[12]k)|ilsvrc", re.IGNORECASE)
# Files as they are published: torchvision's, DeiT's and DeiT-III's, MAE's, Google's.
_PUBLISHED = re.compile(
    r"(vit_\w_\d+\w*|deit_\w+)-[0-9a-f]{8}\.pth|deit_3_\w+_(1|21)k\.pth|mae_finetuned_\w+\.pth"
    r"|ViT-[A-Z]_\d+\.npz"
)


def per_channel(values: Any, in_channels: int = 3) -> tuple[float, ...]:
    """A number for each channel, from one or three in JSON. Raises ValueError if they are no numbers.

    Of models of another count than the numbers', timm repeats a single one; three become their mean.
    """
    numbers = tuple(float(value) for value in values)
    if len(numbers) == in_channels:
        return numbers
    return (sum(numbers) / len(numbers),) * in_channels


def no_preprocessing(source: Source, asked: Mapping[str, Any], taken: str) -> tuple[str, ...]:
    """The note for a source that does not state how its images are prepared, unless it was `asked` for."""
    if "preprocess" in asked:
        return ()
    return (
        f"{source.name} does not say how its images were prepared; taken is what {taken}. If that is wrong: "
        "vitral convert MODEL OUT preprocess.mean=[...] preprocess.std=[...]",
    )
