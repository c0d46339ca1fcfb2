"""The golden picture: what an artifact must answer to it, checked each time that it is opened.

Its two sides differ, its colours are of no grey, and it has lines finer than a pixel of most models: another
mean, crop, filter, channel order or weight gives other numbers.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitral.artifacts.engine import Answers, Engine
from vitral.images.picture import open_image
from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import VitralError
from vitral.runtime.files import write_atomically

PICTURE, PIXELS, ANSWERS = "golden/picture.png", "golden/pixels.png", "golden/answers.json"
_WIDTH, _HEIGHT = 200, 150


@dataclass(frozen=True)
class Difference:
    """How far an engine's answers are from those that were kept, relative to the largest logit."""

    logits: float
    probabilities: float

    def __str__(self) -> str:
        return f"logits within {self.logits:.1e}, probabilities within {self.probabilities:.1e}"


@cache
def golden_picture() -> np.ndarray:
    """The picture, (150, 200, 3) uint8: slanted panes of colour between dark lines, and a fine grid below."""
    y, x = np.mgrid[:_HEIGHT, :_WIDTH].astype(np.float64)
    pane = (x + 0.45 * y) // 37 + 3 * ((y - 0.3 * x) // 31)
    colours = [
        0.5 + 0.5 * np.sin(pane * (1.7 + 0.6 * c) + 1.1 * c + x / 90 - y / (70 + 20 * c)) for c in range(3)
    ]
    picture_HWC = np.stack(colours, -1) * np.array([1.0, 0.72, 0.88])
    lead = (np.abs((x + 0.45 * y) % 37 - 1) < 2) | (np.abs((y - 0.3 * x) % 31 - 1) < 2)
    picture_HWC[lead] *= 0.18
    fine = ((x + 2 * y).astype(int) % 3 == 0) & (y > 105) & (x < 70)
    picture_HWC[fine] = 0.95
    picture_HWC[12:40, 150:190, 0] = 0.93  # one corner is red
    return np.rint(picture_HWC.clip(0, 1) * 255).astype(np.uint8)


def golden_png() -> bytes:
    """The golden picture as a file."""
    return _png(golden_picture())


def write_golden(folder: Path, preprocess: Preprocess) -> np.ndarray:
    """Writes the picture and what a model sees of it; gives the latter, (H, W, 3) uint8."""
    Path(folder, "golden").mkdir(exist_ok=True)
    picture = golden_png()
    pixels_HWC = preprocess.pixels(picture)
    write_atomically(folder / PICTURE, picture)
    write_atomically(folder / PIXELS, _png(pixels_HWC))
    return pixels_HWC


def write_answers(folder: Path, answers: dict[str, Answers], labels: tuple[str, ...]) -> None:
    """Writes the answers of each form, by its kind, and what the labels are."""
    content: dict[str, Any] = {"labels_sha256": _digest(labels)}
    for kind, of in answers.items():
        rows = {"logits": of.logits[0].tolist(), "probabilities": of.probabilities[0].tolist()}
        content[kind] = {**rows, "label": labels[int(of.logits[0].argmax())]}
    write_atomically(folder / ANSWERS, json.dumps(content, allow_nan=False).encode())


def check_pixels(folder: Path, preprocess: Preprocess) -> np.ndarray:
    """Gives what the model sees of the golden picture, (H, W, 3) uint8.

    Raises:
        VitralError: if it is not what it saw when it was exported.
    """
    pixels_HWC = preprocess.pixels(folder / PICTURE)
    expected_HWC = np.asarray(open_image(folder / PIXELS))
    if pixels_HWC.shape != expected_HWC.shape:
        raise VitralError(
            f"{folder}: preprocessing gives {pixels_HWC.shape[1]}x{pixels_HWC.shape[0]} pixels, and gave "
            f"{expected_HWC.shape[1]}x{expected_HWC.shape[0]} when it was exported; export the model again"
        )
    levels = np.abs(pixels_HWC.astype(int) - expected_HWC)
    if levels.any():
        raise VitralError(
            f"{folder}: preprocessing differs on the golden picture, by up to {levels.max()} of 255 levels "
            f"in {(levels > 0).mean():.1%} of the values; the crop, the filter or Pillow {_pillow()} is not "
            "that of the export; export the model again"
        )
    return pixels_HWC


def kept_answers(folder: Path, kind: str, labels: tuple[str, ...]) -> Answers:
    """The answers that were written for a form.

    Raises:
        VitralError: if there are none, or they were given for other labels, or in another order.
    """
    try:
        content = json.loads((folder / ANSWERS).read_bytes())
        rows = (np.asarray(content[kind][name], np.float32)[None] for name in ("logits", "probabilities"))
        if content["labels_sha256"] != _digest(labels):
            raise VitralError(
                f"{folder}: the labels are not those of the export, or not in its order (the golden picture "
                f"was {content[kind]['label']!r}); export the model again"
            )
        return Answers(*rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VitralError(f"{folder / ANSWERS} has no answers of the form {kind}; export it again") from error


def difference(found: Answers, kept: Answers) -> Difference:
    """Compares answers to one picture. Raises VitralError if they are of other shapes."""
    if found.logits.shape != kept.logits.shape:
        raise VitralError(
            f"the model gives {found.logits.shape[1]} logits, and gave {kept.logits.shape[1]} at export"
        )
    scale = max(float(np.abs(kept.logits).max()), 1e-12)
    return Difference(
        float(np.abs(found.logits - kept.logits).max()) / scale,
        float(np.abs(found.probabilities - kept.probabilities).max()),
    )


def check_answers(
    engine: Engine, pixels_HWC: np.ndarray, kept: Answers, tolerance: float, described: str
) -> Difference:
    """Runs the engine on the golden picture. Raises VitralError if it answers otherwise than was kept."""
    return compare(engine(pixels_HWC[None]), kept, tolerance, f"{described}, {engine.name}")


def compare(answers: Answers, kept: Answers, tolerance: float, described: str) -> Difference:
    """Compares answers to the golden picture. Raises VitralError if they are not those that were kept."""
    found = difference(answers, kept)
    for part in ("logits", "probabilities"):
        if not getattr(found, part) <= tolerance:
            raise VitralError(
                f"{described}: {part} on the golden picture differ by {getattr(found, part):.1e}, and may by "
                f"{tolerance:.0e}; it is not the model that was exported, or it is computed otherwise here; "
                "export it again"
            )
    return found


def _digest(labels: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()


def _png(pixels_HWC: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels_HWC).save(content, "PNG", optimize=True)
    return content.getvalue()


def _pillow() -> str:
    from importlib.metadata import version

    return version("pillow")
