"""``vitral.json``: what a model of ours keeps in another layout, beside that library's files.

Which images were held out when it was trained, so that they alone judge it; and for layouts whose files say
neither classes nor preprocessing, those.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitral.checkpoints import fields
from vitral.checkpoints.layouts.layout import Checkpoint, Record
from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import build

FILE = "vitral.json"
# How it was trained, and what it came from.
_KEPT = ("data", "val_fraction", "seed", "held_out", "origin", "licence")
_WITHOUT_DESCRIPTION = ("google", "torchvision")  # layouts that name no classes and no preprocessing


def content(checkpoint: Checkpoint, layout: str, weights_file: str) -> dict[str, Any]:
    """What is written beside `weights_file`."""
    kept: dict[str, Any] = {"weights": weights_file, "multi_label": checkpoint.multi_label}
    kept["metadata"] = {name: checkpoint.metadata[name] for name in _KEPT if name in checkpoint.metadata}
    if layout in _WITHOUT_DESCRIPTION:
        kept |= {"labels": list(checkpoint.labels), "preprocess": asdict(checkpoint.preprocess)}
    return kept


def read(weights: Path) -> Record:
    """The record beside a file of weights, if there is one and it is of that file.

    Raises:
        VitralError: if it is damaged.
    """
    path = weights.parent / FILE
    kept = fields.read_json(path)
    if kept.get("weights") != weights.name:
        return Record()
    try:
        prepared = kept.get("preprocess")
        return Record(
            fields.training(kept.get("metadata", {})),
            fields.labels(kept.get("labels", [])),
            None if prepared is None else fields.preprocess(build(Preprocess, prepared)),
            fields.flag("multi_label", kept.get("multi_label", False)),
        )
    except (TypeError, ValueError, VitralError) as error:
        raise VitralError(f"{path} cannot be used: {error}") from error
