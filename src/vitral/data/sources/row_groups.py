"""Images in a column of parquet files, read by row groups, of which a bounded part is kept in memory.

The files' footers say where each row group lies, so any image can be read at any time, and nothing needs to
be held from one batch to the next. Whole groups are read, for a page of a column cannot be asked for alone.
"""

import os
import shlex
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitral.data.blocks import Blocks
from vitral.images.files import refuse_irregular
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.memory import available_bytes

# Of one process. What all workers keep of a file fits a machine of as many cores, and a data set below it
# is decompressed once.
KEPT_BYTES = 2**30
# Folders, as PATH lists them, that image paths in parquet files may lead to beside the file's own.
FOLDERS_VARIABLE = "VITRAL_IMAGE_FOLDERS"

# Gives a column of a row group: the file, the group's number in it, the column's name.
ReadGroup = Callable[[str, int, str], Any]


@dataclass(frozen=True)
class RowGroups:
    """Where the rows of some files lie; G groups."""

    files: tuple[str, ...]
    folders: tuple[str, ...]  # from which a file's paths begin
    file_of: np.ndarray  # (G,) indices into `files`
    numbers: np.ndarray  # (G,) within the file
    ends: np.ndarray  # (G,) the row after the last
    nbytes: np.ndarray  # (G,) of the images, in memory

    @classmethod
    def of(cls, file: str, folder: str, footer: Any, column: str) -> "RowGroups":
        """Takes the footer of a file."""
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        nbytes = [sum(part.total_uncompressed_size for part in chunks(group, column)) for group in groups]
        return cls(
            (file,),
            (folder,),
            np.zeros(len(groups), np.int32),
            np.arange(len(groups), dtype=np.int32),
            np.cumsum([group.num_rows for group in groups], dtype=np.int64),
            np.array(nbytes, np.int64),
        )

    @classmethod
    def joined(cls, parts: "Sequence[RowGroups]") -> "RowGroups":
        """Lays the rows of several files end to end."""
        first_files = np.cumsum([0, *(len(part.files) for part in parts)])
        first_rows = np.cumsum([0, *(len(part) for part in parts)])
        return cls(
            tuple(file for part in parts for file in part.files),
            tuple(folder for part in parts for folder in part.folders),
            np.concatenate([part.file_of + first for part, first in zip(parts, first_files, strict=False)]),
            np.concatenate([part.numbers for part in parts]),
            np.concatenate([part.ends + first for part, first in zip(parts, first_rows, strict=False)]),
            np.concatenate([part.nbytes for part in parts]),
        )

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


def chunks(group: Any, column: str) -> list[Any]:
    """Gives the parts of a column in a row group: one, or of a struct one a field."""
    parts = (group.column(number) for number in range(group.num_columns))
    return [part for part in parts if part.path_in_schema.split(".")[0] == column]


