"""WebDataset shards: tar files in which the neighbours of one name are an image and its label.

Each shard is read once from end to end (`tar_index`); from then on any image is one read at a known place.
"""

import glob
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitral.data.blocks import Blocks
from vitral.data.columns import FOUND, Columns
from vitral.data.names import Names
from vitral.data.sources.fetched import FetchedFiles
from vitral.data.sources.labels import LabelColumn, read_labels
from vitral.data.sources.roles import WORDS
from vitral.data.sources.tar_index import image_fields, index_of, text_fields
from vitral.data.split import SPLITS, Found, Split, shortened
from vitral.images.files import why_not_read
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.extras import need
from vitral.runtime.files import cache_folder
from vitral.runtime.progress import progress

PIPE = "pipe:"
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000
_ROOM = 2**33  # bytes of shards that a batch may come from, a quarter of what is kept on disk
_MOST_OPEN = 128  # files of a process at a time
# The fields that say the label where the user does not, the first that there is.
_LABELS = ("cls", "label", "class", "json", "txt", "text")
_JSON_LABELS = ("label", "labels", "class", "cls")
_MOST_NAMES = 10_000  # of classes by text; more, or most of them alone, are captions


def is_shards(source: str) -> bool:
    """Tells whether DATA names tar shards."""
    return any(part.startswith(PIPE) or part.endswith(".tar") for part in source.split("::"))


def read_shards(source: str, columns: Columns = FOUND) -> Found:
    """Gives the classes and splits of shards.

    Args:
        source: paths or patterns with ``::`` between, ``{000..099}`` and ``{split}`` in them or not; or
            ``pipe:COMMAND`` whose output is a shard.
        columns: which field holds the images, and which the labels; of a json field, its key.

    Raises:
        VitralError: if no file matches, a shard cannot be read, or samples have no label.
    """
    shards = _shards_of(source)
    if "train" not in shards:
        raise VitralError(f"no file matches {source.replace('{split}', 'train')}")
    indexed = {split: _indexed(paths) for split, paths in shards.items()}
    fields = _Fields.of(source, [table for parts in indexed.values() for table in parts], columns)
    read = {split: _read(shards[split], parts, fields) for split, parts in indexed.items()}
    whole = all(_is_whole(label) for part in read.values() for label in part.labels)
    told = {
        split: LabelColumn(split, _column(source, part.labels, fields, whole), None, part.where)
        for split, part in read.items()
    }
    classes, labels, notes = read_labels(source, told)
    splits = {
        split: Split(read[split].images, labels[split], read[split].names, blocks=read[split].blocks())
        for split in labels
    }
    missing = sum(part.without_image for part in read.values())
    without = [f"left out {missing:,} samples without an image"] if missing else []
    return Found(classes, splits, (*fields.notes, *without, *notes))


def shard_images(source: str, columns: Columns = FOUND) -> tuple["ShardImages", Names]:
    """Gives the images of all splits of shards, and their names; no labels are asked for.

    Raises:
        VitralError: as `read_shards`.
    """
    shards = [shard for of_split in _shards_of(source).values() for shard in of_split]
    if not shards:
        raise VitralError(f"no file matches {source}")
    indexed = _indexed(shards)
    found = {name: 0 for table in indexed for name in image_fields(table)}
    read = _read(shards, indexed, _Fields(_image_fields(source, found, columns), None, columns))
    return read.images, read.names


# --- Which shards ------------------------------------------------------------------------------------


def _shards_of(source: str) -> dict[str, list["Shard"]]:
    """The shards of each split that there is."""
    need("a source of shards", "pyarrow", extra="data")
    names = SPLITS if "{split}" in source else ("train",)
    return {split: shards for split in names if (shards := _expanded(source, split))}


def _expanded(source: str, split: str) -> list["Shard"]:
    """The shards of a split, in order; by the first spelling of its name that any file has."""
    if "{split}" in source and PIPE in source:
        raise VitralError(f"{source}: a command has no {{split}}; write out the training shards")
    for spelling in WORDS[split]:
        parts = source.replace("{split}", spelling).split("::")
        shards = [shard for part in parts for shard in _shards(part)]
        if shards:
            return shards
    return []


