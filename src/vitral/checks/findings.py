"""What a check speaks of: all images of a source together, and what was found, a kind at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vitral.data.image_data import ImageData
from vitral.data.split import Split, joined

# What is certainly wrong; what a person should look at; what is good to know.
Level = Literal["wrong", "doubtful", "note"]


@dataclass(frozen=True)
class Subject:
    """All images of a source, and which split each is of."""

    data: ImageData
    split: Split  # all images, one split after the other
    of: np.ndarray  # (n,) the place of each image's split in `splits`

    @classmethod
    def of_data(cls, data: ImageData) -> "Subject":
        """Put the splits of a source one after the other; no image is read."""
        parts = [*data.splits.values()]
        return cls(data, joined(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts]))

    def __len__(self) -> int:
        return len(self.of)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.data.splits)

    @property
    def notes(self) -> tuple[str, ...]:
        """Give what the source's reader passed over; of copies the check itself tells."""
        return self.data.notes if self.data.found is None else self.data.found.notes

    def split_of(self, row: int) -> str:
        """Name the split of an image."""
        return self.splits[int(self.of[row])]

    def labels_of(self, row: int) -> tuple[str, ...]:
        """Name the classes that an image is said to show."""
        label = self.split.labels[row]
        places = np.flatnonzero(label) if self.split.multi_label else [label]
        return tuple(self.data.classes[int(place)] for place in places)

    def label_words(self, row: int) -> str:
        """Write the label of an image, or its labels."""
        return ", ".join(self.labels_of(row)) or "nothing"


@dataclass(frozen=True)
class Finding:
    """One thing that was found: of an image, of several that belong together, or of a class (no image)."""

    rows: tuple[int, ...]  # of `Subject.split`; the first is the one that it is about
    says: str
    # How sure it is, for whoever sorts: the distance of two pictures, the probability of a label.
    measure: float | None = None


@dataclass(frozen=True)
class Kind:
    """All findings of a kind, the worst first."""

    key: str
    title: str
    level: Level
    means: str  # what it does to a model, and what to do about it
    findings: tuple[Finding, ...] = ()
    missing: str = ""  # why it was not looked for; "": it was

    @property
    def images(self) -> int:
        """Count the images that it is about."""
        return len({row for finding in self.findings for row in finding.rows})

    def to_dict(self, subject: Subject) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": self.key, "title": self.title, "level": self.level}
        if self.missing:
            return {**found, "missing": self.missing}
        listed = [_as_dict(finding, subject) for finding in self.findings]
        return {**found, "images": self.images, "findings": listed}


def _as_dict(finding: Finding, subject: Subject) -> dict[str, Any]:
    images = [
        {
            "image": subject.split.names[row],
            "split": subject.split_of(row),
            "label": list(subject.labels_of(row)),
        }
        for row in finding.rows
    ]
    measure = {} if finding.measure is None else {"measure": finding.measure}
    return {"images": images, "says": finding.says, **measure}


def single(rows: Iterable[int], says: Iterable[str]) -> tuple[Finding, ...]:
    """Make a finding of each image."""
    return tuple(Finding((int(row),), words) for row, words in zip(rows, says, strict=True))
