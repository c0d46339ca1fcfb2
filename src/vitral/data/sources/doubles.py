"""Images that stand in training and in another split alike."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vitral.data.split import Split
from vitral.runtime.errors import ImageError

# Of more images, to ask for the size of each file would take minutes on a disk of the network.
_MOST_COMPARED = 200_000
_MOST_OPENED = 2000  # of the images to evaluate
_PROBED_BYTES = 4096


def note_on_doubles(splits: dict[str, Split]) -> Iterator[str]:
    """A line for each split that shares images with "train": one file, or two of the same content."""
    if sum(map(len, splits.values())) > _MOST_COMPARED or not _has_files(splits["train"]):
        return
    if any(split.blocks is not None and split.blocks.thrashes for split in splits.values()):
        return  # to read all of them would take as long as an epoch
    for name, split in splits.items():
        if name != "train" and (found := _doubles(splits["train"], split)):
            ours, theirs = found[0]
            yield (
                f"{len(found):,} of the {name} images are in train too, such as {theirs}, there {ours}: what "
                "is measured on them says little of new images"
            )


def _has_files(train: Split) -> bool:
    """Whether there are bytes of files to compare; to decode all pictures of a Dataset would take long."""
    try:
        return isinstance(train.images[0], Path | bytes)
    except (ImageError, IndexError):
        return True


def _doubles(train: Split, other: Split) -> list[tuple[str, str]]:
    """The names of each image that is in both, in the one and in the other."""
    of_train, of_other = _sizes(train), _sizes(other)
    sizes = set(of_train.values())
    alike = [row for row, size in of_other.items() if size in sizes]
    alike = alike[:: max(len(alike) // _MOST_OPENED, 1)]
    sizes = {of_other[row] for row in alike}
    probed: dict[bytes, list[int]] = {}
    for row, size in of_train.items():
        if size in sizes:
            probed.setdefault(_middle(train, row), []).append(row)
    found = []
    for row in alike:
        content = _content(other, row)
        same = probed.get(_middle(other, row), ())
        twins = (twin for twin in same if content and _content(train, twin) == content)
        if (twin := next(twins, None)) is not None:
            found.append((train.names[twin], other.names[row]))
    return found


def _sizes(split: Split) -> dict[int, int]:
    """The bytes of each encoded image that there is, by its row."""
    sizes = {row: _size(split, row) for row in range(len(split))}
    return {row: size for row, size in sizes.items() if size}


def _size(split: Split, row: int) -> int:
    try:
        image = split.images[row]
        if isinstance(image, Path):
            status = os.stat(image)
            return status.st_size if stat.S_ISREG(status.st_mode) else 0
    except (ImageError, OSError, ValueError):  # whoever opens it says so
        return 0
    return len(image) if isinstance(image, bytes) else 0


def _middle(split: Split, row: int) -> bytes:
    """Some of its bytes, in which pictures differ."""
    return _read(split, row, _size(split, row) // 2, _PROBED_BYTES)


def _content(split: Split, row: int) -> bytes:
    return _read(split, row, 0, -1)


def _read(split: Split, row: int, start: int, count: int) -> bytes:
    image = split.images[row]
    if isinstance(image, bytes):
        return image[start:] if count < 0 else image[start : start + count]
    assert isinstance(image, Path)
    try:
        with image.open("rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError:
        return b""
