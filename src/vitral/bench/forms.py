"""The forms of an artifact beside each other: the same pixels through each engine that runs here."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vitral.artifacts.engine import Answers
from vitral.artifacts.manifest import RUN_HERE, Manifest, located, read_manifest
from vitral.artifacts.open import open_artifact
from vitral.artifacts.predictor import Predictor
from vitral.bench.report import Report, Row, describe_machine
from vitral.bench.rounds import Settings, interleaved
from vitral.runtime.errors import VitralError


def infer_forms(path: str, batch_sizes: Sequence[int], settings: Settings) -> Report:
    """Measure the forms of an artifact, a task a batch size; `agreement` is with the first form.

    From pixels to probabilities: normalization is in the graph. A .pt2 file is left out, for to open it is
    a matter of trust.

    Raises:
        VitralError: if the artifact cannot be opened, or answers otherwise than at export.
    """
    folder, file = located(Path(path))
    manifest = read_manifest(folder)
    opened, rows = _opened(folder, manifest, file)
    machine = describe_machine(settings.placement, settings.command)
    for batch in batch_sizes:
        rows += _measured(opened, manifest, batch, settings)
    height, width = manifest.about.preprocess.img_size
    return Report(
        "infer", f"{path} at {height}x{width} pixels", "its engines, on the CPU", tuple(rows), machine
    )


def _opened(folder: Path, manifest: Manifest, file: str | None) -> tuple[dict[str, Predictor], list[Row]]:
    """Each form that runs here, and a row with the reason for each that does not."""
    opened, absent = {}, []
    for form in [manifest.form(file)] if file else manifest.forms:
        try:
            opened[form.kind] = open_artifact(folder, form=form.kind)
        except VitralError as error:
            if form.kind in RUN_HERE and form.kind != "pt2":
                raise
            untrusted = "to open it is a matter of trust, which a benchmark does not take"
            absent.append(Row("", form.kind, reason=untrusted if form.kind == "pt2" else str(error)))
    if not opened:
        raise VitralError(f"no form of {folder} can be measured: {absent[0].reason}")
    return opened, absent


def _measured(opened: dict[str, Predictor], manifest: Manifest, batch: int, settings: Settings) -> list[Row]:
    task = f"a batch of {batch}" if batch > 1 else "one image"
    shape = (batch, *manifest.about.preprocess.img_size, 3)
    pixels_BHWC = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    calls = {kind: partial(predictor.answers, pixels_BHWC) for kind, predictor in opened.items()}
    answers = {kind: call() for kind, call in calls.items()}
    first = next(iter(answers.values()))
    settings.say(f"{task}: {settings.rounds} rounds of {len(calls)} forms")
    seconds = interleaved(calls, settings.rounds)
    return [
        Row(
            task, kind, opened[kind].engine.name, seconds=seconds[kind], images=batch,
            agreement=_agreement(answers[kind], first),
        )
        for kind in calls
    ]  # fmt: skip


def _agreement(found: Answers, wanted: Answers) -> dict[str, float]:
    difference = np.abs(found.logits - wanted.logits).max() / np.abs(wanted.logits).max()
    same = found.logits.argmax(1) == wanted.logits.argmax(1)
    return {"logits": float(difference), "top1": float(same.mean())}
