"""`Subject`: a model that is reported on, with the run that made it if one did."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitral.checkpoints.folder import is_checkpoint, is_model_folder, load_checkpoint
from vitral.inference.classifier import Classifier, as_classifier
from vitral.model.cost import stages
from vitral.model.vit import VisionTransformer
from vitral.recipes.packaged import RUN_FILE
from vitral.runtime.devices import Device, Placement, Precision
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import flat, read_toml
from vitral.training.history import History
from vitral.training.run_folder import RunFolder

_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Subject:
    """A model and what is known of its making."""

    source: str  # as the user named it
    name: str
    classifier: Classifier
    history: History | None  # None: it is no run's folder
    finished: bool
    settings: dict[str, Any] = field(default_factory=dict)  # of the recipe, by dotted names
    machine: dict[str, Any] = field(default_factory=dict)  # that the run began on
    hashes: tuple[tuple[str, str], ...] = ()  # SHA-256 of files
    notes: tuple[str, ...] = ()  # what was mended or not known

    @classmethod
    def read(cls, source: str, device: Device = "auto", precision: Precision = "auto") -> "Subject":
        """Read a run's folder or any checkpoint.

        Raises:
            VitralError: if there is no model in it yet.
        """
        notes: list[str] = []
        run = RunFolder(Path(source), notes.append)
        is_run = run.holds_run
        where = source if not is_run or is_model_folder(source) else str(Path(source, "last"))
        if is_run and not is_model_folder(where):
            raise VitralError(f"{source} holds a run that has no model yet; go on with its training first")
        if where != source:
            notes.append("The run has judged no weights yet; these are its latest ones.")
        checkpoint = load_checkpoint(where)
        record = run.record if is_run else None
        return cls(
            source,
            Path(source).name or Path(source).resolve().name,
            as_classifier(checkpoint, Placement.choose(device, precision)),
            run.history if is_run else None,
            run.finished,
            _settings(Path(source), notes) if is_run else {},
            record.machine if record else {},
            tuple(_hashes(Path(where), Path(source, RUN_FILE))),
            (*notes, *checkpoint.notes),
        )

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.classifier.model.parameters())

    @property
    def flops(self) -> int | None:
        """Of one image; None: the model is not one of ours."""
        model = self.classifier.model
        return sum(stage.flops for stage in stages(model.config)) if _is_ours(model) else None

    @property
    def evaluations(self) -> tuple[dict[str, Any], ...]:
        return self.history.evaluations if self.history else ()

    @property
    def summary(self) -> dict[str, Any]:
        """How the run ended; empty where it has not."""
        return (self.history.summary if self.history else None) or {}

    @property
    def score_key(self) -> str:
        """The task's score in the records of evaluations."""
        return "val_mean_average_precision" if self.classifier.multi_label else "val_top1"


def read_all(sources: Sequence[str], device: Device, precision: Precision) -> list[Subject]:
    """Read several; those whose folders have the same name are called by their paths."""
    subjects = [Subject.read(source, device, precision) for source in sources]
    names = [subject.name for subject in subjects]
    return [
        subject if names.count(subject.name) == 1 else replace(subject, name=subject.source)
        for subject in subjects
    ]


def names_model(text: str) -> bool:
    """Say whether a word names a model or a run rather than data."""
    return is_checkpoint(text) or RunFolder(Path(text)).holds_run


def _is_ours(model: object) -> bool:
    return isinstance(model, VisionTransformer)


def _settings(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return flat(read_toml(folder / RUN_FILE))
    except VitralError as error:
        notes.append(f"The recipe cannot be read: {error}.")
        return {}


def _hashes(model: Path, recipe: Path) -> list[tuple[str, str]]:
    """The digests of the weights, their description and the recipe, as far as they are files here."""
    files = [model] if model.is_file() else sorted(model.glob(f"*{_WEIGHTS}")) if model.is_dir() else []
    files += [file for file in (model / "config.json", recipe) if file.is_file()]
    return [(file.name, _digest(file)) for file in files]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
