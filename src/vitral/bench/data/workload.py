"""What the loaders are measured on: photographs on disk, and the batches that are asked for."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from PIL import Image

from vitral.data.sources import find_images
from vitral.data.split import Split
from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import VitralError
from vitral.runtime.ranges import Batch, Count, Pixels, Workers
from vitral.runtime.settings import build, parse_overrides

# ImageNet's, which all libraries normalize with unless they are told otherwise.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP_FRACTION = 0.875
SMALLEST_CROP = 0.35  # of the area


@dataclass(frozen=True)
class Settings:
    """What may be said after DATA, as KEY=VALUE."""

    img_size: Pixels = 128  # of a batch's images
    batch_size: Batch = 32
    images: Count = 128  # that a reading goes through
    workers: Workers = 0  # processes that load; 0: one thread does all, and processor seconds are counted
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    photo_size: tuple[Pixels, Pixels] = (375, 500)  # of the photographs that are made where no DATA is named

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(
            (self.img_size, self.img_size),
            crop_fraction=_CROP_FRACTION,
            interpolation=self.interpolation,
            mean=_MEAN,
            std=_STD,
        )

    @property
    def shorter_side(self) -> int:
        """To which evaluation resizes before it cuts out the centre."""
        return self.preprocess.target_size[0]


@dataclass(frozen=True)
class Photographs:
    """The files of a workload, and the same as an image folder of one class, which every library reads."""

    files: tuple[Path, ...]
    folder: Path
    settings: Settings
    title: str

    @property
    def split(self) -> Split:
        images: list[Any] = list(self.files)
        return Split(images, np.zeros(len(images), dtype=np.int64), [str(path) for path in self.files])


@contextmanager
def photographs(words: Sequence[str]) -> Iterator[Photographs]:
    """Find or make the photographs; what was made is removed at the end.

    Args:
        words: a folder or pattern of images, or none; then settings, such as ``img_size=224``.

    Raises:
        VitralError: if there are no images, or a setting cannot be used.
    """
    source, words = (words[0], words[1:]) if words and "=" not in words[0] else ("", words)
    settings: Settings = build(Settings, parse_overrides(words))
    with TemporaryDirectory(prefix="vitral-bench-") as folder:
        place = Path(folder, "all")
        place.mkdir()
        if source:
            files = _linked(source, place, settings.images)
            title = f"{len(files)} images of {source}"
        else:
            files = _made(place, settings)
            height, width = settings.photo_size
            title = f"{len(files)} made photographs of {height}x{width}"
        yield Photographs(files, Path(folder), settings, f"{title}, to {settings.img_size} pixels")


def _linked(source: str, place: Path, at_most: int) -> tuple[Path, ...]:
    """Links to the first images of a folder, under names that sort as they do."""
    files = []
    if not os.path.lexists(source) and not glob.has_magic(source):
        raise VitralError(f"there is no {source}; give a folder of images, or a pattern")
    for number, file in enumerate(find_images([source]).files[:at_most]):
        link = place / f"{number:06}{Path(file).suffix.lower() or '.jpg'}"
        try:
            os.symlink(Path(file).resolve(), link)
        except OSError as error:
            raise VitralError(f"{link} cannot be made: {error.strerror or error}") from error
        files.append(link)
    return tuple(files)


def _made(place: Path, settings: Settings) -> tuple[Path, ...]:
    """JPEGs with as much to decode as photographs of ImageNet: some 4 to 5 bits a pixel at quality 95."""
    height, width = settings.photo_size
    files = []
    for number in range(settings.images):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 8, (height, width, 1)).astype(np.float32)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        files.append(place / f"{number:06}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=95)
    return tuple(files)
