"""Decides what a folder, a file or a Dataset means as data, one file a kind; `find` reads what a path names.

`kinds` tells what a name means. `tree` walks folders, also for `vitral predict`; `folder` decides which are
classes and splits; `table` and `parquet` read files of rows, of which `chosen` finds the columns, `labels`
the classes and `rows` the rest; `dataset` what a torch Dataset is; `unlabelled` gives the images alone, and
`images/files.py` decides which files count as images.
"""

from pathlib import Path

from vitral.data.columns import FOUND, Columns
from vitral.data.sources.digits import read_digits
from vitral.data.sources.folder import read_folder
from vitral.data.sources.hub import read_hub
from vitral.data.sources.kinds import kind_of
from vitral.data.sources.parquet import ParquetFile
from vitral.data.sources.rows import read_tables
from vitral.data.sources.shards import read_shards
from vitral.data.sources.table import open_table
from vitral.data.sources.tree import FoundImages, find_images
from vitral.data.sources.unlabelled import Unlabelled, find_unlabelled
from vitral.data.split import Found

__all__ = ["FoundImages", "Unlabelled", "find", "find_images", "find_unlabelled", "kind_of"]


def find(source: str, columns: Columns = FOUND) -> Found:
    """Gives the classes and splits of an image folder, a table, parquet files or ``digits``.

    Args:
        source: as the command line's DATA.
        columns: what a user says of a table's columns.

    Raises:
        VitralError: if there is nothing usable there.
    """
    match kind_of(source):
        case "digits":
            return read_digits()
        case "table":
            return read_tables(source, columns, open_table)
        case "parquet":
            return read_tables(source, columns, ParquetFile)
        case "hub":
            return read_hub(source, columns)
        case "shards":
            return read_shards(source, columns)
        case "folder":
            return read_folder(Path(source))
