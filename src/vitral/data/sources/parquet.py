"""Parquet files with a column of images and one of labels, in the Hugging Face layout or a plainer one."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from vitral.data.sources.rows import one_line
from vitral.data.split import Images
from vitral.images.files import refuse_irregular, why_not_read
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.extras import need

# Folders, as PATH lists them, that image paths in parquet files may lead to beside the file's own.
FOLDERS_VARIABLE = "VITRAL_IMAGE_FOLDERS"


class ParquetFile:
    """A file of rows whose images are bytes, or paths.

    Raises:
        VitralError: if it cannot be read.
    """

    first_row = 0

    def __init__(self, path: str) -> None:
        with _reading(path):
            import pyarrow.parquet as pq

            refuse_irregular(path)
            schema = pq.read_schema(path)
        self.path, self.names = path, list(schema.names)
        self.metadata: Mapping[bytes, bytes] | None = schema.metadata

    def read(self, columns: Sequence[str]) -> Any:
        """Give columns as an Arrow table."""
        import pyarrow.parquet as pq

        with _reading(self.path):
            return pq.read_table(self.path, columns=list(columns), partitioning=None)

    def images(self, column: str, root: str) -> Images:
        """Give the pictures of a column; paths begin from `root`, or the file's own folder."""
        import pyarrow.parquet as pq

        with _reading(self.path):
            metadata = pq.read_metadata(self.path)
        _refuse_larger_than_memory(self.path, metadata, column)
        cells = self.read([column])[column]
        folder = os.path.expanduser(root) if root else os.path.dirname(self.path)
        _check_images(self.path, cells, folder)
        return _ParquetImages(cells, Path(folder))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    need("a parquet file", "pyarrow", extra="data")
    try:
        yield
    except ImageError as error:
        raise VitralError(f"{path}: {error}") from None
    except PermissionError as error:
        raise VitralError(f"{path} {why_not_read(error)}") from error
    except Exception as error:  # Arrow raises a dozen kinds on damaged files
        raise VitralError(f"{path} cannot be read as a parquet file: {one_line(error)}") from error


def _refuse_larger_than_memory(path: str, metadata: Any, column: str) -> None:
    chunks = (
        metadata.row_group(group).column(place)
        for group in range(metadata.num_row_groups)
        for place in range(metadata.num_columns)
    )
    wanted = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
    free = psutil.virtual_memory().available
    if wanted > free:
        raise VitralError(
            f"{path} holds {wanted / 1e9:.1f} GB of images, and {free / 1e9:.1f} GB of memory are free; "
            "store them as an image folder"
        )


# --- Images ----------------------------------------------------------------------------------------


class _ParquetImages:
    """Encoded images of a column, read out one at a time."""

    def __init__(self, cells: Any, folder: Path) -> None:
        self.cells, self.folder = cells, folder  # whose paths begin from there

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> bytes | Path:
        value = self.cells[range(len(self))[int(index)]].as_py()
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if not value:
            raise ImageError("its cell is empty")
        if not isinstance(value, str):
            return value
        refuse_irregular(self.folder / value)
        return self.folder / value


def _check_images(path: str, column: Any, folder: str) -> None:
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
    _refuse_outside(path, pc.unique(paths).to_pylist(), folder)


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


def _refuse_outside(file: str, paths: list[str | None], folder: str) -> None:
    """A file from elsewhere must not have any file of this machine opened and shown.

    Raises:
        VitralError: if a path leads out of the folder that paths begin from, and of those that are allowed.
    """
    own = os.path.abspath(folder)
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
