"""`vitral.report`: one file that says what a model is, how good it is, and how far to believe it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vitral.data.image_data import DataSource, ImageData
from vitral.data.split import Split
from vitral.evaluation.analysis.answers import answers_of, training_images
from vitral.evaluation.analysis.classes import by_class
from vitral.evaluation.analysis.label_errors import label_errors
from vitral.evaluation.analysis.near_duplicates import near_duplicates
from vitral.evaluation.evaluate import SplitName
from vitral.reports.blocks import Section, Tiles
from vitral.reports.material import Material
from vitral.reports.page import render
from vitral.reports.pictures import Pictures
from vitral.reports.sections.by_class import by_class_section
from vitral.reports.sections.images import data_quality, images
from vitral.reports.sections.limits import limits
from vitral.reports.sections.provenance import provenance
from vitral.reports.sections.training import training
from vitral.reports.sections.trust import trust
from vitral.reports.sections.verdict import verdict
from vitral.reports.subject import Subject
from vitral.runtime.devices import Device, Precision
from vitral.runtime.errors import VitralError
from vitral.runtime.files import write_atomically
from vitral.runtime.ranges import Images, Whole, Workers
from vitral.runtime.settings import build
from vitral.runtime.version import vitral_version

# Told how far some work is: what, done, total.
Progress = Callable[[str, int, int], None]
# Of the page, what is no picture: words, tables and charts.
_TEXT_BYTES = 300_000


@dataclass(frozen=True)
class ReportOptions:
    """What a report looks at, and what it may weigh."""

    split: SplitName | None = None  # None: the test images, else those held out, else all
    limit: Images | None = None  # images that are judged at most, evenly over their order; None: all
    pictures: bool = True  # whether images of the data may be in the file
    megabytes: Annotated[float, Field(ge=0.4, le=100)] = 2.0  # that the file may have
    max_damaged: Whole = 0.01  # share of unreadable images past which to give up
    workers: Workers | None = None  # processes that load images; None: as many as the machine suits
    device: Device = "auto"
    precision: Precision = "auto"


@dataclass(frozen=True)
class Report:
    """A report, made; as a page and as JSON."""

    title: str
    lead: str  # the verdict
    tiles: Tiles
    sections: tuple[Section, ...]

    @property
    def html(self) -> str:
        """Give the page: one file that loads nothing; the same for the same run."""
        made_by = f"Vitral {vitral_version()}"
        return render(self.title, self.lead, self.tiles, self.sections, made_by)

    def to_dict(self) -> dict[str, Any]:
        """Give all but the pictures, for JSON."""
        return {
            "title": self.title,
            "verdict": self.lead,
            **self.tiles.to_dict(),
            "sections": [section.to_dict() for section in self.sections],
        }

    def write(self, file: str | PathLike) -> None:
        """Write the page; a file that is there is replaced as a whole.

        Raises:
            VitralError: if it cannot be written.
        """
        try:
            write_atomically(Path(file), self.html.encode())
        except OSError as error:
            raise VitralError(f"{file} cannot be written: {error.strerror or error}") from error


def report(
    model: str | PathLike,
    data: DataSource | None = None,
    *,
    on_progress: Progress = lambda *_: None,
    warn: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Report on a run or a model, judged on labelled images if there are any.

    Args:
        model: a run's folder, or any checkpoint with labels.
        data: as `open_data` takes it; None: only what the run itself recorded is told.
        on_progress: told how far each part of the work is.
        warn: told of each damaged image.
        options: fields of `ReportOptions`, such as ``limit=1000``.

    Raises:
        VitralError: if the model, the data or an option cannot be used, or their classes differ.
    """
    wanted = build(ReportOptions, options)
    subject = Subject.read(fspath(model), wanted.device, wanted.precision)
    material = _material(subject, data, wanted, on_progress, warn)
    lead, tiles = verdict(material)
    makers = (training, by_class_section, trust, images, data_quality)
    parts = tuple(make(material) for make in makers)
    sections = (*parts, provenance(material))
    return Report(subject.name, lead, tiles, (*sections, limits(material, sections)))


def _material(
    subject: Subject,
    data: DataSource | None,
    wanted: ReportOptions,
    on_progress: Progress,
    warn: Callable[[str], None],
) -> Material:
    """Ask the model about the images, and analyse what it says."""
    pictures = Pictures(int(wanted.megabytes * 1e6) - _TEXT_BYTES, wanted.pictures)
    material = Material(subject, pictures)
    if data is None:
        return material
    if not subject.classifier.labels:
        raise VitralError(
            f"{subject.source} has no labels to be judged by; leave out the data, or train a head"
        )
    doubts: list[str] = []
    answers = answers_of(
        subject.classifier,
        data,
        images=wanted.limit,
        warn=doubts.append,
        on_images=lambda done, total: on_progress("judging", done, total),
        split=wanted.split,
        max_damaged=wanted.max_damaged,
        workers=wanted.workers,
    )
    for doubt in doubts:
        warn(doubt)
    train = _training_split(subject, data, answers.split_name)
    found = near_duplicates(
        answers.split,
        train,
        workers=wanted.workers,
        on_images=lambda done, total: on_progress("looking for duplicates", done, total),
    )
    return replace(
        material,
        data=data.source if isinstance(data, ImageData) else str(data),
        answers=answers,
        classes=by_class(answers),
        labels=label_errors(answers),
        duplicates=found,
        training=train,
        doubts=tuple(doubts),
    )


def _training_split(subject: Subject, data: DataSource, judged: str) -> Split | None:
    """The images to look for near-duplicates among; None if the judged ones are the training images."""
    if judged in ("train", "all"):
        return None
    try:
        return training_images(subject.classifier, data)
    except VitralError:  # the data has no training images
        return None
