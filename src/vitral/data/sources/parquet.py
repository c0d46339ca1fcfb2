"""Parquet files with a column of images and one of labels, in the Hugging Face layout or a plainer one.

Footers and labels are read at once; images stay in the files, and are read by row groups (`row_groups`).
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from vitral.data.columns import Columns
from vitral.data.sources.row_groups import (
    RowGroupImages,
    RowGroups,
    refuse_larger_than_memory,
    refuse_unlike_images,
)
from vitral.data.sources.rows import one_line
from vitral.images.files import refuse_irregular, why_not_read
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.extras import need

_FOOTERS = 64  # of files that were read from last, which are kept


class Store(Protocol):
    """Where files are, and how parts of them are read; safe to pickle."""

    def footer(self, path: str) -> Any:
        """The metadata of a file."""
        ...

    def columns(self, path: str, columns: Sequence[str]) -> Any:
        """Columns as an Arrow table."""
        ...

    def group(self, path: str, number: int, column: str) -> Any:
        """A column of one row group."""
        ...


class Disk:
    """Files of this machine; opened each time, so that no process shares its place in one."""

    def footer(self, path: str) -> Any:
        refuse_irregular(path)
        return _footer(path)

    def columns(self, path: str, columns: Sequence[str]) -> Any:
        import pyarrow.parquet as pq

        return pq.read_table(path, columns=list(columns), partitioning=None)

    def group(self, path: str, number: int, column: str) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, metadata=_footer(path)) as opened:
            return opened.read_row_group(number, columns=[column], use_threads=False)[column]


def _footer(path: str) -> Any:
    """What a file says of its row groups; to read it of a thousand takes ten times as long as one group."""
    about = os.stat(path)
    return _footer_as_of(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(_FOOTERS)
def _footer_as_of(path: str, size: int, modified: int) -> Any:  # noqa: ARG001 - a changed file is read again
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


class ParquetFile:
    """A file of rows whose images are bytes, or paths.

    Raises:
        VitralError: if it cannot be read.
    """

    first_row = 0

    def __init__(self, path: str, store: Store | None = None) -> None:
        need("a parquet file", "pyarrow", extra="data")
        self.path, self.store = path, Disk() if store is None else store
        with _reading(path):
            self.footer = self.store.footer(path)
            schema = self.footer.schema.to_arrow_schema()
        self.names = list(schema.names)
        self.metadata: Mapping[bytes, bytes] | None = schema.metadata

    def read(self, columns: Sequence[str]) -> Any:
        """Give columns as an Arrow table."""
        with _reading(self.path):
            return self.store.columns(self.path, columns)

    def images(self, column: str, columns: Columns) -> RowGroupImages:
        """Give the pictures of a column; paths begin from `image_root`, or the file's own folder."""
        folder = columns.root or os.path.dirname(self.path)
        with _reading(self.path):
            groups = RowGroups.of(self.path, folder, self.footer, column)
            images = RowGroupImages(groups, column, self.store.group)
            refuse_unlike_images(images, self.footer)
        refuse_larger_than_memory(groups)
        return images


@contextmanager
def _reading(path: str) -> Iterator[None]:
    need("a parquet file", "pyarrow", extra="data")
    try:
        yield
    except ImageError as error:
        raise VitralError(f"{path}: {error}") from None
    except VitralError:
        raise
    except PermissionError as error:
        raise VitralError(f"{path} {why_not_read(error)}") from error
    except Exception as error:  # Arrow raises a dozen kinds on damaged files
        raise VitralError(f"{path} cannot be read as a parquet file: {one_line(error)}") from error
