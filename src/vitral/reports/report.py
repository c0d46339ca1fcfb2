"""`vitral.report`: one file that says what a model is, how good it is, and how far to believe it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from vitral.data.image_data import DataSource
from vitral.evaluation.analysis.comparison import compare
from vitral.reports.blocks import Section, Tiles
from vitral.reports.gather import Asked, Progress, ReportOptions, examined, judged, looked_into
from vitral.reports.material import Material
from vitral.reports.page import render
from vitral.reports.pictures import Pictures
from vitral.reports.sections import comparison
from vitral.reports.sections.by_class import by_class_section
from vitral.reports.sections.figures import figures
from vitral.reports.sections.images import data_quality, images
from vitral.reports.sections.inside import faithfulness, inside
from vitral.reports.sections.limits import limits
from vitral.reports.sections.provenance import provenance
from vitral.reports.sections.training import training
from vitral.reports.sections.trust import trust
from vitral.reports.sections.verdict import verdict
from vitral.reports.subject import read_all
from vitral.runtime.errors import VitralError
from vitral.runtime.files import write_atomically
from vitral.runtime.settings import build
from vitral.runtime.version import vitral_version

_TO_SAY_SO = 1000  # bytes


@dataclass(frozen=True)
class Report:
    """A report, made; as a page and as JSON."""

    title: str
    lead: str  # the verdict
    tiles: Tiles | None
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
            **(self.tiles.to_dict() if self.tiles else {}),
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
    model: str | PathLike | Sequence[str | PathLike],
    data: DataSource | None = None,
    *,
    on_progress: Progress = lambda *_: None,
    warn: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Report:
    """Report on a run or a model, judged on labelled images if there are any; of several, compare them.

    Args:
        model: a run's folder, or any checkpoint with labels; or several, which are set beside the first.
        data: as `open_data` takes it; None: only what the runs themselves recorded is told.
        on_progress: told how far each part of the work is.
        warn: told of each damaged image, and of doubts about the split.
        options: fields of `ReportOptions`, such as ``limit=1000``.

    Raises:
        VitralError: if a model, the data or an option cannot be used, or their classes differ.
    """
    asked = Asked(data, build(ReportOptions, options), on_progress, warn)
    sources = [model] if isinstance(model, str | PathLike) else list(model)
    if not sources:
        raise VitralError("name a run or a model to report on")
    subjects = read_all([fspath(source) for source in sources], asked.options.device, asked.options.precision)
    materials = [judged(subject, asked) for subject in subjects]
    if len(materials) > 1:
        return _fitted(_of_several, materials, asked.options)
    return _fitted(_of_one, [looked_into(examined(materials[0], asked), asked)], asked.options)


def _fitted(
    make: Callable[[Sequence[Material]], Report], materials: Sequence[Material], wanted: ReportOptions
) -> Report:
    """Make the report; once more with fewer pictures if it weighs more than it may."""
    most = int(wanted.megabytes * 1e6)
    made, pictures = _made(make, materials, Pictures(most, wanted.pictures))
    excess = len(made.html.encode()) - most
    if excess > 0 and pictures.taken:
        # Saying what is left out takes a little room too.
        room = max(pictures.taken - excess - _TO_SAY_SO, 0)
        made, _ = _made(make, materials, Pictures(room, wanted.pictures))
    return made


def _made(
    make: Callable[[Sequence[Material]], Report], materials: Sequence[Material], pictures: Pictures
) -> tuple[Report, Pictures]:
    return make([replace(material, pictures=pictures) for material in materials]), pictures


def _of_one(materials: Sequence[Material]) -> Report:
    [material] = materials
    lead, tiles = verdict(material)
    makers = (
        training,
        by_class_section,
        trust,
        images,
        data_quality,
        inside,
        faithfulness,
        figures,
        provenance,
    )
    sections = tuple(make(material) for make in makers)
    return Report(material.subject.name, lead, tiles, (*sections, limits(material, sections)))


def _of_several(materials: Sequence[Material]) -> Report:
    first, *rest = materials
    others = [
        (other, compare(first.answers, other.answers))
        for other in rest
        if first.answers is not None and other.answers is not None
    ]
    sections = (
        comparison.side_by_side(materials),
        comparison.differences(first, others),
        comparison.curves(materials),
        comparison.settings(materials),
        comparison.turned(first, others),
    )
    title = " and ".join(material.subject.name for material in materials)
    lead = comparison.verdict_of(first, others) or "No images were given, so nothing was judged anew."
    return Report(title, lead, None, (*sections, limits(first, sections)))
