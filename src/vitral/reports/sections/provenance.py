"""What the model is, where it comes from, and what made it."""

import json
import shlex
from typing import Any

from vitral.evaluation.task import task_of
from vitral.model.vit import VisionTransformer
from vitral.reports.blocks import Block, Column, Facts, Prose, Section, Table
from vitral.reports.material import Material
from vitral.reports.subject import Subject

_MACHINE = {
    "date": "begun (UTC)", "cpu": "processor", "cores": "cores", "threads": "threads", "gpu": "GPU",
    "computes on": "computed on", "system": "system", "python": "Python", "torch": "PyTorch",
    "vitral": "Vitral",
}  # fmt: skip


def provenance(material: Material) -> Section:
    """Tell the model, the weights' origin and licence, the machine, the hashes and the recipe."""
    subject = material.subject
    blocks: list[Block] = [
        Facts("Model", tuple(_model(subject))),
        Facts("Weights and data", tuple(_origin(material))),
    ]
    if subject.machine:
        rows = tuple(
            (name, str(subject.machine[key])) for key, name in _MACHINE.items() if subject.machine.get(key)
        )
        blocks.append(Facts("Machine of the training", rows))
    elif subject.history is not None:
        blocks.append(Prose("The run did not record its machine; runs since version 0.1 do.", "missing"))
    if subject.settings:
        blocks.append(Facts("Run again", (("command", _command(subject)),), code=True))
        settings = tuple(
            (name, json.dumps(value, ensure_ascii=False)) for name, value in subject.settings.items()
        )
        blocks.append(Facts(f"All {len(settings)} settings of the recipe", settings, code=True, folded=True))
    else:
        blocks.append(
            Prose("This is a model, not a run's folder: it has no recipe and no curves.", "missing")
        )
    if subject.hashes:
        blocks.append(Table("Files", (Column("file"), Column("SHA-256")), subject.hashes, folded=True))
    blocks += [Prose(note, "warning") for note in subject.notes]
    return Section("provenance", "Recipe and provenance", "", tuple(blocks))


def _model(subject: Subject) -> list[tuple[str, str]]:
    classifier, settings = subject.classifier, subject.settings
    rows = [("folder", subject.source)]
    if "model" in settings:
        rows.append(("begun from", str(settings["model"])))
    model = classifier.model
    if isinstance(model, VisionTransformer):
        config = model.config
        height, width = classifier.preprocess.img_size
        grid = f"{height // config.patch_size} by {width // config.patch_size}"
        rows += [
            ("encoder", f"{config.num_layers} layers, {config.num_heads} heads, width {config.embed_dim}"),
            ("images", f"{height} by {width} pixels, in {grid} patches of {config.patch_size}"),
            ("positions, pooling", f"{config.position}, {config.pooling}"),
        ]
    cost = f", {subject.flops / 1e9:.3g} GFLOPs an image" if subject.flops else ""
    return [
        *rows,
        ("parameters", f"{subject.parameters:,}{cost}"),
        ("preprocessing", str(classifier.preprocess)),
        ("labels", f"{len(classifier.labels):,}"),
        ("probabilities", task_of(classifier).probabilities(classifier.temperature)),
    ]


def _origin(material: Material) -> list[tuple[str, str]]:
    metadata: dict[str, Any] = material.subject.classifier.metadata
    began = metadata.get("source")
    licence = metadata.get("licence") or (
        "not stated" if began else "of this run's owner: trained from scratch"
    )
    rows = [("weights begun from", began or "scratch" if material.subject.history else began or "not stated")]
    rows.append(
        ("licence of the weights", str(licence) if material.subject.history or began else "not stated")
    )
    if metadata.get("data"):
        rows.append(("trained on", str(metadata["data"])))
    if material.answers is not None:
        answers = material.answers
        rows.append(("judged on", f"{material.data}, split {answers.split_name}, {len(answers):,} images"))
        rows.append(("judged with", str(material.subject.classifier.placement)))
    return rows


def _command(subject: Subject) -> str:
    data = str(subject.classifier.metadata.get("data") or "DATA")
    return shlex.join(
        ["vitral", "train", data, "--out", "NEW_DIR", "--recipe", f"{subject.source}/recipe.toml"]
    )
