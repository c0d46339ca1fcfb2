"""Vitral: the plain Vision Transformer, end to end."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitral.images.preprocess import Preprocess
    from vitral.inference.classifier import Classifier, load
    from vitral.model.attention import MultiHeadAttention
    from vitral.model.config import ViTConfig
    from vitral.model.embedding import PatchEmbedding, ViTEmbedding
    from vitral.model.encoder import EncoderLayer, FeedForward
    from vitral.model.positions.tables import PositionalEncoding
    from vitral.model.variants import create
    from vitral.model.vit import Features, VisionTransformer

# Where each public name lives. Resolved on first use, so that `vitral --help` need not import torch.
_HOMES = {
    "Classifier": "inference.classifier",
    "EncoderLayer": "model.encoder",
    "Features": "model.vit",
    "FeedForward": "model.encoder",
    "MultiHeadAttention": "model.attention",
    "PatchEmbedding": "model.embedding",
    "PositionalEncoding": "model.positions.tables",
    "Preprocess": "images.preprocess",
    "ViTConfig": "model.config",
    "ViTEmbedding": "model.embedding",
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
