"""The images that a model got wrong, the worst first: as a list in a file, and as a sheet of pictures."""

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from vitral.data.split import Images, Split
from vitral.evaluation.outcomes import Outcomes
from vitral.images.picture import open_image
from vitral.images.sheet import prediction_sheet
from vitral.runtime.errors import ImageError, VitralError
from vitral.runtime.files import write_atomically
from vitral.runtime.limits import LIST_SUFFIXES, SHEET_SUFFIXES

_PICTURED = 100
_COLUMNS = ("path", "truth", "answer", "probability")


@dataclass(frozen=True)
class Mistake:
    """One image; of a multi-label model, the truth and the answer are any number of labels."""

    path: str  # or the name by which its source knows it
    truth: str | tuple[str, ...]
    answer: str | tuple[str, ...]
    probability: float  # that the model gave its answer; of several labels, the surest wrong one's
    index: int  # among the images


@dataclass(frozen=True)
class Mistakes:
    """What a model got wrong of the images that it was judged on, by falling probability of its answers."""

    rows: tuple[Mistake, ...]
    judged: int  # images, the right ones too
    images: Images = field(repr=False)

    def write(self, file: Path) -> None:
        """Writes path, truth, answer and probability of each, as CSV or JSON by the file's suffix.

        Several labels are a list in JSON, and the same JSON text in a cell of CSV.

        Raises:
            VitralError: if the suffix is neither, or the file cannot be written.
        """
        refuse_unwritable(file, LIST_SUFFIXES)
        rows = [{name: getattr(row, name) for name in _COLUMNS} for row in self.rows]
        if file.suffix.lower() == ".json":
            write_atomically(file, f"{json.dumps(rows, indent=1, allow_nan=False)}\n".encode())
            return
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([_cell(value) for value in row.values()] for row in rows)
        # Names that are no text go back to the bytes that they are.
        write_atomically(file, table.getvalue().encode(errors="surrogateescape"))

    def draw(self, file: Path, title: str) -> None:
        """Draws the worst hundred at most, each with its answer, probability and truth.

        Raises:
            VitralError: if the suffix is of no picture, or the file cannot be written.
        """
        refuse_unwritable(file, SHEET_SUFFIXES)
        worst = self.rows[:_PICTURED]
        sheet = prediction_sheet(
            title,
            self._pictures(worst),
            [(_words(row.answer), row.probability) for row in worst],
            [_words(row.truth) for row in worst],
            tile=112,
        )
        content = io.BytesIO()
        sheet.save(content, Image.registered_extensions()[file.suffix.lower()])
        write_atomically(file, content.getvalue())

    def _pictures(self, rows: Sequence[Mistake]) -> Iterator[Image.Image]:
        for row in rows:
            try:
                yield open_image(self.images[row.index])
            except ImageError:  # it could be read a moment ago
                yield Image.new("RGB", (8, 8), "grey")


def find_mistakes(split: Split, rows: np.ndarray, outcomes: Outcomes, labels: Sequence[str]) -> Mistakes:
    """Find what is wrong among a model's answers.

    Args:
        split: the images, its labels being indices into `labels` or, multi-label, of what each shows.
        rows: of the images that were judged, (n,).
        outcomes: of those.
        labels: the model's.
    """
    wrong = outcomes.wrong
    found = [
        Mistake(
            _path(split, row),
            named(truth, labels),
            named(answer, labels),
            float(probability),
            int(row),
        )
        for row, truth, answer, probability in zip(
            rows[wrong],
            outcomes.labels[wrong],
            outcomes.answers[wrong],
            outcomes.confidences_in_error[wrong],
            strict=True,
        )
    ]
    found.sort(key=lambda mistake: (-mistake.probability, mistake.path))
    return Mistakes(tuple(found), len(rows), split.images)


def refuse_unwritable(file: Path, suffixes: Sequence[str]) -> None:
    """Raises VitralError if no file of one of the suffixes, if any are named, can be written there."""
    if suffixes and file.suffix.lower() not in suffixes:
        listed = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise VitralError(f"{str(file)!r} does not end in {listed}, which says what is written")
    if file.is_dir():
        raise VitralError(f"{file} is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise VitralError(f"{file} cannot be written: {error.strerror} ({file.parent})") from error


def _path(split: Split, row: int) -> str:
    image = split.images[int(row)]
    return str(image) if isinstance(image, str | PathLike) else split.names[int(row)]


def named(label: np.ndarray, labels: Sequence[str]) -> str | tuple[str, ...]:
    if label.ndim == 0:
        return labels[int(label)]
    return tuple(labels[int(index)] for index in np.flatnonzero(label))


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, tuple) else value


def _words(label: str | tuple[str, ...]) -> str:
    return label if isinstance(label, str) else ", ".join(label) or "nothing"
