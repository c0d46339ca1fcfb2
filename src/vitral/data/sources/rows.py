"""From the rows of tables to classes and splits, whatever files the rows are of.

A table's file says what its columns are, and gives some of them and the images of one; here is decided which
columns those are, which split a row is of, and what must not be.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from vitral.data.columns import Columns
from vitral.data.names import Names, Numbered
from vitral.data.sources.chosen import Chosen, choose
from vitral.data.sources.labels import LabelColumn, class_names, read_labels
from vitral.data.sources.roles import WORDS, role
from vitral.data.sources.row_groups import RowGroupImages
from vitral.data.split import SPLITS, Found, Images, JoinedImages, Split, shortened
from vitral.runtime.errors import VitralError

_BINARY = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_TRUTH = {True: "val", False: "train"}  # of a column such as is_valid


class TableFile(Protocol):
    """A file of rows."""

    path: str
    first_row: int  # the number by which people know the first row
    metadata: Mapping[bytes, bytes] | None  # of the file's schema

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        ...

    def read(self, columns: Sequence[str]) -> Any:
        """Columns as an Arrow table."""
        ...

    def images(self, column: str, columns: Columns) -> Images:
        """The pictures of a column; paths begin from the user's `image_root`, or the file's own folder."""
        ...


def read_tables(source: str, columns: Columns, open_file: Callable[[str], TableFile]) -> Found:
    """The classes and splits of files, which ``{split}`` in their pattern or a column tells from each other.

    Raises:
        VitralError: if no file matches, or one cannot be used.
    """
    return read_files(source, files_of(source), open_file, columns)


def read_files(
    source: str,
    paths: Mapping[str, list[str]],
    open_file: Callable[[str], TableFile],
    columns: Columns,
) -> Found:
    """The classes and splits of these files of each split.

    Args:
        source: for messages.
        paths: by what `open_file` opens them, in order.
        open_file: gives a file.
        columns: what a user says of them.

    Raises:
        VitralError: if one cannot be used.
    """
    files = {name: [open_file(path) for path in of_split] for name, of_split in paths.items()}
    first = files["train"][0]
    chosen = choose(source, first.names, columns, lambda names: _all_binary(first, names))
    chosen = _without_second_split(source, chosen)
    notes = [chosen.note] if chosen.note else []
    for name in [name for name in files if name != "train" and _lacks_labels(files[name], chosen)]:
        notes.append(f"left out {name}: its files have no column {', '.join(chosen.labels)}")
        del files[name]
    parts = {name: _rows(name, of_split, chosen, columns) for name, of_split in files.items()}
    if chosen.split:
        parts = _dealt(source, parts["train"], chosen, notes)
    classes, labels, left_out = read_labels(source, _label_columns(parts, chosen, columns, first.metadata))
    kept = {name: parts[name] for name in labels}
    notes += [
        *left_out,
        *_check_groups(source, kept, chosen),
        *_check_repeated(source, kept, labels, columns),
    ]
    splits = {name: replace(rows.split, labels=labels[name]) for name, rows in kept.items()}
    return Found(classes, splits, tuple(notes))


def files_of(pattern: str, *, of_any: bool = False) -> dict[str, list[str]]:
    """The files of each split; of a pattern without ``{split}``, all of them as "train".

    Args:
        pattern: of their paths.
        of_any: whether files of any split will do, with none to train on.

    Raises:
        VitralError: if there are none, or a split is named in two ways.
    """
    files: dict[str, list[str]] = {}
    for name, spellings in WORDS.items() if "{split}" in pattern else [("train", ("train",))]:
        found = {word: _matches(pattern.replace("{split}", word)) for word in spellings}
        there = [word for word in spellings if found[word]]
        if len(there) > 1:
            raise VitralError(f"{pattern}: which is the {name} split, {', '.join(there)}? Rename the others")
        if there:
            files[name] = sorted(found[there[0]])
    if not files or not ("train" in files or of_any):
        raise VitralError(f"no file matches {pattern.replace('{split}', 'train')}")
    return {name: files[name] for name in SPLITS if name in files}


def _matches(pattern: str) -> list[str]:
    return [pattern] if os.path.lexists(pattern) else glob.glob(pattern)


def one_line(error: Exception) -> str:
    """What an error of a library says, as part of a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def joined_images(parts: Sequence[Images]) -> Images:
    """The images of several files, one file after the other."""
    if len(parts) > 1 and all(isinstance(part, RowGroupImages) for part in parts):
        return RowGroupImages.joined(parts)  # pyrefly: ignore[bad-argument-type]
    return parts[0] if len(parts) == 1 else JoinedImages.of(parts)


