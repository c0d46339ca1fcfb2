"""Which images a model is better trained without, and the table of the others."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitral.checks.copies import Copies
from vitral.checks.findings import Kind, Subject
from vitral.checks.labels import LabelSearch
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.files import write_atomically

COLUMNS = ("image", "label", "split", "group")
# Between several labels in a cell: the first that no class's name holds.
_DELIMITERS = (";", "|", "&&")


def left_out(
    subject: Subject, kinds: Sequence[Kind], copies: Copies, labels: LabelSearch | None
) -> dict[int, str]:
    """Choose the rows to leave out, and say why; a row for each.

    What cannot be read or is of one colour leaves every split. Of a picture that is in several splits, the
    images of the last one stay (test, then validation), and those of the others leave. Beyond that,
    validation and test images stay as they are, so that figures can be compared; of the training images leave
    all but the first of each picture, all of a picture that has several labels, and, where the search for
    wrong labels is to be trusted, those that it names.
    """
    by_key = {kind.key: kind for kind in kinds}
    chosen: dict[int, str] = {}
    for key in ("broken", "blank"):
        for finding in by_key[key].findings:
            chosen[finding.rows[0]] = by_key[key].title
    train = subject.splits.index("train")
    for rows in _pictures(copies.groups):
        last = max(subject.of[row] for row in rows)
        of_train = [row for row in rows if subject.of[row] == train]
        several = len({subject.labels_of(row) for row in rows}) > 1
        for row in rows:
            if subject.of[row] != last:
                chosen.setdefault(row, f"the same picture is in {subject.splits[last]}")
            elif last == train and several:
                chosen.setdefault(row, "the same picture has another label")
            elif last == train and row != of_train[0]:
                chosen.setdefault(row, f"the same picture as {subject.split.names[of_train[0]]}")
    for finding in by_key["label"].findings if labels is not None and labels.trusted else ():
        if subject.of[finding.rows[0]] == train:
            chosen.setdefault(finding.rows[0], finding.says)
    return dict(sorted(chosen.items()))


def _pictures(groups: np.ndarray) -> list[list[int]]:
    """The rows of each picture that several images show."""
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    return [part.tolist() for part in np.split(order, ends) if len(part) > 1]


@dataclass(frozen=True)
class Written:
    """A table that was written."""

    file: Path
    images: int  # that it lists
    delimiter: str  # between several labels in a cell; "": each image has one


def refuse_unlistable(subject: Subject) -> None:
    """Refuse to list images that are no files, before they are looked at.

    Raises:
        VitralError: if the first image is within another file or in memory, or names hold each delimiter.
    """
    _path(subject, 0, Path())
    _delimiter(subject)


def write_manifest(file: Path, subject: Subject, without: dict[int, str], groups: np.ndarray) -> Written:
    """Write a table of the images that stay: path, label, split and the number of its picture.

    A path is relative to the table where the image lies beside or below it.

    Raises:
        VitralError: if the images are no files of their own, or the table cannot be written.
    """
    table, folder, delimiter = io.StringIO(), file.absolute().parent, _delimiter(subject)
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    kept = [row for row in range(len(subject)) if row not in without]
    for row in kept:
        label = delimiter.join(subject.labels_of(row))
        writer.writerow([_path(subject, row, folder), label, subject.split_of(row), int(groups[row])])
    try:
        # Names that are no text go back to the bytes that they are.
        write_atomically(file, table.getvalue().encode(errors="surrogateescape"))
    except OSError as error:
        raise VitralError(f"{file} cannot be written: {error.strerror or error}") from error
    return Written(file, len(kept), delimiter)


def _delimiter(subject: Subject) -> str:
    if not subject.split.multi_label:
        return ""
    for mark in _DELIMITERS:
        if not any(mark in name for name in subject.data.classes):
            return mark
    raise VitralError(f"the names of classes hold {' and '.join(_DELIMITERS)}, so none can part labels")


def _path(subject: Subject, row: int, folder: Path) -> str:
    try:
        image = subject.split.images[row]
    except ImageError:
        image = None
    if not isinstance(image, Path):
        raise VitralError(
            f"{subject.data.source} holds its images within other files, and a table names files; take "
            "what to leave out from --json"
        )
    path = Path(os.path.abspath(image))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
