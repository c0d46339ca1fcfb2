"""What DATA is, by its name alone."""

from typing import Literal

from vitral.data.sources.hub import is_hub
from vitral.data.sources.shards import is_shards
from vitral.data.sources.table import SUFFIXES

Kind = Literal["digits", "table", "parquet", "hub", "shards", "folder"]


def kind_of(source: str) -> Kind:
    """Tells what is read as what; "folder" stands for pictures too, and patterns of them."""
    if source == "digits":
        return "digits"
    if source.lower().endswith(SUFFIXES):
        return "table"
    if source.endswith(".parquet"):
        return "parquet"
    if is_hub(source):
        return "hub"
    return "shards" if is_shards(source) else "folder"
