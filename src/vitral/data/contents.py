"""What a run's images were, as digests, to tell on its resume what of them changed."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from vitral.data.image_data import ImageData
from vitral.data.split import Split, evenly, names_digest
from vitral.runtime.errors import VitralError

# Of a split. All names and labels count; to read more than this of a million images would take minutes.
_IMAGES = 10_000
_BYTES = 256 * 2**20
_DIGEST_BYTES = 4
_AS_THEY_WERE = "put them back as they were, or begin a new run from the weights of this one"


@dataclass(frozen=True)
class SplitContents:
    """Digests of a split."""

    names: str
    labels: str  # in the split's order, and the classes
    images: str  # of each image that was looked at, evenly over the split: four bytes, in hexadecimal

    @classmethod
    def of(cls, split: Split, classes: tuple[str, ...]) -> Self:
        labels = hashlib.sha256(repr((classes, split.labels.shape)).encode())
        labels.update(np.ascontiguousarray(split.labels).tobytes())
        share = max(_BYTES // max(min(len(split), _IMAGES), 1), 1)
        digests = (_digest(split.images, index, share) for index in _looked_at(split))
        return cls(split.fingerprint, labels.hexdigest(), b"".join(digests).hex())

    def changed_images(self, now: Self, split: Split) -> list[str]:
        """The names of the images, of those that were looked at, whose content is not that of `now`."""
        names = (split.names[index] for index in _looked_at(split))
        pairs = zip(_parts(self.images), _parts(now.images), names, strict=False)
        return [name for before, after, name in pairs if before != after]


def _looked_at(split: Split) -> list[int]:
    """Rows of which the images are digested; where blocks are read as a whole, of few blocks."""
    if split.blocks is None or not split.blocks.thrashes:
        return evenly(len(split), _IMAGES).tolist()
    numbers = np.unique(split.blocks.of_row)
    chosen = numbers[evenly(len(numbers), max(int(_BYTES / max(split.blocks.nbytes, 1.0)), 1))]
    rows = np.flatnonzero(np.isin(split.blocks.of_row, chosen))
    return rows[evenly(len(rows), _IMAGES)].tolist()


def _parts(digests: str) -> Iterator[str]:
    step = 2 * _DIGEST_BYTES
    return (digests[start : start + step] for start in range(0, len(digests), step))


def _digest(images: Any, index: int, share: int) -> bytes:
    """Of an image's size and about `share` of its bytes; zeros if there is nothing to read."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    try:
        image = images[index]
        if isinstance(image, Path):
            _add_file(digest, image, share)
        elif isinstance(image, bytes):
            _add_bytes(digest, image, share)
        else:  # a picture that a source holds opened
            digest.update(repr((image.size, image.mode)).encode())
            _add_bytes(digest, image.tobytes(), share)
    except (OSError, VitralError):
        return bytes(_DIGEST_BYTES)
    return digest.digest()


def _add_file(digest: Any, path: Path, share: int) -> None:
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        digest.update(f"{size} ".encode())
        for start, stop in _samples(size, share):
            file.seek(start)
            digest.update(file.read(stop - start))


def _add_bytes(digest: Any, content: bytes, share: int) -> None:
    digest.update(f"{len(content)} ".encode())
    for start, stop in _samples(len(content), share):
        digest.update(memoryview(content)[start:stop])


def _samples(size: int, share: int) -> list[tuple[int, int]]:
    """All of it, or its beginning, middle and end."""
    if size <= share:
        return [(0, size)]
    part = max(share // 3, 1)
    return [(start, start + part) for start in (0, (size - part) // 2, size - part)]


@dataclass(frozen=True)
class Contents:
    """Of the images that a run learns from and is chosen by."""

    names: str  # of both splits together
    splits: dict[str, SplitContents]

    @classmethod
    def of(cls, data: ImageData) -> Self:
        splits = {name: data.split(name) for name in ("train", "val")}
        return cls(
            _fingerprint_of_all(data, ()),
            {name: SplitContents.of(split, data.classes) for name, split in splits.items()},
        )

    def changes(self, now: Self, data: ImageData, run: Path, damaged: Collection[str]) -> list[str]:
        """What was done about `damaged` images since, in sentences; none if all is as it was.

        Args:
            now: the contents of `data`, which were these when the run began.
            data: the images.
            run: whose they are.
            damaged: names of images that the run could not read; to mend or to remove them is allowed.

        Raises:
            VitralError: if anything else changed.
        """
        if self == now:
            return []
        same_names = all(self.splits[name].names == now.splits[name].names for name in self.splits)
        if not same_names:
            return [self._removed(data, run, damaged)]
        mended: list[str] = []
        for name, what in (("train", "training"), ("val", "validation")):
            before, after, split = self.splits[name], now.splits[name], data.split(name)
            if before.labels != after.labels:
                raise VitralError(
                    f"the labels or classes of the {what} images in {data.source} are not those that {run} "
                    f"began with; {_AS_THEY_WERE}"
                )
            changed = before.changed_images(after, split)
            strange = [image for image in changed if image not in damaged]
            if strange:
                raise VitralError(
                    f"the content of {len(strange):,} {what} images in {data.source} changed since {run} "
                    f"began, for example {strange[0]}; {_AS_THEY_WERE}"
                )
            mended += changed
        return [f"{len(mended):,} images that were damaged were mended, and are seen from here on"]

    def _removed(self, data: ImageData, run: Path, damaged: Collection[str]) -> str:
        present = {name for split in ("train", "val") for name in data.split(split).names}
        removed = [name for name in damaged if name not in present]
        if not removed or _fingerprint_of_all(data, removed) != self.names:
            trained = data.split("train").fingerprint != self.splits["train"].names
            raise VitralError(
                f"{data.source} no longer holds the {'training' if trained else 'validation'} images that "
                f"{run} began with; {_AS_THEY_WERE}"
            )
        return (
            f"{len(removed):,} damaged images were removed: from here on the order of the images is another, "
            "perhaps also which are held out, and the run's bits are not those of one never stopped"
        )


def _fingerprint_of_all(data: ImageData, removed: Collection[str]) -> str:
    return names_digest([*data.split("train").names, *data.split("val").names, *removed])
