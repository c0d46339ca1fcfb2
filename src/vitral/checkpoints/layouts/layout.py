"""What a layout of another library is: how it is recognized, read and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.formats.weights import Weights
from vitral.checkpoints.layouts.key_table import Row
from vitral.checkpoints.sidecar import Sidecar
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig
from vitral.runtime.errors import VitralError

Draft = dict[str, Any]  # fields of a ViTConfig, its groups as mappings

# Heads are 64 channels wide, but for these widths (timm's and the authors' models).
_HEADS = {
    64: 2, 96: 3, 1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16, 2048: 16, 2432: 32, 3072: 24, 4096: 32,
}  # fmt: skip
_USUAL_WIDTHS = {*_HEADS, 128, 192, 256, 320, 384, 512, 640, 768, 832, 896, 1024, 1536}


@dataclass(frozen=True)
class RawCheckpoint:
    """The files of a checkpoint of another library, opened but not understood."""

    name: str  # as the user wrote it
    path: Path  # the folder or file
    weights: Weights
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json, if there is one
    preprocessor: Mapping[str, Any] = field(default_factory=dict)  # of the images, by transformers' libraries
    licence: str | None = None
    open_clip: Mapping[str, Any] = field(default_factory=dict)  # open_clip_config.json, if there is one
    sidecar: Sidecar = field(default_factory=Sidecar)  # what `convert` kept of a model of ours


@dataclass(frozen=True)
class Reading:
    """What a layout makes of a raw checkpoint."""

    draft: Draft
    rows: Callable[[ViTConfig], Sequence[Row]]
    weights: Weights  # under the names of `rows`
    preprocess: Callable[[tuple[int, int]], Preprocess]  # from the model's image size
    labels: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)  # what the way back needs
    ignored: str = "(?!)"  # a pattern of keys that are no part of the model
    multi_label: bool = False  # whether it was trained with a sigmoid, where its files say so
    regression: bool = False  # whether its numbers are no logits of classes, where its files say so
    notes: tuple[str, ...] = ()  # `Checkpoint.notes`


@dataclass(frozen=True)
class Writing:
    """What a layout makes of a model: its key table, and the files that describe it."""

    rows: Sequence[Row]
    weights_file: str
    descriptions: Mapping[str, Mapping[str, Any]]  # file name -> content, written as JSON
    prefix: str = ""  # before all keys but those of `beside`
    beside: str = "(?!)"  # a pattern of keys that have no prefix, such as those of a head
    constants: Mapping[str, Tensor] = field(default_factory=dict)  # for keys that `rows` leave out


@dataclass(frozen=True)
class Layout:
    """How one library keeps its checkpoints."""

    name: str
    recognizes: Callable[[RawCheckpoint], bool]
    read: Callable[[RawCheckpoint, Mapping[str, Any]], Reading]  # the second: fields that the user asked for
    write: Callable[[Checkpoint], Writing] | None = None  # None: read only


def usual_heads(raw: RawCheckpoint, width: int, asked: Mapping[str, Any]) -> int:
    """Tells how many heads a model of this width has, which no tensor says.

    Raises:
        VitralError: if it is not known and not among the `asked` fields.
    """
    if "num_heads" in asked:
        return asked["num_heads"]
    if width not in _USUAL_WIDTHS:
        raise VitralError(
            f"{raw.name}: the weights do not say how many heads a width of {width} has; pass num_heads=..."
        )
    return _HEADS.get(width, width // 64)


def square(count: int) -> int | None:
    """Returns the side of a square grid of `count` patches, if it is one."""
    side = isqrt(count)
    return side if side * side == count > 0 else None


def count_layers(weights: Weights, pattern: str) -> int:
    """Counts the layers of keys such as ``blocks.{i}.norm1.weight``."""
    count = 0
    while pattern.replace("{i}", str(count)) in weights:
        count += 1
    return count