def joined_names(parts: Sequence[Images], words: str) -> Sequence[str]:
    """Their names: their own where they have some, else numbers after some words."""
    names: list[Any] = [getattr(part, "names", None) for part in parts]
    if any(name is None for name in names):
        return Numbered(words, sum(map(len, parts)))
    return names[0] if len(names) == 1 else Names.of(name for of_part in names for name in of_part)


# --- What is read ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The rows of a split: what their cells say, and the images; labels are the rows' own numbers."""

    split: Split
    cells: Any  # an Arrow table of all columns but the images
    where: Callable[[int], str]

    def taken(self, rows: np.ndarray) -> "_Rows":
        def where(row: int) -> str:
            return self.where(int(rows[row]))

        return _Rows(self.split.take(rows), self.cells.take(rows), where)


def _rows(name: str, files: list[TableFile], chosen: Chosen, columns: Columns) -> _Rows:
    wanted = [*chosen.labels, *filter(None, (chosen.split, chosen.group))]
    for file in files:
        missing = [column for column in (chosen.image, *wanted) if column not in file.names]
        if missing:
            raise VitralError(
                f"{file.path} has no column {' and '.join(missing)}; it has {shortened(file.names)}"
            )
    images = [file.images(chosen.image, columns) for file in files]
    words = "row" if chosen.split else f"{name} row"
    count = sum(map(len, images))
    cells = _joined(files, wanted)
    groups = _group_numbers(cells[chosen.group], name) if chosen.group else None
    pictures, names = joined_images(images), joined_names(images, words)
    blocks = getattr(pictures, "blocks", None)
    split = Split(pictures, np.arange(count), names, groups, blocks)
    return _Rows(split, cells, _numbering(files, images))


def _joined(files: list[TableFile], wanted: list[str]) -> Any:
    import pyarrow as pa

    tables = [file.read(wanted).replace_schema_metadata(None) for file in files]
    try:
        return pa.concat_tables(tables)
    except (pa.ArrowException, ValueError) as error:
        raise VitralError(
            f"the images or labels of {shortened([file.path for file in files])} are of different types"
        ) from error


def _numbering(files: list[TableFile], images: Sequence[Images]) -> Callable[[int], str]:
    """By which file and number people find a row."""
    ends = np.cumsum([len(part) for part in images])

    def where(row: int) -> str:
        part = int(np.searchsorted(ends, row, side="right"))
        start = int(ends[part - 1]) if part else 0
        of_file = f" of {os.path.basename(files[part].path)}" if len(files) > 1 else ""
        return f"row {row - start + files[part].first_row}{of_file}"

    return where


def _lacks_labels(files: list[TableFile], chosen: Chosen) -> bool:
    return any(not {*chosen.labels} <= {*file.names} for file in files)


# --- Splits ----------------------------------------------------------------------------------------


def _without_second_split(source: str, chosen: Chosen) -> Chosen:
    """Where the files' names say it, no column does."""
    if chosen.split and "{split}" in source:
        if "split" in chosen.told:
            raise VitralError(
                f"{source} says by its names which split a file is of; leave out "
                f"split_column={chosen.split}, or name the files without {{split}}"
            )
        return replace(chosen, split="", note="")
    return chosen


