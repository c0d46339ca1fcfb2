"""What a report is made from, gathered: the model is asked about the images, and its answers analysed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from vitral.data.image_data import DataSource, ImageData
from vitral.data.split import Split
from vitral.evaluation.analysis.answers import answers_of, training_images
from vitral.evaluation.analysis.classes import by_class
from vitral.evaluation.analysis.label_errors import label_errors
from vitral.evaluation.analysis.near_duplicates import near_duplicates
from vitral.evaluation.evaluate import SplitName
from vitral.explain.figures.draw import measure_figures, page_of
from vitral.explain.figures.page import Page
from vitral.reports.looking import explained, images_to_score, scored
from vitral.reports.material import Material
from vitral.reports.subject import Subject
from vitral.runtime.devices import Device, Precision
from vitral.runtime.errors import VitralError
from vitral.runtime.ranges import Images, Whole, Workers

# Told how far some work is: what, done, total.
Progress = Callable[[str, int, int], None]

_FIGURED = 64  # images that the figures are measured on


@dataclass(frozen=True)
class ReportOptions:
    """What a report looks at, and what it may weigh."""

    split: SplitName | None = None  # None: the test images, else those held out, else all
    limit: Images | None = None  # images that are judged at most, evenly over their order; None: all
    pictures: bool = True  # whether images of the data may be in the file
    megabytes: Annotated[float, Field(ge=0.1, le=100)] = 2.0  # that the file may have
    maps: Annotated[int, Field(ge=0, le=100)] = 12  # images whose maps are shown
    score: Annotated[int, Field(ge=0, le=10**6)] | None = None  # images that faithfulness is measured on
    figures: bool = True  # whether the papers' figures are drawn
    max_damaged: Whole = 0.01  # share of unreadable images past which to give up
    workers: Workers | None = None  # processes that load images; None: as many as the machine suits
    device: Device = "auto"
    precision: Precision = "auto"


@dataclass(frozen=True)
class Asked:
    """What a report is asked for, and who is told of its making."""

    data: DataSource | None
    options: ReportOptions
    on_progress: Progress
    warn: Callable[[str], None]

    def telling(self, what: str) -> Callable[[int, int], None]:
        """Give who is told how far a part of the work is."""
        return lambda done, total: self.on_progress(what, done, total)


def judged(subject: Subject, asked: Asked) -> Material:
    """Ask the model about the images, if there are any.

    Raises:
        VitralError: if it has no labels, or the data cannot be used or has other classes.
    """
    material = Material(subject)
    if asked.data is None:
        return material
    if not subject.classifier.labels:
        raise VitralError(f"{subject.source} has no labels to be judged by; leave the data out, or train it")
    doubts: list[str] = []
    answers = answers_of(
        subject.classifier,
        asked.data,
        images=asked.options.limit,
        warn=doubts.append,
        on_images=asked.telling("judging"),
        split=asked.options.split,
        max_damaged=asked.options.max_damaged,
        workers=asked.options.workers,
    )
    for doubt in doubts:
        asked.warn(doubt)
    name = asked.data.source if isinstance(asked.data, ImageData) else str(asked.data)
    return replace(material, data=name, answers=answers, classes=by_class(answers), doubts=tuple(doubts))


def examined(material: Material, asked: Asked) -> Material:
    """Look for wrong labels, and for pictures that are in training and held-out images."""
    answers = material.answers
    if answers is None or asked.data is None:
        return material
    train = _training_split(material.subject, asked.data, answers.split_name)
    found = near_duplicates(
        answers.split,
        train,
        workers=asked.options.workers,
        on_images=asked.telling("looking for duplicates"),
    )
    return replace(material, labels=label_errors(answers), duplicates=found, training=train)


def looked_into(material: Material, asked: Asked) -> Material:
    """Look into the model: maps of a few images, how faithful they are, and the papers' figures."""
    answers, subject, wanted = material.answers, material.subject, asked.options
    if answers is None or asked.data is None:
        return replace(material, figures=_figures(material, asked))
    try:
        maps = explained(subject, answers, wanted.maps)
    except VitralError as error:
        reason = f"There are no maps: {error}."
        return replace(material, explained=reason, faithfulness=reason, figures=reason)
    scores = scored(
        subject,
        asked.data,
        images_to_score(subject, wanted.score),
        split=answers.split_name,
        workers=wanted.workers,
        on_images=asked.telling("scoring maps"),
    )
    return replace(material, explained=maps, faithfulness=scores, figures=_figures(material, asked))


def _figures(material: Material, asked: Asked) -> Page | str:
    if not asked.options.figures:
        return "They were not asked for."
    try:
        split = material.answers.split if material.answers else None
        how: dict[str, Any] = {"on_images": asked.telling("measuring figures"), "images": _FIGURED}
        return page_of(measure_figures(material.subject.classifier, split, **how))
    except VitralError as error:
        return f"There are no figures: {error}."


def _training_split(subject: Subject, data: DataSource, judged: str) -> Split | None:
    """The images to look for near-duplicates among; None if the judged ones are the training images."""
    if judged in ("train", "all"):
        return None
    try:
        return training_images(subject.classifier, data)
    except VitralError:  # the data has no training images
        return None
