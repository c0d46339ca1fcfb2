"""The model as torch computes it: what all other forms are measured against, and its own faster ways."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitral.artifacts.engine import Engine
from vitral.inference.classifier import load
from vitral.inference.engine import ClassifierEngine
from vitral.ship.optimize.candidates import Candidate


def open_eager(folder: Path, candidate: Candidate) -> tuple[Engine, tuple[int, int]]:
    """Load a checkpoint to be computed as a candidate says; give the engine and the size of its images."""
    precision = "bfloat16" if candidate.precision == "bfloat16" else "float32"
    classifier = load(folder, device="cpu", precision=precision, merge=candidate.merge or None)
    if candidate.how == "dynamic":
        from torchao.quantization import (  # pyrefly: ignore[missing-import]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        quantize_(classifier.model, Int8DynamicActivationInt8WeightConfig())
    if candidate.how == "compiled":
        compiled: Any = torch.compile(classifier.model, **classifier.placement.compile_options())
        classifier = replace(classifier, model=compiled)
    return ClassifierEngine(classifier), classifier.preprocess.img_size
