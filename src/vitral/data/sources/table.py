"""Tables in text: CSV and TSV, whose cells are all text, and JSONL, an object a line."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vitral.data.columns import Columns
from vitral.data.names import Names
from vitral.data.sources.files import NamedFiles
from vitral.data.sources.rows import one_line
from vitral.images.files import refuse_irregular, why_not_read
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.extras import need

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_DELIMITERS = ",;\t"  # of equally many in the first line, the first
_JSON_BLOCK = 2**24  # bytes; a line is no longer


class TextTable:
    """A file of rows whose images are paths.

    Raises:
        VitralError: if it cannot be read.
    """

    first_row = 1  # the number that people give the first row
    metadata: Mapping[bytes, bytes] | None = None

    def __init__(self, path: str) -> None:
        need("a table", "pyarrow", extra="data")
        self.path = path
        try:
            refuse_irregular(path)
        except ImageError as error:
            raise VitralError(f"{path}: {error}") from None

    @property
    def names(self) -> list[str]:
        raise NotImplementedError

    def cells(self, columns: Sequence[str]) -> Any:
        """Columns as an Arrow table."""
        raise NotImplementedError

    def read(self, columns: Sequence[str]) -> Any:
        """Give columns as an Arrow table; text without spaces round it, and nothing where there is none."""
        import pyarrow as pa

        cells = self.cells(columns)
        return pa.table({name: _trimmed(cells[name]) for name in columns})

    def paths(self, column: str) -> Any:
        """Give a column of paths with forward slashes, as Arrow text."""
        import pyarrow as pa
        import pyarrow.compute

        pc: Any = pyarrow.compute
        cells = self.cells([column])[column]
        if not pa.types.is_string(cells.type):
            raise VitralError(f"{self.path}: the images of {column!r} are {cells.type}; they must be paths")
        return pc.replace_substring(pc.utf8_trim_whitespace(pc.fill_null(cells, "")), "\\", "/")

    def images(self, column: str, columns: Columns) -> NamedFiles:
        """Give the pictures that a column names, from `image_root` on, or the file's own folder."""
        folder = os.path.expanduser(columns.root) if columns.root else os.path.dirname(self.path)
        advice = f"if the paths begin from another folder, say which with {columns.say('image_root')}"
        return NamedFiles(folder, names_of(self.paths(column))).checked(self.path, advice)


def names_of(column: Any) -> Names:
    """Give the text of an Arrow column, copied out of it."""
    texts, ends, length = [], [], 0
    for chunk in column.chunks:
        chunk = chunk.cast("large_string")
        _, offsets, data = chunk.buffers()
        places = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        first, last = (int(places[0]), int(places[-1])) if len(chunk) else (0, 0)
        texts.append(
            np.frombuffer(data, np.uint8)[first:last].copy() if last > first else np.empty(0, np.uint8)
        )
        ends.append(places[1:] - first + length)
        length += last - first
    if not texts:
        return Names.of([])
    return Names(np.concatenate(texts), np.concatenate(ends))


def _trimmed(cells: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute
    if not pa.types.is_string(cells.type):
        return cells
    cells = pc.utf8_trim_whitespace(cells)
    return pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)


class DelimitedTable(TextTable):
    """CSV and TSV, UTF-8, whose first line names the columns; 007 stays 007."""

    first_row = 2

    @cached_property
    def _header(self) -> tuple[str, list[str]]:
        """What stands between cells, and the columns' names."""
        with _read_as(self.path, "a table"), Path(self.path).open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            if not first.strip():
                raise VitralError(f"{self.path} has no first line that names the columns; is it empty?")
            if "\0" in first:
                raise VitralError(f"{self.path} is no text in UTF-8; save it as CSV in UTF-8")
            delimiter = "\t" if self.path.lower().endswith(".tsv") else max(_DELIMITERS, key=first.count)
            file.seek(0)
            return delimiter, next(csv.reader(file, delimiter=delimiter), [])

    @property
    def names(self) -> list[str]:
        return self._header[1]

    def cells(self, columns: Sequence[str]) -> Any:
        import pyarrow as pa
        import pyarrow.csv

        parse = pyarrow.csv.ParseOptions(delimiter=self._header[0], newlines_in_values=True)
        convert = pyarrow.csv.ConvertOptions(
            include_columns=list(columns),
            column_types={name: pa.string() for name in columns},
            strings_can_be_null=False,
        )
        with _read_as(self.path, "a table"):
            return pyarrow.csv.read_csv(self.path, parse_options=parse, convert_options=convert)


class JsonLines(TextTable):
    """An object a line; a label is text, a number, or a list of those."""

    @property
    def names(self) -> list[str]:
        return self._table.schema.names

    def cells(self, columns: Sequence[str]) -> Any:
        return self._table.select(list(columns))

    @cached_property
    def _table(self) -> Any:
        import pyarrow as pa
        import pyarrow.json

        block = pyarrow.json.ReadOptions(block_size=_JSON_BLOCK)
        with _read_as(self.path, "JSONL, an object a line"):
            table = pyarrow.json.read_json(self.path, read_options=block)
            # Of text that looks like a time Arrow makes a time.
            times = [(part.name, pa.string()) for part in table.schema if pa.types.is_timestamp(part.type)]
            if not times:
                return table
            parse = pyarrow.json.ParseOptions(explicit_schema=pa.schema(times))
            return pyarrow.json.read_json(self.path, read_options=block, parse_options=parse)


@contextmanager
def _read_as(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except VitralError:
        raise
    except PermissionError as error:
        raise VitralError(f"{path} {why_not_read(error)}") from error
    except UnicodeDecodeError as error:
        raise VitralError(f"{path} is no text in UTF-8; save it as CSV in UTF-8") from error
    except Exception as error:  # Arrow raises several kinds on damaged files
        raise VitralError(f"{path} cannot be read as {what}: {one_line(error)}") from error


def open_table(path: str) -> TextTable:
    """Open a CSV, TSV or JSONL file."""
    kind = DelimitedTable if path.lower().endswith((".csv", ".tsv")) else JsonLines
    return kind(path)