def _dealt(source: str, rows: _Rows, chosen: Chosen, notes: list[str]) -> dict[str, _Rows]:
    """The rows of each split, by the column that says it."""
    codes, values = _codes(rows.cells[chosen.split])
    roles = [_role_of(value, chosen.split) for value in values]
    unknown = [place for place, found in enumerate(roles) if found is None]
    if unknown and "split" not in chosen.told:
        notes.append(
            f"{source}: the column {chosen.split!r} holds {shortened([str(values[u]) for u in unknown])}, "
            "which is no split; all rows are taken to train"
        )
        return {"train": rows}
    if unknown:
        row = int(np.flatnonzero(codes == unknown[0])[0])
        what = "nothing" if values[unknown[0]] is None else repr(values[unknown[0]])
        raise VitralError(
            f"{source}: the column {chosen.split!r} holds {what} in {rows.where(row)}; a split is "
            "train, val or test"
        )
    places = np.array([SPLITS.index(found) for found in roles if found])[codes]
    dealt = {name: np.flatnonzero(places == place) for place, name in enumerate(SPLITS)}
    if not len(dealt["train"]):
        raise VitralError(f"{source}: no row is of the split train, by the column {chosen.split!r}")
    return {name: rows.taken(found) for name, found in dealt.items() if len(found)}


def _role_of(value: Any, column: str) -> str | None:
    text = str(value).strip().lower()
    if column.strip().lower().startswith("is_val") and text in _BINARY:
        return _TRUTH[_BINARY[text]]
    return None if value is None else role(text)


def _codes(column: Any) -> tuple[np.ndarray, list]:
    """Each cell's place in a list of those that there are, empty ones among them, and that list."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()


# --- Labels ----------------------------------------------------------------------------------------


def _label_columns(
    parts: dict[str, _Rows], chosen: Chosen, columns: Columns, metadata: Mapping[bytes, bytes] | None
) -> dict[str, LabelColumn]:
    if len(chosen.labels) > 1:
        return _of_binary(parts, chosen)
    [label] = chosen.labels
    named = class_names(metadata, label)
    return {
        name: LabelColumn(name, _separated(rows, label, columns.label_delimiter), named, rows.where)
        for name, rows in parts.items()
    }


def _separated(rows: _Rows, label: str, delimiter: str) -> Any:
    """The labels of a cell as a list, where there is something between them; of an empty cell, none."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute
    cells = rows.cells[label]
    if not delimiter:
        return cells
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        raise VitralError(
            f"label_delimiter={delimiter!r} is for labels in text, and {label!r} is {cells.type}"
        )
    lists = []
    for chunk in pc.fill_null(cells, "").chunks:
        split = pc.split_pattern(chunk, delimiter)
        words, of_row = pc.utf8_trim_whitespace(split.flatten()), pc.list_parent_indices(split)
        kept = pc.not_equal(words, "")
        words, of_row = words.filter(kept), of_row.filter(kept).to_numpy()
        starts = np.searchsorted(of_row, np.arange(len(chunk) + 1))
        lists.append(pa.ListArray.from_arrays(pa.array(starts, pa.int32()), words))
    return pa.chunked_array(lists, pa.list_(cells.type))


def _of_binary(parts: dict[str, _Rows], chosen: Chosen) -> dict[str, LabelColumn]:
    """A column a class, in the order of their names; if each image shows just one, that is its label."""
    import pyarrow as pa

    labels = sorted(chosen.labels, key=str.strip)
    classes = tuple(label.strip() for label in labels)
    shown: dict[str, np.ndarray] = {}
    for name, rows in parts.items():
        table = [_binary(rows.cells[label]) for label in labels]
        for label, found in zip(labels, table, strict=True):
            if found is None:
                raise VitralError(f"{label!r} is to be a class's column, and holds other than 0 and 1")
        shown[name] = np.column_stack(table)  # pyrefly: ignore[no-matching-overload]
    one_each = all((rows_NL.sum(1) == 1).all() for rows_NL in shown.values())
    found = {}
    for name, rows_NL in shown.items():
        values: Any = pa.array(rows_NL.argmax(1))
        if not one_each:
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows_NL.ravel()), len(classes))
        found[name] = LabelColumn(name, pa.chunked_array([values]), classes, parts[name].where)
    return found


