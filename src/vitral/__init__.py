"""Vitral: the plain Vision Transformer, end to end.

`open_data` and `train` make a model, `evaluate` and `diagnose` judge it, `load` gives it to use, `Inside`
looks into it, `convert` writes it for other libraries; `create` builds one from a variant's name.
docs/python.md shows all of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitral.artifacts.open import open_artifact
    from vitral.artifacts.prediction import Prediction
    from vitral.artifacts.predictor import Predictor
    from vitral.bench.run import benchmark
    from vitral.checkpoints.convert import convert
    from vitral.checks.check import check
    from vitral.data.image_data import ImageData, open_data
    from vitral.evaluation.diagnosis.doctor import diagnose
    from vitral.evaluation.evaluate import evaluate
    from vitral.evaluation.evaluation import Evaluation
    from vitral.evaluation.probing.probe import probe
    from vitral.explain.figures.draw import draw_figures
    from vitral.explain.inside import Inside
    from vitral.images.preprocess import Preprocess
    from vitral.inference.classifier import Classifier, load
    from vitral.inference.info import info
    from vitral.inference.scoring.score import score
    from vitral.model.attention import MultiHeadAttention
    from vitral.model.config import ViTConfig
    from vitral.model.embedding import PatchEmbedding, ViTEmbedding
    from vitral.model.encoder import EncoderLayer, FeedForward
    from vitral.model.positions.tables import PositionalEncoding
    from vitral.model.variants import create
    from vitral.model.vit import Features, VisionTransformer
    from vitral.recipes.recipe import Recipe
    from vitral.reports.report import report
    from vitral.reports.train import train
    from vitral.runtime.errors import VitralError
    from vitral.ship.export.export import export
    from vitral.ship.optimize.optimize import optimize

# Where each public name lives. Resolved on first use, so that `vitral --help` need not import torch.
_HOMES = {
    "Classifier": "inference.classifier",
    "EncoderLayer": "model.encoder",
    "Evaluation": "evaluation.evaluation",
    "Features": "model.vit",
    "FeedForward": "model.encoder",
    "ImageData": "data.image_data",
    "Inside": "explain.inside",
    "MultiHeadAttention": "model.attention",
    "PatchEmbedding": "model.embedding",
    "PositionalEncoding": "model.positions.tables",
    "Prediction": "artifacts.prediction",
    "Predictor": "artifacts.predictor",
    "Preprocess": "images.preprocess",
    "Recipe": "recipes.recipe",
    "ViTConfig": "model.config",
    "ViTEmbedding": "model.embedding",
    "VisionTransformer": "model.vit",
    "VitralError": "runtime.errors",
    "benchmark": "bench.run",
    "check": "checks.check",
    "convert": "checkpoints.convert",
    "create": "model.variants",
    "diagnose": "evaluation.diagnosis.doctor",
    "draw_figures": "explain.figures.draw",
    "evaluate": "evaluation.evaluate",
    "export": "ship.export.export",
    "info": "inference.info",
    "load": "inference.classifier",
    "open_artifact": "artifacts.open",
    "open_data": "data.image_data",
    "optimize": "ship.optimize.optimize",
    "probe": "evaluation.probing.probe",
    "report": "reports.report",
    "score": "inference.scoring.score",
    "train": "reports.train",
}

__all__ = [
    "Classifier",
    "EncoderLayer",
    "Evaluation",
    "Features",
    "FeedForward",
    "ImageData",
    "Inside",
    "MultiHeadAttention",
    "PatchEmbedding",
    "PositionalEncoding",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Recipe",
    "ViTConfig",
    "ViTEmbedding",
    "VisionTransformer",
    "VitralError",
    "benchmark",
    "check",
    "convert",
    "create",
    "diagnose",
    "draw_figures",
    "evaluate",
    "export",
    "info",
    "load",
    "open_artifact",
    "open_data",
    "optimize",
    "probe",
    "report",
    "score",
    "train",
]


def __dir__() -> list[str]:
    """The public names, for completion and `help`, before any of them was used."""
    return sorted({*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"vitral.{_HOMES[name]}"), name)
    if name == "__version__":
        from vitral.runtime.version import vitral_version

        return vitral_version()
    raise AttributeError(f"module 'vitral' has no attribute {name!r}")