class RowGroupImages:
    """Encoded images of a column, by row; safe in threads, in forks and to pickle.

    Args:
        groups: where they lie.
        column: their column.
        read: what reads a group.
    """

    def __init__(self, groups: RowGroups, column: str, read: ReadGroup) -> None:
        self.groups, self.column, self.read = groups, column, read
        self._ends: list[int] = groups.ends.tolist()  # faster to search than an array
        self._kept: OrderedDict[int, _Cells] = OrderedDict()
        self._kept_bytes = 0
        self._lock, self._process = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"groups": self.groups, "column": self.column, "read": self.read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @classmethod
    def joined(cls, parts: "Sequence[RowGroupImages]") -> "RowGroupImages":
        """Gives the images of several files, one file after the other, kept together."""
        return cls(RowGroups.joined([part.groups for part in parts]), parts[0].column, parts[0].read)

    @property
    def blocks(self) -> Blocks:
        """Which images are cheap to read together."""
        groups = self.groups
        counts = np.diff(groups.ends, prepend=0)
        of_row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        nbytes = float(groups.nbytes.mean()) if len(counts) else 0.0
        thrashes = bool(groups.nbytes.sum() > KEPT_BYTES)
        return Blocks(of_row, nbytes, thrashes, room=KEPT_BYTES // 2)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> bytes | Path:
        index = range(self._ends[-1] if self._ends else 0)[int(index)]
        group = bisect_right(self._ends, index)
        value = self.cells(group)[index - (self._ends[group - 1] if group else 0)]
        if isinstance(value, bytes) and value:
            return value
        return _file_of_cell(value, self.groups.folders[self.groups.file_of[group]])

    def cells(self, group: int) -> "_Cells":
        """Gives the cells of a row group; of what is kept, that which was asked for the longest ago goes.

        Raises:
            ImageError: if it cannot be read.
        """
        if self._process != os.getpid():  # a thread of the parent may have held the lock
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            cells = _Cells(self._read(group))
            self._kept[group] = cells
            self._kept_bytes += cells.nbytes
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
            return cells

    def _read(self, group: int) -> Any:
        file, number = self.groups.files[self.groups.file_of[group]], int(self.groups.numbers[group])
        try:
            return self.read(file, number, self.column)
        except VitralError:  # a network's, say, which does not make the images damaged
            raise
        except Exception as error:  # Arrow raises a dozen kinds on damaged files
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ImageError(f"row group {number} of {file} cannot be read: {reason}") from error


def refuse_larger_than_memory(groups: RowGroups) -> None:
    """Raises VitralError for a row group that cannot be in memory as a whole."""
    if not len(groups):
        return
    largest, free = int(groups.nbytes.argmax()), available_bytes()
    if groups.nbytes[largest] > free:
        file, gigabytes = groups.files[groups.file_of[largest]], groups.nbytes[largest] / 1e9
        raise VitralError(
            f"{file} holds a row group of {gigabytes:.1f} GB of images, and {free / 1e9:.1f} GB of memory "
            "are free; write it again with row groups of some hundred rows "
            "(row_group_size=100), or store the images as an image folder"
        )


# --- What a cell may hold ----------------------------------------------------------------------------


class _Cells:
    """The cells of a row group: an image's bytes, or what stands in their place."""

    def __init__(self, column: Any) -> None:
        import pyarrow.compute
        import pyarrow.types as types

        pc: Any = pyarrow.compute  # whose functions are made when it is imported
        self.column = column.chunk(0) if column.num_chunks == 1 else column
        self.contents = self.paths = self.column
        self.nbytes: int = column.nbytes
        if types.is_struct(column.type):
            fields = {field.name for field in column.type}
            self.contents = pc.struct_field(self.column, "bytes") if "bytes" in fields else None
            self.paths = pc.struct_field(self.column, "path") if "path" in fields else None

    def __getitem__(self, row: int) -> Any:
        value = None if self.contents is None else self.contents[row].as_py()
        if value is None and self.paths is not None:
            return self.paths[row].as_py()
        return value

    def distinct_paths(self) -> list[str]:
        """Gives the paths of the images that have no bytes."""
        import pyarrow.compute

        pc: Any = pyarrow.compute
        paths: Any = self.paths
        if paths is not self.contents and self.contents is not None:
            paths = paths.filter(pc.is_null(self.contents))
        return [path for path in pc.unique(paths).to_pylist() if path]


def _file_of_cell(value: Any, folder: str) -> Any:
    """The file that a cell names, from `folder` on.

    Raises:
        ImageError: if there is none, or it may not be read.
    """
    if not value:
        raise ImageError("its cell is empty")
    if not isinstance(value, str):
        return value
    if refusal := _why_refused(folder, value):
        raise ImageError(refusal)
    path = Path(folder, value)
    refuse_irregular(path)
    return path


def refuse_unlike_images(images: RowGroupImages, footer: Any) -> None:
    """Raises VitralError unless the cells of a file are bytes, text that is a path, or {bytes, path}.

    Of paths, those that lead elsewhere are refused here, where the footer tells that there are any.
    """
    file, folder, column = images.groups.files[0], images.groups.folders[0], images.column
    kind = footer.schema.to_arrow_schema().field(column).type
    if not _may_be_paths(file, kind) or not _may_hold_paths(footer, column, kind):
        return
    for group in range(footer.num_row_groups):
        for path in images.cells(group).distinct_paths():
            if refusal := _why_refused(folder, path):
                raise VitralError(f"{file}: {refusal}")


def _may_be_paths(file: str, kind: Any) -> bool:
    """Whether a type of cells has room for paths."""
    import pyarrow as pa
    import pyarrow.types as types

    refusal = VitralError(f"{file}: images are {kind}; they must be bytes, paths, or {{bytes, path}}")
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        sound = _is_bytes(fields.get("bytes", pa.binary())) and _is_text(fields.get("path", pa.string()))
        if not sound or not fields.keys() & {"bytes", "path"} or len(fields) != kind.num_fields:
            raise refusal
        return "path" in fields
    if _is_text(_value_type(kind)):
        return True
    if _is_bytes(_value_type(kind)):
        return False
    raise refusal


def _may_hold_paths(footer: Any, column: str, kind: Any) -> bool:
    """Whether some cell has no bytes. To read all images for the answer is what footers spare."""
    import pyarrow.types as types

    if not types.is_struct(kind) or "bytes" not in {field.name for field in kind}:
        return True
    for number in range(footer.num_row_groups):
        for part in chunks(footer.row_group(number), column):
            if part.path_in_schema.endswith(".bytes"):
                known = part.statistics is not None and part.statistics.has_null_count
                if known and part.statistics.null_count:
                    return True
    return False


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


def _why_refused(folder: str, path: str) -> str:
    """A file from elsewhere must not have any file of this machine opened and shown."""
    own = os.path.abspath(folder)
    listed = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    allowed = [own, *(os.path.abspath(folder) for folder in listed if folder)]
    full = os.path.abspath(os.path.join(own, path))
    if "://" in path:
        return f"the image {path} is an address; store the images beside the file"
    if not any(_lies_in(full, folder) for folder in allowed):
        return (
            f"the image {path} lies outside of the file's folder; if that is meant, allow it with "
            f"{FOLDERS_VARIABLE}={shlex.quote(os.path.dirname(full))}"
        )
    return ""


def _lies_in(path: str, folder: str) -> bool:
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)
