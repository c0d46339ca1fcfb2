"""Decides what a folder, a file or a Dataset means as data, one file a kind; `find` reads what a path names.

`tree` walks folders, also for `vitral predict`; `folder` decides which folders are classes and splits;
`parquet` and `labels` what columns mean; `dataset` what a torch Dataset is. `images/files.py` decides which
files count as images.
"""

from pathlib import Path

from vitral.data.columns import FOUND, Columns
from vitral.data.sources.digits import read_digits
from vitral.data.sources.folder import read_folder
from vitral.data.sources.parquet import read_parquet
from vitral.data.sources.shards import is_shards, read_shards
from vitral.data.sources.tree import FoundImages, find_images
from vitral.data.split import Found

__all__ = ["FoundImages", "find", "find_images"]


def find(source: str, columns: Columns = FOUND) -> Found:
    """Gives the classes and splits of an image folder, parquet files or ``digits``.

    Args:
        source: as the command line's DATA.
        columns: what a user says of a table's columns.

    Raises:
        VitralError: if there is nothing usable there.
    """
    if source == "digits":
        return read_digits()
    if is_shards(source):
        return read_shards(source, columns)
    return read_parquet(source) if source.endswith(".parquet") else read_folder(Path(source))