def _shards(part: str) -> list["Shard"]:
    if part.startswith(PIPE):
        _refuse_untyped(part)
        return [Shard(PIPE + command, piped=True) for command in with_braces(part.removeprefix(PIPE))]
    if os.path.lexists(part):
        return [Shard(part)]
    patterns = with_braces(part)
    found = [Shard(path) for pattern in patterns for path in _matches(pattern)]
    missing = [
        pattern for pattern in patterns if not glob.has_magic(pattern) and not os.path.lexists(pattern)
    ]
    if found and missing:
        raise VitralError(f"{part}: there is no {shortened(missing)}; name the shards that there are")
    return found


def _matches(pattern: str) -> list[str]:
    if os.path.lexists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else []


def with_braces(pattern: str) -> list[str]:
    """Gives what ``{000..099}`` stands for, each range in its place."""
    parts = _BRACES.split(pattern)
    ranges = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if int(last) < int(first):
            raise VitralError(f"{pattern}: {{{first}..{last}}} counts down; write the smaller number first")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        ranges.append((int(first), int(last), width))
    if np.prod([float(last - first + 1) for first, last, _ in ranges] or [1.0]) > _MOST_SHARDS:
        raise VitralError(f"{pattern} stands for more than {_MOST_SHARDS:,} shards")
    numbers = ([f"{n:0{width}}" for n in range(first, last + 1)] for first, last, width in ranges)
    texts = parts[::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(chosen, texts[1:], strict=True))
        for chosen in itertools.product(*numbers)
    ]


def _refuse_untyped(part: str) -> None:
    """A command that a file names must not be run: a run's folder may come from anybody.

    Raises:
        VitralError: unless the command line of this process has it, word for word.
    """
    if not any(part in word for word in sys.argv[1:]):
        raise VitralError(
            f"{part!r} runs a command, which is done only where it stands on the command line; give it as "
            "DATA there"
        )


class _Descriptor:
    """A file to read at places; closed when nobody holds it any more, in whichever thread that is."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True)
class Shard:
    """A tar file, or a command that writes one."""

    source: str
    piped: bool = False

    def path(self) -> Path:
        """Gives the file; of a command, what it wrote, which is kept in the cache."""
        if not self.piped:
            return Path(self.source)
        return FetchedFiles(cache_folder("streams")).path(self.source, self._run)

    def opened(self) -> _Descriptor:
        """Opens the file; of a command's, what other processes had removed to make room is fetched again."""
        try:
            return _Descriptor(self.path())
        except FileNotFoundError:
            return _Descriptor(self.path())

    def _run(self, path: Path) -> None:
        command = self.source.removeprefix(PIPE)
        with path.open("wb") as file:
            ended = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
        if ended.returncode:
            last = (ended.stderr.decode(errors="replace").strip().splitlines() or ["it wrote no reason"])[-1]
            raise VitralError(f"{self.source!r} ended with status {ended.returncode}: {last[:200]}")

    def index(self) -> Any:
        """Gives its index."""
        path = self.path()
        try:
            status = os.stat(path)
        except OSError as error:
            raise VitralError(f"{path} {why_not_read(error)}") from error
        if self.piped:
            return index_of(Path(self.source), self.source, path)
        return index_of(path, f"{status.st_size} {status.st_mtime_ns}")


def _indexed(shards: Sequence[Shard]) -> list[Any]:
    tables = []
    with progress("reading where images lie in the shards", "shards") as told:
        for done, shard in enumerate(shards, 1):
            tables.append(shard.index())
            told(done, len(shards))
    return tables


# --- What their fields mean --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fields:
    """Which fields hold the images and the labels."""

    images: tuple[str, ...]
    label: str | None  # "": the folders in the shards are the classes; None: labels are not asked for
    told: Columns  # by the user
    key: str = ""  # of a json field
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: str, tables: Sequence[Any], columns: Columns) -> "_Fields":
        images = _image_fields(source, {name: 0 for table in tables for name in image_fields(table)}, columns)
        texts = {name: 0 for table in tables for name in text_fields(table)}
        if columns.label:
            if columns.label in texts:
                return cls(images, columns.label, columns)
            if "json" in texts:
                return cls(images, "json", columns, columns.label)
            raise VitralError(
                f"{source} has no field {columns.label!r} that may say the label; it has "
                f"{shortened(list(texts)) or 'none'}"
            )
        label = next((name for name in _LABELS if name in texts), "")
        return cls(images, label, columns, notes=_said(source, images, label, [*texts]))


