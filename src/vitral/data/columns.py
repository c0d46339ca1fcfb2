"""`Columns`: which columns of a table hold the images, the labels and what else is known of them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Columns:
    """What a user says of a table's columns; what is left out is found by the table's own names."""

    image: str = ""  # of a path, or of a file's bytes
    label: str = ""  # of the classes; several columns of 0 and 1 are named with commas between
    label_delimiter: str = ""  # between several labels in one cell; "": a cell is one label
    split: str = ""  # of "train", "val" or "test", by any of their usual names
    group: str = ""  # of what must not stand in two splits, such as a patient
    image_root: Path | None = None  # the folder that paths begin from; None: where the table lies


FOUND = Columns()
