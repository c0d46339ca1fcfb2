#!/usr/bin/env python
"""Compares an artifact with its model on files of eleven kinds, as bytes: the figures of docs/export.md.

    scripts/export_pictures.py MODEL ARTIFACT PHOTOS [--count 91]

PHOTOS are pictures, of which `--count` are taken, each written anew as a file of every kind. ARTIFACT has the
forms onnx, onnx-image and openvino of MODEL.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[1]))

import vitral
from tests.kinds import KINDS
from vitral.artifacts.open import open_artifact
from vitral.artifacts.predictor import Predictor
from vitral.data.sources import find_images
from vitral.images.picture import open_image
from vitral.inference.engine import ClassifierEngine


def answers(model: str, artifact: Path) -> dict[str, Callable[[bytes], np.ndarray]]:
    """What gives the probabilities of a file's bytes, by name; torch's first."""
    classifier = vitral.load(model, device="cpu", precision="float32")
    torchs = Predictor(ClassifierEngine(classifier), classifier.preprocess, classifier.labels)

    def by(predictor: Predictor) -> Callable[[bytes], np.ndarray]:
        return lambda file: predictor.answers(predictor.pixels(file)[None]).probabilities[0]

    session: Any = onnxruntime.InferenceSession(artifact / "image.onnx", providers=["CPUExecutionProvider"])

    def whole(file: bytes) -> np.ndarray:
        return session.run(["probabilities"], {"picture": np.asarray(open_image(file))})[0][0]

    onnx, openvino = (open_artifact(artifact, form=form) for form in ("onnx", "openvino"))
    return {
        "torch": by(torchs),
        "ONNX Runtime, from pixels": by(onnx),
        "ONNX Runtime, from the picture": whole,
        "OpenVINO, from pixels": by(openvino),
    }


def files(photos: str, count: int) -> Iterator[tuple[str, bytes]]:
    for path in find_images([photos]).files[:count]:
        image = open_image(path)
        for kind, (_, encode) in KINDS.items():
            yield kind, encode(image)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("photos")
    parser.add_argument("--count", type=int, default=91)
    asked = parser.parse_args()
    asking = answers(asked.model, asked.artifact)
    found: dict[str, list[np.ndarray]] = {name: [] for name in asking}
    began, kinds = time.monotonic(), []
    for kind, file in files(asked.photos, asked.count):
        kinds.append(kind)
        for name, ask in asking.items():
            found[name].append(ask(file))
        if len(kinds) % 100 == 0:
            print(f"{len(kinds):,} files, {time.monotonic() - began:.0f} s", file=sys.stderr)
    torchs = np.stack(found.pop("torch"))
    print(f"{len(kinds):,} files of {len(set(kinds))} kinds")
    for name, rows in found.items():
        others = np.stack(rows)
        same = (others.argmax(1) == torchs.argmax(1)).mean()
        differ_N = np.abs(others - torchs).max(1)
        worst = kinds[int(differ_N.argmax())]
        print(f"{name}: the same label in {same:.2%}, probabilities within {differ_N.max():.1e} ({worst})")


if __name__ == "__main__":
    main()