def _said(source: str, images: Sequence[str], label: str, texts: Sequence[str]) -> tuple[str, ...]:
    if len(texts) < 2:
        return ()
    others = [name for name in texts if name != label]
    return (f"{source}: images are {shortened(images)}, labels {label}; not read: {shortened(others)}",)


def _image_fields(source: str, found: dict[str, int], columns: Columns) -> tuple[str, ...]:
    """Fields that may hold a sample's image: jpg, png and the like; others only if named."""
    if columns.image:
        if columns.image not in found:
            raise VitralError(
                f"{source} has no field of images {columns.image!r}; "
                f"it has {shortened(list(found)) or 'none'}"
            )
        return (columns.image,)
    plain = tuple(name for name in found if "." not in name)
    if plain or len(found) == 1:
        return plain or tuple(found)
    if not found:
        raise VitralError(f"{source} holds no images; a shard has members such as 000.jpg and 000.cls")
    raise VitralError(
        f"{source} has the fields {shortened(list(found))}; say which with {columns.say('image')}"
    )


@dataclass(frozen=True)
class _Read:
    """The images of a split, and what their labels are made of."""

    images: "ShardImages"
    names: Names
    labels: list[Any]
    without_image: int

    def where(self, row: int) -> str:
        """Says which image a label is of."""
        return f"{self.names[row]} of {self.images.shards[self.images.shard_of[row]].source}"

    def blocks(self) -> Blocks:
        nbytes = np.bincount(self.images.shard_of, self.images.sizes).mean() if len(self.images) else 0.0
        piped = any(shard.piped for shard in self.images.shards)
        return Blocks(self.images.shard_of, float(nbytes), thrashes=piped, room=_ROOM)


def _read(shards: Sequence[Shard], tables: Sequence[Any], fields: _Fields) -> _Read:
    shard_of, offsets, sizes, labels, without = [], [], [], [], 0
    names: list[bytes] = []
    for number, (shard, table) in enumerate(zip(shards, tables, strict=True)):
        place, name = _places(shard, table, fields)
        found = np.flatnonzero(place[:, 0] >= 0)
        without += len(place) - len(found)
        offsets.append(place[found, 0])
        sizes.append(place[found, 1])
        shard_of.append(np.full(len(found), number, np.int32))
        names += [name[row] for row in found]
        labels += _labels(shard, table, fields, found, name)
    images = ShardImages(tuple(shards), *map(np.concatenate, (shard_of, offsets, sizes)))
    return _Read(images, Names.of(map(os.fsdecode, names)), labels, without)


def _places(shard: Shard, table: Any, fields: _Fields) -> tuple[np.ndarray, list[bytes]]:
    """(offset, size) of each sample's image, (n, 2), -1 where there is none; and its name in the shard."""
    place = np.full((table.num_rows, 2), -1, np.int64)
    names = [b""] * table.num_rows
    for image in fields.images:
        if f"size:{image}" not in table.schema.names:
            continue
        name = table[f"name:{image}"].to_pylist()
        for row in np.flatnonzero(table[f"size:{image}"].is_valid().to_numpy()).tolist():
            if place[row, 0] >= 0:
                raise VitralError(
                    f"{shard.source}: the sample {os.fsdecode(name[row])} has two images, of the fields "
                    f"{shortened(fields.images)}; say which with {fields.told.say('image')}"
                )
            names[row] = name[row]
            place[row] = table[f"offset:{image}"][row].as_py(), table[f"size:{image}"][row].as_py()
    return place, names


# --- Labels ------------------------------------------------------------------------------------------


