"""How far the forms of an artifact agree with torch on labelled images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitral.artifacts.engine import Engine
from vitral.artifacts.manifest import RUN_HERE, Manifest
from vitral.artifacts.open import engine_of
from vitral.data.image_data import DataSource
from vitral.data.split import Split, evenly
from vitral.evaluation.evaluate import choose_split
from vitral.images.reading import batches_ahead
from vitral.inference.classifier import Classifier
from vitral.inference.engine import ClassifierEngine
from vitral.runtime.errors import VitralError

_MOST_IMAGES = 2_000
_BATCH = 32


@dataclass(frozen=True)
class Agreement:
    """One form's answers beside torch's on the same images."""

    kind: str
    images: int
    same: float  # share of the images with the same likeliest label
    probabilities: float  # by how much one differs at most
    accuracy: float | None  # share of right answers; None where images have several labels
    accuracy_torch: float | None

    def __str__(self) -> str:
        told = (
            f"{self.kind}: {self.same:.2%} of {self.images:,} images have torch's label, "
            f"probabilities differ by at most {self.probabilities:.1e}"
        )
        if self.accuracy is None:
            return told
        return f"{told}; top-1 {self.accuracy:.2%}, torch {self.accuracy_torch:.2%}"


def agreements(
    folder: Path,
    manifest: Manifest,
    classifier: Classifier,
    data: DataSource,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Agreement]:
    """Compares each form that Vitral runs with torch, on at most 2,000 images that were held out.

    Args:
        folder: of the artifact.
        manifest: its forms.
        classifier: the model that was exported.
        data: as `open_data` takes it.
        tell: told which images are taken, and of doubts about them.

    Raises:
        VitralError: if the data cannot be used, or none of its images can be read.
    """
    name, images = choose_split(classifier, data, None, tell)
    images = images.take(evenly(len(images), _MOST_IMAGES))
    engines: dict[str, Engine] = {"torch": ClassifierEngine(classifier)}
    for form in manifest.forms:
        if form.kind in RUN_HERE:
            engines[form.kind] = engine_of(folder, manifest.about, form, trusted=True)
    tell(f"comparing answers to {len(images):,} images, split {name}")
    rows, found = _answers(engines, classifier, images)
    torchs = found.pop("torch")
    labels = images.labels[rows] if not images.multi_label else None
    return [_agreement(kind, answers_NL, torchs, labels) for kind, answers_NL in found.items()]


def _answers(
    engines: dict[str, Engine], classifier: Classifier, images: Split
) -> tuple[list[int], dict[str, np.ndarray]]:
    """The rows that could be read, and each engine's probabilities for them (N, L)."""
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in engines}
    rows: list[int] = []
    sources = (images.images[row] for row in range(len(images)))
    begin = 0
    for names, loaded in batches_ahead(sources, classifier.preprocess.pixels, _BATCH):
        readable = {begin + place: item for place, item in enumerate(loaded) if isinstance(item, np.ndarray)}
        begin += len(names)
        if not readable:
            continue
        rows += readable
        pixels_BHWC = np.stack(list(readable.values()))
        for kind, engine in engines.items():
            parts[kind].append(engine(pixels_BHWC).probabilities)
    if not rows:
        raise VitralError("none of the images to compare answers on can be read")
    return rows, {kind: np.concatenate(of) for kind, of in parts.items()}


def _agreement(
    kind: str, found_NL: np.ndarray, torch_NL: np.ndarray, labels_N: np.ndarray | None
) -> Agreement:
    found, torchs = found_NL.argmax(1), torch_NL.argmax(1)
    right = None if labels_N is None else float((found == labels_N).mean())
    right_torch = None if labels_N is None else float((torchs == labels_N).mean())
    worst = float(np.abs(found_NL - torch_NL).max())
    return Agreement(kind, len(found), float((found == torchs).mean()), worst, right, right_torch)
