"""What families with the same names of keys share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitral.checkpoints.formats.weights import Weights
from vitral.checkpoints.layouts.key_table import Row
from vitral.checkpoints.layouts.layout import Draft
from vitral.model.config import ViTConfig

# The names of a classifier, or of CLIP's projection.
HEADS = ("classifier", "cls_classifier", "visual_projection")

Config = Mapping[str, Any]  # config.json, completed by its class's defaults


@dataclass(frozen=True)
class Style:
    """A key table, and what of ``config.json`` only these families have, both ways."""

    rows: Callable[[ViTConfig], list[Row]]
    read: Callable[[Config, str, Weights], Draft]  # from a config and its model_type
    ignored: Callable[[Draft], str]  # a pattern of keys that are no part of such a model
    write: Callable[[ViTConfig, str], Draft]  # to a config of a model_type
    unused: Callable[[ViTConfig], str]  # a pattern of names that the class of such a model does not have
    processor: str = "ViTImageProcessor"


def has_head(weights: Weights) -> bool:
    return any(f"{name}.weight" in weights for name in HEADS)
