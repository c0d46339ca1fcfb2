"""Parquet files with a column of images and one of labels, in the Hugging Face layout or a plainer one."""

import glob
import os
import shlex
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vitral.data.sources.labels import read_labels
from vitral.data.split import SPLITS, Found, Split, shortened
from vitral.images.files import refuse_irregular, why_not_read
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.extras import need

_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
# Folders, as PATH lists them, that image paths in parquet files may lead to beside the file's own.
FOLDERS_VARIABLE = "VITRAL_IMAGE_FOLDERS"


def read_parquet(pattern: str) -> Found:
    """The classes and splits of a file or pattern, with ``{split}`` in it or not.

    Raises:
        VitralError: if no file matches, or one cannot be used.
    """
    files = _files(pattern)
    parts = {name: [_read(path) for path in paths] for name, paths in files.items()}
    tables = {name: _joined(files[name], of_split) for name, of_split in parts.items()}
    classes, labels, notes = read_labels(pattern, tables)
    splits = {}
    for name in labels:
        folders = [Path(path).parent for path in files[name]]
        images = _ParquetImages(
            [(t["image"], folder) for t, folder in zip(parts[name], folders, strict=True)]
        )
        splits[name] = Split(images, labels[name], [f"{name} row {row}" for row in range(len(images))])
    return Found(classes, splits, tuple(notes))


def _files(pattern: str) -> dict[str, list[str]]:
    """The files of each split."""
    files = {
        name: sorted(found)
        for name, spellings in _SPELLINGS.items()
        for spelling in spellings
        if (found := _matches(pattern.replace("{split}", spelling)))
    }
    if "{split}" not in pattern:
        files = {"train": files["train"]} if files else {}
    if "train" not in files:
        raise VitralError(f"no file matches {pattern.replace('{split}', 'train')}")
    return {name: files[name] for name in SPLITS if name in files}


def _matches(pattern: str) -> list[str]:
    return [pattern] if os.path.lexists(pattern) else glob.glob(pattern)


def _read(path: str) -> Any:
    """The columns "image" and "label" of a file, each row's image checked to be of a kind that is read."""
    need("a parquet file", "pyarrow", extra="data")
    import pyarrow.parquet as pq

    try:
        refuse_irregular(path)
    except ImageError as error:
        raise VitralError(f"{path}: {error}") from None
    try:
        schema = pq.read_schema(path)
        label = "labels" if "labels" in schema.names and "label" not in schema.names else "label"
        missing = {"image", label} - set(schema.names)
        if missing:
            raise VitralError(
                f"{path} has no column {' and '.join(sorted(missing))}; it has {shortened(schema.names)}"
            )
        _refuse_twice(path, schema.names, ["image", label])
        _refuse_larger_than_memory(path, pq.read_metadata(path), ("image", label))
        table = pq.read_table(path, columns=["image", label], partitioning=None)
    except VitralError:
        raise
    except PermissionError as error:
        raise VitralError(f"{path} {why_not_read(error)}") from error
    except Exception as error:  # Arrow raises a dozen kinds on damaged files
        raise VitralError(f"{path} cannot be read as a parquet file: {_one_line(error)}") from error
    # Renaming drops the metadata, which names the classes.
    table = table.rename_columns(["image", "label"]).replace_schema_metadata(schema.metadata)
    _check_images(path, table["image"])
    return table


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refuse_twice(path: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if list(names).count(name) > 1:
            raise VitralError(f"{path} has {names.count(name)} columns {name!r}; which one is meant?")


def _refuse_larger_than_memory(path: str, metadata: Any, columns: tuple[str, str]) -> None:
    chunks = (
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    )
    wanted = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
    free = psutil.virtual_memory().available
    if wanted > free:
        raise VitralError(
            f"{path} holds {wanted / 1e9:.1f} GB of images, and {free / 1e9:.1f} GB of memory are free; "
            "store them as an image folder"
        )


def _joined(paths: list[str], tables: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.concat_tables(tables)
    except (pa.ArrowException, ValueError) as error:
        raise VitralError(f"the images or labels of {shortened(paths)} are of different types") from error


# --- Images ----------------------------------------------------------------------------------------


class _ParquetImages:
    """Encoded images of the parts of a parquet column, read out one at a time."""

    def __init__(self, parts: list[tuple[Any, Path]]) -> None:
        self.parts = parts  # a column of cells, and the folder that its paths begin from
        self.ends = np.cumsum([len(column) for column, _ in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> bytes | Path:
        index = range(len(self))[int(index)]
        part = bisect_right(self.ends, index)
        column, folder = self.parts[part]
        value = column[index - (self.ends[part - 1] if part else 0)].as_py()
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if not value:
            raise ImageError("its cell is empty")
        if not isinstance(value, str):
            return value
        refuse_irregular(folder / value)
        return folder / value


def _check_images(path: str, column: Any) -> None:
    """Raises VitralError unless the cells are bytes, text that is a path, or {bytes, path}."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.types as types

    pc: Any = pyarrow.compute  # whose functions are made when it is imported
    kind = column.type
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        sound = _is_bytes(fields.get("bytes", pa.binary())) and _is_text(fields.get("path", pa.string()))
        if not sound or not fields.keys() & {"bytes", "path"} or len(fields) != kind.num_fields:
            raise VitralError(f"{path}: images are {kind}; they must be bytes, paths, or {{bytes, path}}")
        if "path" not in fields:
            return
        paths = pc.struct_field(column, "path")
        if "bytes" in fields:
            paths = paths.filter(pc.is_null(pc.struct_field(column, "bytes")))
    elif _is_text(_value_type(kind)):
        paths = column
    elif _is_bytes(_value_type(kind)):
        return
    else:
        raise VitralError(f"{path}: images are {kind}; they must be bytes, paths, or {{bytes, path}}")
    _refuse_outside(path, pc.unique(paths).to_pylist())


def _value_type(kind: Any) -> Any:
    import pyarrow.types as types

    return kind.value_type if types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_null(kind)
    )


def _refuse_outside(file: str, paths: list[str | None]) -> None:
    """A file from elsewhere must not have any file of this machine opened and shown.

    Raises:
        VitralError: if a path leads out of the file's folder, and of those that the user allows.
    """
    own = os.path.abspath(os.path.dirname(file))
    listed = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    allowed = [own, *(os.path.abspath(folder) for folder in listed if folder)]
    for path in filter(None, paths):
        full = os.path.abspath(os.path.join(own, path))
        if "://" in path:
            raise VitralError(f"{file}: the image {path} is an address; store the images beside the file")
        if not any(_lies_in(full, folder) for folder in allowed):
            raise VitralError(
                f"{file}: the image {path} lies outside of the file's folder; if that is meant, allow it "
                f"with {FOLDERS_VARIABLE}={shlex.quote(os.path.dirname(full))}"
            )


def _lies_in(path: str, folder: str) -> bool:
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)
