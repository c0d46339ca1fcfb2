"""Where images with labels come from, one file a kind; `find` reads any of them."""

from pathlib import Path

from vitral.data.sources.digits import read_digits
from vitral.data.sources.folder import read_folder
from vitral.data.sources.parquet import read_parquet
from vitral.data.sources.split import SPLITS, Found, Images, Split, shortened
from vitral.data.sources.tree import FoundImages, find_images

__all__ = ["SPLITS", "Found", "FoundImages", "Images", "Split", "find", "find_images", "shortened"]


def find(source: str) -> Found:
    """The classes and splits of an image folder, parquet files or ``digits``.

    Raises:
        VitralError: if there is nothing usable there.
    """
    if source == "digits":
        return read_digits()
    return read_parquet(source) if source.endswith(".parquet") else read_folder(Path(source))