def _binary(column: Any) -> np.ndarray | None:
    """A column of 0 and 1 as truth values (n,); None if it holds anything else."""
    codes, values = _codes(column)
    truth = [_BINARY.get(str(value).lower()) for value in values]
    return None if None in truth else np.array(truth, dtype=bool)[codes]


def _all_binary(file: TableFile, names: list[str]) -> bool:
    table = file.read(names)
    return all(_binary(table[name]) is not None for name in names)


# --- What must not be ------------------------------------------------------------------------------


def _check_groups(source: str, parts: dict[str, _Rows], chosen: Chosen) -> Iterator[str]:
    """A note on groups in two splits. Raises VitralError if the user named the groups' column."""
    for one, other in combinations(parts, 2):
        ours, theirs = (np.asarray(parts[name].split.groups) for name in (one, other))
        both = np.intersect1d(ours, theirs) if chosen.group else []
        if not len(both):
            continue
        here, there = (int(np.flatnonzero(numbers == both[0])[0]) for numbers in (ours, theirs))
        text = (
            f"{source}: {len(both):,} of {chosen.group!r} stand in two splits, such as "
            f"{parts[one].cells[chosen.group][here].as_py()!r} in {one} ({parts[one].where(here)}) "
            f"and in {other} ({parts[other].where(there)})"
        )
        if "group" in chosen.told:
            raise VitralError(f"{text}; give all rows of one group the same split")
        yield f"{text}: what is measured there says little of new ones"


def _group_numbers(column: Any, split: str) -> np.ndarray:
    """A number for each group that depends on its name alone; an empty cell is a group by itself."""
    codes, values = _codes(column)
    numbers = np.array([_hash(f"={value}") for value in values], dtype=np.int64)[codes]
    for row in np.flatnonzero(np.array([value is None for value in values], dtype=bool)[codes]):
        numbers[row] = _hash(f"{split} row {row}")
    return numbers


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8], "little", signed=True)


def _check_repeated(
    source: str, parts: dict[str, _Rows], labels: dict[str, np.ndarray], columns: Columns
) -> Iterator[str]:
    """A note on images in two rows. Raises VitralError if the rows say different labels of one."""
    if not all(isinstance(rows.split.names, Names) for rows in parts.values()):
        return  # bytes, which have no name
    names = (name for rows in parts.values() for name in rows.split.names)
    plain = (os.path.normpath(name) if "./" in name or "//" in name else name for name in names)
    numbers = np.fromiter(map(hash, plain), np.int64)  # of this process alone
    _, codes = np.unique(numbers, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    again = codes[order][1:] == codes[order][:-1]
    if not again.any():
        return
    every = np.concatenate([*labels.values()])[order]
    differ = every[1:] != every[:-1]
    differ = differ.any(1) if differ.ndim > 1 else differ
    if (wrong := np.flatnonzero(again & differ)).size:
        (name, first), (_, second) = (_place(int(order[wrong[0] + step]), parts) for step in (0, 1))
        raise VitralError(
            f"{source}: the image {name} has two labels, in {first} and in {second}; correct "
            "one, or write several labels of an image into one cell, and say "
            f"{columns.say('label_delimiter')}"
        )
    yield f"{source}: {again.sum():,} rows name an image that an earlier row names, with the same label"


def _place(row: int, parts: dict[str, _Rows]) -> tuple[str, str]:
    """The name of an image, counted over all splits, and where its row is."""
    for rows in parts.values():
        if row < len(rows.split):
            return rows.split.names[row], rows.where(row)
        row -= len(rows.split)
    raise IndexError(row)