def _labels(shard: Shard, table: Any, fields: _Fields, rows: np.ndarray, names: list[bytes]) -> list[Any]:
    """What each sample's label is made of."""
    if fields.label is None:
        return []
    if not fields.label:
        return [_folder(shard, os.fsdecode(names[row])) for row in rows.tolist()]
    column = f"text:{fields.label}"
    texts = table[column].to_pylist() if column in table.schema.names else [None] * table.num_rows
    labels = []
    for row in rows.tolist():
        if texts[row] is None:
            raise VitralError(
                f"{shard.source}: {os.fsdecode(names[row])} has no label, as others have in {fields.label}"
            )
        labels.append(_label(shard, os.fsdecode(names[row]), texts[row], fields))
    return labels


def _folder(shard: Shard, name: str) -> str:
    folder = os.path.basename(os.path.dirname(name))
    if not folder:
        raise VitralError(
            f"{shard.source}: {name} has no label; beside it there should be a member of its name that ends "
            "in .cls or .json, or it should lie in a folder of its class"
        )
    return folder


def _label(shard: Shard, name: str, content: bytes, fields: _Fields) -> Any:
    try:
        text = content.decode("utf-8-sig").strip()
        if (fields.label or "").rsplit(".", 1)[-1] != "json":
            return text
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VitralError(f"{shard.source}: the {fields.label} of {name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        return value
    key = fields.key or next((key for key in _JSON_LABELS if key in value), "")
    if key not in value:
        wanted = f"key {fields.key!r}" if fields.key else "label"
        raise VitralError(
            f"{shard.source}: the json of {name} has no {wanted}; it has {shortened(list(map(str, value)))}; "
            f"name its key with {fields.told.say('label')}"
        )
    return value[key]


_WHOLE = re.compile(r"-?(0|[1-9]\d*)")


def _is_whole(label: Any) -> bool:
    """Whether it is text that means a number, as 7 does and 007 does not."""
    return isinstance(label, str) and bool(_WHOLE.fullmatch(label))


def _column(source: str, labels: list[Any], fields: _Fields, whole: bool) -> Any:  # noqa: FBT001
    """As an Arrow column; of numbers, if all labels of all splits are `whole`."""
    import pyarrow as pa

    if whole:
        labels = [int(label) for label in labels]
    _refuse_captions(source, labels, fields)
    try:
        return pa.chunked_array([pa.array(labels)])
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise VitralError(
            f"{source}: the labels in {fields.label} are of different kinds; give the number or the name of "
            "a class, or a list of those, in every sample"
        ) from error


def _refuse_captions(source: str, labels: list[Any], fields: _Fields) -> None:
    if fields.label not in ("txt", "text") or not labels:
        return
    different = len(set(labels))
    if different > _MOST_NAMES or (different > 1 and 2 * different > len(labels) > 10):
        raise VitralError(
            f"{source}: the {fields.label} of its {len(labels):,} samples are {different:,} different texts, "
            f"such as {labels[0][:40]!r}: captions, it seems; name the field of the labels with "
            f"{fields.told.say('label')}"
        )


# --- Images ------------------------------------------------------------------------------------------


class ShardImages:
    """Encoded images in shards, by row; safe in threads, in forks and to pickle.

    Args:
        shards: the files.
        shard_of: which of them each image is in, (n,).
        offsets: where it begins there, (n,).
        sizes: its bytes, (n,).
    """

    def __init__(
        self, shards: tuple[Shard, ...], shard_of: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
    ) -> None:
        self.shards, self.shard_of, self.offsets, self.sizes = shards, shard_of, offsets, sizes
        self._open: dict[int, _Descriptor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shards", "shard_of", "offsets", "sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> bytes:
        row = range(len(self))[int(index)]
        number, size = int(self.shard_of[row]), int(self.sizes[row])
        try:
            content = os.pread(self._file(number).number, size, int(self.offsets[row]))
        except OSError as error:
            raise ImageError(f"its shard {self.shards[number].source} {why_not_read(error)}") from error
        if len(content) < size:
            raise ImageError(f"its shard {self.shards[number].source} was cut off since it was read first")
        return content

    def _file(self, number: int) -> _Descriptor:
        """An open shard. `pread` has no place in it that threads or forks could move."""
        found = self._open.get(number)
        if found is None:
            if len(self._open) >= _MOST_OPEN:
                self._open = {}
            found = self._open[number] = self.shards[number].opened()
        return found
