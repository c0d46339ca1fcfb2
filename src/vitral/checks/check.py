"""`vitral.check`: what is wrong with a data set, before a model is trained on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitral.checks.cleaned import Written, refuse_to_write, write_cleaned
from vitral.checks.copies import LEAST_COSINE, copy_kinds, find_copies
from vitral.checks.findings import Kind, Subject
from vitral.checks.labels import LabelSearch, label_kinds, search_labels
from vitral.checks.leaving import left_out
from vitral.checks.look import look_at
from vitral.checks.stored import class_kinds, stored_kinds
from vitral.data.batches import DamageCount
from vitral.data.columns import FOUND, Columns
from vitral.data.image_data import DataSource, open_data
from vitral.data.workers import Loading, worker_count
from vitral.evaluation.analysis.nearest import Cells
from vitral.evaluation.mistakes import refuse_unwritable
from vitral.evaluation.probing.usual import usual_features
from vitral.inference.classifier import Classifier, loaded
from vitral.inference.features import extract
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.files import cache_folder
from vitral.runtime.ranges import Seed, Workers
from vitral.runtime.settings import build
from vitral.runtime.settings import check as check_settings

# Told how far some work is: what, done, total.
Progress = Callable[[str, int, int], None]

_NO_MODEL = "name a model whose features tell the classes apart, such as hf://facebook/dinov2-small"
_NEIGHBOURS = 3  # that a model's features propose for each image
# Of the images. Drawings and textures look alike by nature: much that is proposed is meant to be there.
_LARGE_PART = 0.2


@dataclass(frozen=True)
class CheckOptions:
    """How a data set is checked."""

    seed: Seed = 0  # of the folds that label errors are looked for on
    workers: Workers | None = None  # processes that read images; None: as many as suit the machine
    cache: Path | None = None  # folder of features; None: that of `cache_folder`

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Check:
    """What was found in a data set."""

    subject: Subject = field(repr=False)
    kinds: tuple[Kind, ...]
    model: str  # whose features were used; "": none
    groups: np.ndarray = field(repr=False)  # (n,) the same number for images of the same picture
    labels: LabelSearch | None = field(repr=False)  # None: there was no model, or too few images
    left_out: dict[int, str] = field(repr=False)  # rows that a model is better trained without, and why
    written: Written | None  # the file of the images that stay, if one was asked for
    not_written: str  # why it could not be, in the end; what was found is whole all the same
    seconds: dict[str, float]  # that each part of the work took

    @property
    def problems(self) -> tuple[Kind, ...]:
        """Give the kinds that were found, but for those that are only good to know."""
        return tuple(kind for kind in self.kinds if kind.findings and kind.level != "note")

    @property
    def advice(self) -> str:
        """Say how many images a model may be better trained without, and whether to look first."""
        count, total = len(self.left_out), len(self.subject)
        said = f"A model may be better trained without {count:,} of them"
        return f"{said}: a large part, so look at them first" if count > _LARGE_PART * total else said

    def kind(self, key: str) -> Kind:
        """Give the findings of one kind."""
        return next(kind for kind in self.kinds if kind.key == key)

    def to_dict(self) -> dict[str, Any]:
        """Give all of it, for JSON."""
        data = self.subject.data
        return {
            "data": data.source,
            "images": len(self.subject),
            "splits": {name: len(split) for name, split in data.splits.items()},
            "classes": list(data.classes),
            "notes": list(self.subject.notes),
            "model": self.model or None,
            "problems": len(self.problems),
            "kinds": [kind.to_dict(self.subject) for kind in self.kinds],
            "left_out": {self.subject.split.names[row]: why for row, why in self.left_out.items()},
            "seconds": self.seconds,
        }


def check(
    data: DataSource,
    model: str | PathLike | Classifier | None = None,
    *,
    write: str | PathLike | None = None,
    columns: Columns = FOUND,
    warn: Callable[[str], None] = lambda _: None,
    on_progress: Progress = lambda *_: None,
    **options: Any,
) -> Check:
    """Look for what is wrong with labelled images: files, copies, leaks between splits, labels.

    Args:
        data: as `open_data` takes it; nothing is held out.
        model: any model, or where it lies, whose features are good on such images; its head plays no part.
            None: likely label errors are not looked for, and copies by their pixels alone.
        write: a file of the images to train on, without those in `Check.left_out`: a table that names them
            (.csv), or the images themselves (.parquet). If it fails in the end, `Check.not_written` says why.
        columns: of a table, as `open_data` takes them.
        warn: told of what was passed over in the data, and when worker processes fail.
        on_progress: told how far each part of the work is.
        options: fields of `CheckOptions`, such as ``seed=1``.

    Raises:
        VitralError: if the data, the model or an option cannot be used, or there is no place for the file.
    """
    wanted = build(CheckOptions, options)
    classifier = None if model is None else loaded(model)
    if classifier is not None:
        classifier.refuse_others("features")
    subject = Subject.of_data(open_data(data, val_fraction=0, columns=columns))
    for note in subject.notes:
        warn(note)
    if write is not None:
        refuse_unwritable(Path(write), limits.CLEANED_SUFFIXES)
        refuse_to_write(Path(write), subject)
    asked = _Asked(subject, classifier, wanted, _Watch(on_progress), warn)
    return asked.examined(_name(model), None if write is None else Path(write))


def _name(model: str | PathLike | Classifier | None) -> str:
    if model is None:
        return ""
    return (
        str(model.metadata.get("source") or "the model") if isinstance(model, Classifier) else fspath(model)
    )


@dataclass(frozen=True)
class _Asked:
    """What is to be checked, and how."""

    subject: Subject
    classifier: Classifier | None
    wanted: CheckOptions
    watch: "_Watch"
    warn: Callable[[str], None]

    def examined(self, model: str, write: Path | None) -> Check:
        """Look at all images, and judge what was seen."""
        subject, telling = self.subject, self.watch.telling
        how: dict[str, Any] = {"workers": self.wanted.workers, "warn": self.warn}
        looks = look_at(subject.split, on_images=telling("looking"), **how)
        features = self._features(np.flatnonzero(looks.sound))
        also = None if features is None else features.alike
        copies = find_copies(subject, looks, also, on_pairs=telling("comparing"))
        labels: LabelSearch | str = _NO_MODEL
        if features is not None:
            how = {"seed": self.wanted.seed, "on_folds": telling("probing")}
            labels = search_labels(features.vectors_ND, features.rows, subject, copies.groups, **how)
        kinds = (
            *stored_kinds(subject, looks),
            *copy_kinds(subject, copies),
            *label_kinds(labels, model),
            *class_kinds(subject),
        )
        found = labels if isinstance(labels, LabelSearch) else None
        left = left_out(subject, kinds, copies, found)
        written, why_not = self._written(write, left, copies.groups)
        return Check(
            subject, kinds, model, copies.groups, found, left, written, why_not, self.watch.seconds()
        )

    def _written(
        self, file: Path | None, left: dict[int, str], groups: np.ndarray
    ) -> tuple[Written | None, str]:
        """What was written, or why it could not be."""
        if file is None:
            return None, ""
        try:
            return write_cleaned(file, self.subject, left, groups, self.watch.telling("writing")), ""
        except VitralError as error:
            return None, str(error)

    def _features(self, sound: np.ndarray) -> "_Features | None":
        """The vectors that the field probes, of the images that can be read."""
        if self.classifier is None or not len(sound):
            return None
        found = extract(
            self.classifier,
            self.subject.split.take(sound),
            (-1,),
            cache_folder("features", self.wanted.cache),
            damage=DamageCount(len(sound), 1.0, self.warn),
            on_images=self.watch.telling("features"),
            loading=Loading(worker_count(self.wanted.workers), self.warn),
        )
        kind, _ = usual_features(self.classifier.model, (-1,))
        return _Features(found.of(-1, kind), sound[found.rows])


class _Watch:
    """How long each part of the work takes, by when it is told of."""

    def __init__(self, on_progress: Progress) -> None:
        self._on_progress, self._begun = on_progress, time.monotonic()
        self._ends: dict[str, float] = {}

    def telling(self, what: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            self._ends[what] = time.monotonic()
            self._on_progress(what, done, total)

        return tell

    def seconds(self) -> dict[str, float]:
        """Give the seconds of each part, in their order, and of all."""
        begun, parts = self._begun, {}
        for what, end in self._ends.items():
            parts[what], begun = round(end - begun, 1), end
        return {**parts, "all": round(time.monotonic() - self._begun, 1)}


@dataclass(frozen=True)
class _Features:
    """A model's vectors of some of the images."""

    vectors_ND: Tensor
    rows: np.ndarray  # (N,) of the images

    def alike(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Propose pairs of some images that the model holds alike, (P,), (P,) places in `rows`."""
        known = np.flatnonzero(np.isin(rows, self.rows))
        vectors_KD = self.vectors_ND[np.searchsorted(self.rows, rows[known])]
        unit_KD = F.normalize(vectors_KD - vectors_KD.mean(0), dim=1)
        if len(known) < 2:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        cosines_KN, others_KN = Cells(unit_KD).nearest(unit_KD, _NEIGHBOURS, but_itself=True)
        places, slots = torch.nonzero(cosines_KN >= LEAST_COSINE, as_tuple=True)
        numbers = torch.from_numpy(known)
        return numbers[places], numbers[others_KN[places, slots]]
