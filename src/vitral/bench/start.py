"""Cold start: how long a fresh process takes from its launch to its first prediction, and how much memory."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitral.bench import programs
from vitral.bench.report import Report, Row, describe_machine, with_ratios
from vitral.bench.rounds import Settings, interleaved
from vitral.bench.workload import Workload
from vitral.checkpoints import peers
from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.runtime.errors import VitralError

_PYTHON = [sys.executable]
_PIXELS = (375, 500)  # of the photograph, (height, width); ImageNet's commonest size
_FIRST, _START = "first prediction", "start alone"


@dataclass
class _Process:
    """A contender's command, and what its runs gave."""

    row: Row
    command: list[str]
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.row.contender}, {self.row.configuration}"

    def run(self) -> None:
        """Run it once; raise VitralError with the last line of what it said if it fails."""
        # Nothing is fetched: the hub's clients would ask whether there is something newer.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(self.command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise VitralError(last[:200])
        if self.row.task == _FIRST:
            self.answers.append(json.loads(done.stdout.splitlines()[-1]))

    def measured(
        self, seconds: tuple[float, ...], reference: list[dict[str, Any]], labels: tuple[str, ...]
    ) -> Row:
        """Give the row with numbers; agreement is with the answer of the contender `reference`."""
        row = replace(self.row, seconds=seconds)
        if not self.answers:
            return row
        kept = self.answers[-len(seconds) :]
        parts = {part: statistics.median(answer[part] for answer in kept) for part in ("load", "predict")}
        ours, theirs = reference[-1], kept[-1]
        agreement = {
            "probability": abs(theirs["probability"] - ours["probability"]) / ours["probability"],
            "top1": float(_index(theirs["label"], labels) == _index(ours["label"], labels)),
        }
        peak = max((answer["peak_bytes"] for answer in kept if "peak_bytes" in answer), default=None)
        return replace(row, parts=parts, agreement=agreement, peak_bytes=peak)


def _index(label: str | int, labels: tuple[str, ...]) -> int:
    if isinstance(label, int):
        return label
    return labels.index(label) if label in labels else -1


def start(workload: Workload, settings: Settings) -> Report:
    """Measure the first prediction of one photograph, a fresh process each; files are in the system's cache.

    All compute in float32. Beside it stands what `vitral --help` takes, and the import of torch, of which
    every prediction consists in part.

    Raises:
        VitralError: if Vitral itself cannot predict.
    """
    machine = describe_machine(settings.placement, settings.command)
    rows: list[Row] = []
    runnable: dict[str, _Process] = {}
    with tempfile.TemporaryDirectory(prefix="vitral-bench-") as folder:
        for process in _processes(workload, Path(folder), settings, rows):
            settings.say(f"{process.row.task}: {process.name}")
            try:
                process.run()
                runnable[process.name] = process
            except VitralError as error:
                if process.row.contender == "vitral":  # what the others are compared with
                    raise
                rows.append(replace(process.row, reason=str(error)))
        settings.say(f"{settings.rounds} rounds of {len(runnable)} processes")
        calls = {name: process.run for name, process in runnable.items()}
        seconds = interleaved(calls, settings.rounds, warm_up=False)
    reference = next(iter(runnable.values())).answers
    labels = workload.checkpoint.labels
    measured = [runnable[name].measured(readings, reference, labels) for name, readings in seconds.items()]
    first = with_ratios([row for row in measured if row.task == _FIRST])
    alone = [row for row in measured if row.task != _FIRST]
    title = f"{workload.name}, a JPEG of {_PIXELS[0]}x{_PIXELS[1]}"
    placement = f"{settings.placement.device.type}, float32"
    return Report("start", title, placement, (*first, *alone, *rows), machine)


def _processes(workload: Workload, folder: Path, settings: Settings, absent: list[Row]) -> Iterator[_Process]:
    """Every contender's, Vitral's first; a row without numbers goes to `absent`."""
    photo = folder / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (*_PIXELS, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    checkpoint, device = workload.checkpoint, settings.placement.device.type
    save_checkpoint(folder / "vitral", checkpoint)
    yield _first_prediction("vitral", programs.OURS, folder, checkpoint, device)
    yield _Process(Row(_START, "vitral", "--help"), [*_PYTHON, "-m", "vitral", "--help"])
    yield _Process(Row(_START, "torch", "import"), [*_PYTHON, "-c", "import torch"])
    for library, theirs in programs.THEIRS.items():
        if settings.peers and library not in settings.peers:
            continue
        try:
            if not peers.is_installed(library):
                raise VitralError("not installed")
            convert(str(folder / "vitral"), folder / library, library)
        except VitralError as error:
            absent.append(Row(_FIRST, library, reason=str(error)))
            continue
        for program in theirs:
            yield _first_prediction(library, program, folder, checkpoint, device)


def _first_prediction(
    library: str, program: programs.Program, folder: Path, checkpoint: Checkpoint, device: str
) -> _Process:
    row = Row(_FIRST, library, program.configuration, program.detail)
    code = programs.TEMPLATE.format(imports=program.imports, load=program.load, predict=program.predict)
    preprocess = json.dumps(checkpoint.preprocess.record())
    given = [str(folder / library), str(folder / "photo.jpg"), device, preprocess]
    return _Process(row, [*_PYTHON, "-c", code, *given])
