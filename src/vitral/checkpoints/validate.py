"""Every field of a file that describes a model, checked as it is read: what it is, and what it may cost."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitral.checkpoints.formats.weights import Weights
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.errors import VitralError, one_line

_MAX_JSON = 2**24  # bytes; 21,843 classes with long names take two million
# An image of more takes gigabytes, whatever it is: 4,096 x 4,096 pixels.
_MAX_PIXELS = 2**24
# Fixed positions are in no file, but they are computed; a table is never the larger part of a model.
_ALWAYS_FINE, _MAX_SHARE = 2**24, 2
_MAX_LABEL = 2_000  # characters


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a file; empty if there is none.

    Raises:
        VitralError: if the file cannot be read, or is no JSON object of plain numbers.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, a config has few")
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise VitralError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
    except (ValueError, RecursionError) as error:
        raise VitralError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise VitralError(f"{path} is not the config of a model; it holds a {type(content).__name__}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def temperature(value: object) -> float:
    """Raises ValueError if it is not a positive number that float32 can divide by."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e6:
        raise ValueError(
            f"temperature is {value!r}; it must be a number from 1e-6 to 1e6, and 1 changes nothing"
        )
    return float(value)


def flag(name: str, value: object) -> bool:
    """Raises ValueError if it is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value


def labels(names: Any) -> tuple[str, ...]:
    """Checks names of classes. Raises ValueError if one is no text, or is another's."""
    if isinstance(names, str | bytes | Mapping) or not isinstance(names, Sequence):
        raise ValueError(f"labels are {type(names).__name__}; they must be a list of names")
    seen: set[str] = set()
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or len(name) > _MAX_LABEL:
            raise ValueError(f"label {index} is {one_line(repr(name))}; it must be text")
        if name in seen:
            raise ValueError(f"labels hold {one_line(repr(name))} twice; each names one class")
        seen.add(name)
    return tuple(names)


def foreign_labels(names: Sequence[Any]) -> tuple[str, ...]:
    """Checks labels of other libraries, which may be numbers or alike.

    ImageNet has two cranes and two maillots: of labels that are alike, later ones are numbered.
    """
    found: list[str] = []
    taken: set[str] = set()
    for index, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"label {index} is {one_line(repr(name))}; it must be text")
        text, number = str(name).strip() or f"class {index}", 1
        label = text
        while label in taken:
            number += 1
            label = f"{text} ({number})"
        taken.add(label)
        found.append(label)
    return labels(found)


def training(metadata: Any) -> dict[str, Any]:
    """Checks what is known of a training. Raises ValueError if it is not as a run records it."""
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata is a {type(metadata).__name__}; it must be an object")
    share, seed = metadata.get("val_fraction", 0.2), metadata.get("seed", 0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ValueError(
            f"metadata.val_fraction is {share!r}; it must be a share of the images, from 0 to below 1"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"metadata.seed is {seed!r}; it must be a whole number from 0")
    if not isinstance(metadata.get("origin", {}), Mapping):
        raise ValueError(f"metadata.origin is a {type(metadata['origin']).__name__}; it must be an object")
    columns = metadata.get("columns", {})
    if not isinstance(columns, Mapping) or not all(isinstance(value, str) for value in columns.values()):
        raise ValueError(f"metadata.columns is {one_line(repr(columns))}; it must be an object of text")
    for name in ("source", "licence", "data", "held_out"):
        if not isinstance(metadata.get(name), str | None):
            raise ValueError(f"metadata.{name} is {one_line(repr(metadata[name]))}; it must be text")
    return dict(metadata)


def preprocess(wanted: Preprocess) -> Preprocess:
    """Raises ValueError if its numbers are not finite, or its images are of gigabytes."""
    numbers = (*wanted.mean, *wanted.std, wanted.crop_fraction)
    if not all(math.isfinite(number) and abs(number) <= 1e6 for number in numbers):
        raise ValueError(f"mean {wanted.mean}, std {wanted.std} of images: they must be finite numbers")
    if min(wanted.std) < 1e-6 or min(wanted.img_size) < 1:
        raise ValueError(f"std {wanted.std} of images of {wanted.img_size} pixels: they must be above 0")
    if wanted.img_size[0] * wanted.img_size[1] > _MAX_PIXELS:
        raise ValueError(f"images of {wanted.img_size} pixels are more than Vitral computes at once")
    return replace(wanted, img_size=(int(wanted.img_size[0]), int(wanted.img_size[1])))


def refuse_costly(described: str, architecture: ViTConfig, weights: Weights) -> None:
    """Refuses what a config claims and its weights cannot bear out, before memory or time is taken.

    Raises:
        VitralError: if it has more layers than there are tensors, or larger images or tables of fixed
            positions than weights of that size are for.
    """
    if architecture.num_layers > len(weights):
        raise VitralError(
            f"{described} cannot be used: it has {architecture.num_layers} layers, "
            f"and {weights.path} only {len(weights)} tensors"
        )
    height, width = height_and_width(architecture.img_size)
    tokens = architecture.num_prefix_tokens + (height // architecture.patch_size) * (
        width // architecture.patch_size
    )
    fixed = 4 * tokens * architecture.embed_dim if architecture.position.startswith("sinusoidal") else 0
    stored = 4 * sum(math.prod(weights.shape(name)) for name in weights)
    if height * width > _MAX_PIXELS or fixed > max(_ALWAYS_FINE, _MAX_SHARE * stored):
        raise VitralError(
            f"{described} cannot be used: it asks for images of {height}x{width} pixels, "
            f"which a model of {stored:,} bytes of weights is not for"
        )
