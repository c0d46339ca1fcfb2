"""Vitral: the plain Vision Transformer, end to end."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitral.images.preprocess import Preprocess
    from vitral.inference.classifier import Classifier, load
    from vitral.model.blocks import (
        EncoderLayer,
        FeedForward,
        MultiHeadAttention,
        PatchEmbedding,
        PositionalEncoding,
        ViTEmbedding,
    )
    from vitral.model.variants import create
    from vitral.model.vit import Features, VisionTransformer, ViTConfig

# Where each public name lives. Resolved on first use, so that `vitral --help` need not import torch.
_HOMES = {
    "Classifier": "inference.classifier",
    "EncoderLayer": "model.blocks",
    "Features": "model.vit",
    "FeedForward": "model.blocks",
    "MultiHeadAttention": "model.blocks",
    "PatchEmbedding": "model.blocks",
    "PositionalEncoding": "model.blocks",
    "Preprocess": "images.preprocess",
    "ViTConfig": "model.vit",
    "ViTEmbedding": "model.blocks",
    "VisionTransformer": "model.vit",
    "create": "model.variants",
    "load": "inference.classifier",
}

__all__ = [
    "Classifier",
    "EncoderLayer",
    "Features",
    "FeedForward",
    "MultiHeadAttention",
    "PatchEmbedding",
    "PositionalEncoding",
    "Preprocess",
    "ViTConfig",
    "ViTEmbedding",
    "VisionTransformer",
    "create",
    "load",
]


def __dir__() -> list[str]:
    """The public names, for completion and `help`, before any of them was used."""
    return sorted({*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"vitral.{_HOMES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("vitral")
    raise AttributeError(f"module 'vitral' has no attribute {name!r}")
