"""`draw_figures`: the papers' figures of one model, or of two side by side, as files and one page."""

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitral.checkpoints.folder import is_checkpoint
from vitral.data.batches import DamageCount
from vitral.data.split import Split
from vitral.explain.figures import measure
from vitral.explain.figures.drawing import Drawing, NotDrawn, Reach, in_words, shared_reach
from vitral.explain.figures.house import need_matplotlib
from vitral.explain.figures.page import Entry, Page, Shot, facts_of
from vitral.explain.figures.paint import painted
from vitral.explain.figures.sample import Data, draw_sample
from vitral.explain.figures.similarity import ModelSimilarity
from vitral.inference.classifier import Classifier, loaded
from vitral.runtime.errors import VitralError
from vitral.runtime.files import new_folder, refuse_filled, write_atomically
from vitral.runtime.ranges import Count, Seed, Whole
from vitral.runtime.settings import build

PAGE = "index.html"
_MODELS = 2
# What cannot be drawn without images.
_OF_IMAGES = "Attention distance, entropy and prefix mass, rollout, token norms, feature colours, CKA"


@dataclass(frozen=True)
class FigureOptions:
    """What the figures are made of."""

    images: Count = 128  # measured; the paper's, for attention distance
    shown: Count = 6  # of them, in rollout and feature colours
    renormalise: bool = False  # attention distance over patches alone; the authors' code does not
    max_damaged: Whole = 0.01  # share of unreadable images past which to give up
    seed: Seed = 0  # of the choice of images


@dataclass(frozen=True)
class Figures:
    """Everything that was measured, to be drawn."""

    names: tuple[str, ...]  # of the models
    facts: tuple[tuple[tuple[str, str], ...], ...]  # of each: name and value
    source: str  # what images they are of; "" without any
    count: int  # images that were measured
    by_model: tuple[tuple[Drawing | NotDrawn, ...], ...]
    across: tuple[Drawing, ...] = ()  # of both models at once
    reasons: tuple[NotDrawn, ...] = field(default=())  # that hold for all models

    def kinds(self) -> Iterator[dict[str, Drawing]]:
        """Gives each figure, by the names of the models that have it, in the order of the page."""
        kinds: dict[str, dict[str, Drawing]] = {}
        for name, of_model in zip(self.names, self.by_model, strict=True):
            for one in of_model:
                if isinstance(one, Drawing):
                    kinds.setdefault(one.name, {})[name] = one
        yield from kinds.values()

    def not_drawn(self) -> list[tuple[str, str]]:
        """Gives what is missing, and why, each once."""
        several = len(self.names) > 1
        own = [
            (f"{one.title} ({name})" if several else one.title, one.reason)
            for name, of_model in zip(self.names, self.by_model, strict=True)
            for one in of_model
            if isinstance(one, NotDrawn)
        ]
        return [*own, *((one.title, one.reason) for one in self.reasons)]


Model = Classifier | str | os.PathLike


