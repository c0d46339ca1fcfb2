"""Decides what a folder, a file or a Dataset means as data, one file a kind; `find` reads what a path names.

`tree` walks folders, also for `vitral predict`; `folder` decides which folders are classes and splits;
`table` and `parquet` read files of rows, of which `chosen` finds the columns, `labels` the classes and `rows`
the rest; `dataset` what a torch Dataset is; `unlabelled` gives the images alone. `images/files.py` decides
which files count as images.
"""

from pathlib import Path

from vitral.data.columns import FOUND, Columns
from vitral.data.sources.digits import read_digits
from vitral.data.sources.folder import read_folder
from vitral.data.sources.hub import is_hub, read_hub
from vitral.data.sources.parquet import ParquetFile
from vitral.data.sources.rows import read_tables
from vitral.data.sources.shards import is_shards, read_shards
from vitral.data.sources.table import SUFFIXES, open_table
from vitral.data.sources.tree import FoundImages, find_images
from vitral.data.sources.unlabelled import Unlabelled, find_unlabelled
from vitral.data.split import Found

__all__ = ["FoundImages", "Unlabelled", "find", "find_images", "find_unlabelled", "holds_rows"]


def find(source: str, columns: Columns = FOUND) -> Found:
    """Gives the classes and splits of an image folder, a table, parquet files or ``digits``.

    Args:
        source: as the command line's DATA.
        columns: what a user says of a table's columns.

    Raises:
        VitralError: if there is nothing usable there.
    """
    if source == "digits":
        return read_digits()
    if source.lower().endswith(SUFFIXES):
        return read_tables(source, columns, open_table)
    if source.endswith(".parquet"):
        return read_tables(source, columns, ParquetFile)
    if is_hub(source):
        return read_hub(source, columns)
    if is_shards(source):
        return read_shards(source, columns)
    return read_folder(Path(source))


def holds_rows(source: str) -> bool:
    """Tells whether `find` reads it as rows of images, not as a folder."""
    of_rows = source.lower().endswith(SUFFIXES) or source.endswith(".parquet")
    return of_rows or source == "digits" or is_hub(source) or is_shards(source)
