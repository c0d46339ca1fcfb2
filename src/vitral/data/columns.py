"""`Columns`: which columns of a table hold the images, the labels and what else is known of them."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from vitral.runtime.errors import VitralError
from vitral.runtime.spelling import meant


@dataclass(frozen=True)
class Columns:
    """What a user says of a table's columns; what is left out is found by the table's own names."""

    image: str = ""  # of a path, or of a file's bytes
    label: str = ""  # of the classes; several columns of 0 and 1 are named with commas between
    label_delimiter: str = ""  # between several labels in one cell; "": a cell is one label
    split: str = ""  # of "train", "val" or "test", by any of their usual names
    group: str = ""  # of what must not stand in two splits, such as a patient
    image_root: str = ""  # the folder that paths begin from; "": where the table lies
    # Whether a model's training said so: of another table, columns that it lacks are found by its own names.
    recorded: bool = False
    # Whether it was said by settings, as `vitral train` takes them; other commands have --column.
    by_setting: bool = field(default=False, compare=False)

    @classmethod
    def of_words(cls, words: Mapping[str, str]) -> Self:
        """Takes what ``{"label": "breed"}`` says.

        Raises:
            VitralError: for an unknown word.
        """
        for word in words:
            if word not in WORDS:
                raise VitralError(f"a column is one of {', '.join(WORDS)}, not {word!r}{meant(word, WORDS)}")
        return cls(**words)  # pyrefly: ignore[bad-argument-type]

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Takes what a model's training recorded."""
        found = metadata.get("columns") or {}
        return cls(**{word: found[word] for word in WORDS if word in found}, recorded=bool(found))

    @property
    def root(self) -> str:
        """The folder that paths begin from; "" for the table's own."""
        return "" if self.recorded and not os.path.isdir(self.image_root) else self.image_root

    def say(self, *words: str) -> str:
        """Give what a user writes to name them, for messages: ``label_column=``, or ``--column label=``."""
        if not self.by_setting:
            return " ".join(f"--column {word}=" for word in words)
        return " ".join(f"{word}=" if word in _SETTINGS else f"{word}_column=" for word in words)

    def metadata(self) -> dict[str, dict[str, str]]:
        """What a training records of them, to be laid among the rest; {} where nothing was said."""
        said = {word: value for word, value in asdict(self).items() if value and word in WORDS}
        return {"columns": said} if said else {}


WORDS = ("image", "label", "label_delimiter", "split", "group", "image_root")
_SETTINGS = ("label_delimiter", "image_root")  # whose names are those of the settings
FOUND = Columns()