def measure_figures(
    models: Model | Sequence[Model],
    data: Data | None = None,
    *,
    names: Sequence[str] | None = None,
    on_images: Callable[[int, int], None] = lambda *_: None,
    warn: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Figures:
    """Measures all that the figures show, and draws nothing.

    Args:
        models: one, or two to be set side by side.
        data: the images, as `sample.draw_sample` takes them; None: only what needs none.
        names: of the models, such as the folders that classifiers were read from; None: their own.
        on_images: told how many images are done, of how many, of all models together.
        warn: told of damaged images, and what was passed over.
        options: fields of `FigureOptions`.

    Raises:
        VitralError: if a model, the data or an option cannot be used.
    """
    wanted = build(FigureOptions, options)
    classifiers = [loaded(model) for model in _listed(models)]
    for classifier in classifiers:
        classifier.refuse_others("figures")
        classifier.refuse_merged("figures")
    short = _names(names or _listed(models))
    facts = tuple(facts_of(classifier) for classifier in classifiers)
    of_weights = [tuple(measure.of_weights(classifier.model)) for classifier in classifiers]
    if data is None:
        reason = NotDrawn(_OF_IMAGES, "they need images: name a folder of some")
        return Figures(short, facts, "", 0, tuple(of_weights), reasons=(reason,))
    source, split = draw_sample(data, wanted.images, wanted.seed, warn)
    measured = _measured(classifiers, split, wanted, on_images, warn)
    pictured = [measure.of_pictures(classifier, split, wanted.shown) for classifier in classifiers]
    by_model = tuple(
        (*weights, *found.drawings, *pictures)
        for weights, found, pictures in zip(of_weights, measured, pictured, strict=True)
    )
    across, reasons = _across(measured)
    return Figures(short, facts, source, len(measured[0].rows), by_model, across, reasons)


def _measured(
    classifiers: Sequence[Classifier],
    split: Split,
    wanted: FigureOptions,
    on_images: Callable[[int, int], None],
    warn: Callable[[str], None],
) -> list[measure.Measured]:
    # The same batches for all, or layers of two models could not be compared.
    batch_size = min(measure.batch_size_for(classifier.model) for classifier in classifiers)
    total = len(split) * len(classifiers)
    measured = []
    for place, classifier in enumerate(classifiers):
        found = measure.of_images(
            classifier,
            split,
            batch_size,
            DamageCount(len(split), wanted.max_damaged, warn if place == 0 else lambda _: None),
            lambda done, of, place=place: on_images(place * of + done, total),
            renormalise=wanted.renormalise,
        )
        if not found.rows:
            raise VitralError(
                f"not one of the {len(split):,} images could be read, for example {split.names[0]}"
            )
        measured.append(found)
    return measured


def _across(measured: Sequence[measure.Measured]) -> tuple[tuple[Drawing, ...], tuple[NotDrawn, ...]]:
    if len(measured) < _MODELS:
        return (), ()
    one, other = measured
    if one.rows != other.rows:
        return (), (NotDrawn(ModelSimilarity.title, "the models could not read the same images"),)
    if not one.similarity.grams_LB:
        return (), (NotDrawn(ModelSimilarity.title, "it needs a batch of four images or more"),)
    return (ModelSimilarity.of(one.similarity, other.similarity),), ()


def draw_figures(
    models: Model | Sequence[Model], folder: str | os.PathLike, data: Data | None = None, **options: Any
) -> Figures:
    """Measures the papers' figures, and draws them into a new folder, as `save_figures` does.

    Args:
        models: one, or two to be set side by side, on shared scales.
        folder: which must not be there yet, or be empty.
        data: the images; see `measure_figures`.
        options: those of `measure_figures`; and `on_drawn`, told how many figures are drawn, of how many.

    Raises:
        VitralError: if a model, the data, an option or the folder cannot be used.
    """
    on_drawn = options.pop("on_drawn", lambda *_: None)
    target = Path(folder)
    refuse_undrawable(target)
    figures = measure_figures(models, data, **options)
    save_figures(figures, target, on_drawn)
    return figures


def save_figures(figures: Figures, folder: Path, on_drawn: Callable[[int, int], None]) -> None:
    """Draws PNG and CSV of each figure and a page that explains them into a new folder.

    The folder appears when all of it is there: whoever stops before leaves nothing behind.

    Raises:
        VitralError: if the folder cannot be used, or a package is missing.
    """
    refuse_undrawable(folder)
    try:
        with new_folder(folder) as staging:
            _write(page_of(figures, on_drawn), staging)
    except OSError as error:
        raise VitralError(f"{folder} cannot be written: {error.strerror}") from error


def refuse_undrawable(folder: Path) -> None:
    """Raises VitralError if a package is missing, or no folder can be made there, or it is not empty."""
    need_matplotlib()
    refuse_filled(folder)


def _write(page: Page, folder: Path) -> None:
    for entry in page.entries:
        for shot in entry.shots:
            (folder / shot.file).parent.mkdir(exist_ok=True)
            write_atomically(folder / f"{shot.file}.png", shot.painted.png)
            # Names that are no text go back to the bytes that they are.
            write_atomically(folder / f"{shot.file}.csv", shot.table.encode(errors="surrogateescape"))
    write_atomically(folder / PAGE, page.html().encode(errors="replace"))


def page_of(figures: Figures, on_drawn: Callable[[int, int], None] = lambda *_: None) -> Page:
    """Draws everything, for light and dark pages; models side by side share their scales.

    Args:
        figures: what was measured.
        on_drawn: told how many figures are drawn, of how many, those of each model counted.
    """
    kinds, entries, done = list(figures.kinds()), [], 0
    total = sum(map(len, kinds)) + len(figures.across)
    for by_model in kinds:
        reach, shots = shared_reach(by_model.values()), []
        for name, drawing in by_model.items():
            file = f"{name}/{drawing.name}" if len(figures.names) > 1 else drawing.name
            shots.append(_shot(drawing, reach, name, file))
            on_drawn(done := done + 1, total)
        entries.append(Entry.of(next(iter(by_model.values())), shots))
    for drawing in figures.across:
        entries.append(
            Entry.of(drawing, [_shot(drawing, drawing.reach(), in_words(figures.names), drawing.name)])
        )
        on_drawn(done := done + 1, total)
    return Page(
        figures.names, figures.facts, figures.source, figures.count, tuple(entries), figures.not_drawn()
    )


def _shot(drawing: Drawing, reach: Reach, model: str, file: str) -> Shot:
    return Shot(model, file, drawing.finding(), painted(drawing, reach), table(drawing))


def table(drawing: Drawing) -> str:
    """Writes the numbers of a figure as CSV, floats with six digits."""
    content = io.StringIO()
    writer: csv.DictWriter | None = None
    for row in drawing.rows():
        if writer is None:
            writer = csv.DictWriter(content, row, lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return content.getvalue()


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if hasattr(value, "is_integer") and not isinstance(value, int) else value


def split_words(words: Sequence[str]) -> tuple[list[str], str | list[str] | None]:
    """Tells models from data among the words of a command: `MODEL [MODEL] [DATA]`.

    A checkpoint after the first is the second model; what follows is data: one word as it is, several as
    pictures.

    Raises:
        VitralError: if there are more than two models.
    """
    models = [words[0], *(word for word in words[1:] if is_checkpoint(word))]
    data = [word for word in words[1:] if not is_checkpoint(word)]
    if len(models) > _MODELS:
        raise VitralError(f"figures set two models side by side, not {len(models)}: {in_words(models)}")
    return models, (data[0] if len(data) == 1 else data or None)


def _listed(models: Model | Sequence[Model]) -> list[Model]:
    listed = [models] if isinstance(models, Classifier | str | os.PathLike) else list(models)
    if not 1 <= len(listed) <= _MODELS:
        raise VitralError(f"figures are of one model or of two side by side, not of {len(listed)}")
    return listed


def _names(models: Iterable[Model]) -> tuple[str, ...]:
    """Short names, each another, that can be folders."""
    names: list[str] = []
    for place, model in enumerate(models):
        word = (
            f"model {place + 1}"
            if isinstance(model, Classifier)
            else os.path.basename(os.path.abspath(model))
        )
        word = re.sub(r"[^\w .-]", "-", word).strip(". ") or f"model {place + 1}"
        names.append(f"{word} ({place + 1})" if word in names else word)
    return tuple(names)
