"""``vitral.json``: what a model of ours keeps in another layout, beside that library's files.

Which images were held out when it was trained, so that they alone judge it; and for layouts whose files say
neither classes nor preprocessing, those.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitral.checkpoints import validate
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import build

FILE = "vitral.json"
# How it was trained, and what it came from.
_KEPT = ("data", "val_fraction", "seed", "held_out", "columns", "origin", "licence")
_WITHOUT_DESCRIPTION = ("google", "torchvision")  # layouts that name no classes and no preprocessing


@dataclass(frozen=True)
class Sidecar:
    """What a converted model has that its layout has no place for."""

    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the training: which images were held out
    labels: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    multi_label: bool | None = None

    def complete(self, found: Checkpoint) -> Checkpoint:
        """Adds to what was read what its files do not say."""
        fitting = len(self.labels) == found.model.config.num_classes
        return replace(
            found,
            labels=self.labels if self.labels and fitting else found.labels,
            preprocess=self.preprocess or found.preprocess,
            multi_label=found.multi_label if self.multi_label is None else self.multi_label,
            notes=() if self.preprocess else found.notes,
        )


def content(checkpoint: Checkpoint, layout: str, weights_file: str) -> dict[str, Any]:
    """Returns what is written beside `weights_file`."""
    kept: dict[str, Any] = {"weights": weights_file, "multi_label": checkpoint.multi_label}
    kept["metadata"] = {name: checkpoint.metadata[name] for name in _KEPT if name in checkpoint.metadata}
    if layout in _WITHOUT_DESCRIPTION:
        kept |= {"labels": list(checkpoint.labels), "preprocess": checkpoint.preprocess.record()}
    return kept


def read(weights: Path) -> Sidecar:
    """Reads the sidecar of a file of weights, if there is one and it is of that file.

    Raises:
        VitralError: if it is damaged.
    """
    path = weights.parent / FILE
    kept = validate.read_json(path)
    if kept.get("weights") != weights.name:
        return Sidecar()
    try:
        prepared = kept.get("preprocess")
        return Sidecar(
            validate.training(kept.get("metadata", {})),
            validate.labels(kept.get("labels", [])),
            None if prepared is None else validate.preprocess(build(Preprocess, prepared)),
            validate.flag("multi_label", kept.get("multi_label", False)),
        )
    except (TypeError, ValueError, VitralError) as error:
        raise VitralError(f"{path} cannot be used: {error}") from error
