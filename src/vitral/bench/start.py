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

from vitral import peers
from vitral.bench import Report, Row, Settings, describe_machine, interleaved
from vitral.bench.models import with_ratios
from vitral.bench.subject import Subject
from vitral.checkpoints import save_checkpoint
from vitral.checkpoints.convert import convert
from vitral.errors import VitralError
from vitral.peers import Program

_OURS = Program(
    "library",
    "vitral.load(folder).predict(photo)",
    "import vitral",
    "classifier = vitral.load(folder, device=device, precision='float32')",
    "label, probability = classifier.predict(photo)[0].top[0]",
)
_TEMPLATE = """import json, sys, time
folder, photo, device = sys.argv[1:]
began_at = time.perf_counter()
{imports}
imported_at = time.perf_counter()
{load}
loaded_at = time.perf_counter()
{predict}
ended_at = time.perf_counter()
parts = {{"import": imported_at - began_at, "load": loaded_at - imported_at, "predict": ended_at - loaded_at}}
print(json.dumps({{"label": label, "probability": probability, "parts": parts}}))
"""
_PIXELS = (375, 500)  # of the photograph, (height, width); ImageNet's commonest size


_FIRST, _START = "first prediction", "start alone"


@dataclass
class _Process:
    """A contender's command, and what its runs gave."""

    row: Row
    command: list[str]
    answers: list[dict[str, Any]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)  # bytes

    @property
    def name(self) -> str:
        return f"{self.row.contender}, {self.row.configuration}"

    def run(self) -> None:
        """Raises VitralError with the last line of what it said if it fails."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            # Nothing is fetched: the hub's clients would ask whether there is something newer.
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(self.command, stdout=out, stderr=err, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        printed, said = texts
        if process.returncode:
            last = (said.strip() or f"exit status {process.returncode}").splitlines()[-1]
            raise VitralError(last[:200])
        # In bytes on macOS, in KiB elsewhere (getrusage(2)).
        self.peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        if self.row.task == _FIRST:
            self.answers.append(json.loads(printed.splitlines()[-1]))

    def measured(
        self, seconds: tuple[float, ...], reference: list[dict[str, Any]], labels: tuple[str, ...]
    ) -> Row:
        """The row with numbers; agreement is with the answer of the contender `reference`."""
        row = replace(self.row, seconds=seconds, peak_bytes=max(self.peaks))
        if not self.answers:
            return row
        parts = {
            part: statistics.median(answer["parts"][part] for answer in self.answers[-len(seconds) :])
            for part in ("import", "load", "predict")
        }
        ours, theirs = reference[-1], self.answers[-1]
        agreement = {
            "top1": float(_index(theirs["label"], labels) == _index(ours["label"], labels)),
            "probability": abs(theirs["probability"] - ours["probability"]) / ours["probability"],
        }
        return replace(row, parts=parts, agreement=agreement)


def _index(label: str | int, labels: tuple[str, ...]) -> int:
    return labels.index(label) if isinstance(label, str) else label


def start(subject: Subject, settings: Settings) -> Report:
    """The first prediction of one photograph, a fresh process each; files are in the system's cache.

    All compute in float32. Beside it stands what `vitral --help` takes, and the import of torch, of which
    every prediction consists in part.

    Raises:
        VitralError: if the system does not tell a process's memory.
    """
    if not hasattr(os, "wait4"):
        raise VitralError("bench start needs Linux or macOS, which tell the memory that a process used")
    machine = describe_machine(settings.placement, settings.command)
    rows: list[Row] = []
    runnable: dict[str, _Process] = {}
    with tempfile.TemporaryDirectory(prefix="vitral-bench-") as folder:
        for process in _processes(subject, Path(folder), settings, rows):
            settings.say(f"{process.row.task}: {process.name}")
            try:
                process.run()
                runnable[process.name] = process
            except VitralError as error:
                rows.append(replace(process.row, reason=str(error)))
        settings.say(f"{settings.rounds} rounds of {len(runnable)} processes")
        calls = {name: process.run for name, process in runnable.items()}
        seconds = interleaved(calls, settings.rounds)
    reference = next(iter(runnable.values())).answers
    labels = subject.checkpoint.labels
    measured = [runnable[name].measured(readings, reference, labels) for name, readings in seconds.items()]
    first = with_ratios([row for row in measured if row.task == _FIRST])
    alone = [row for row in measured if row.task != _FIRST]
    title = f"{subject.name}, a JPEG of {_PIXELS[0]}x{_PIXELS[1]}"
    placement = f"{settings.placement.device.type}, float32"
    return Report("start", title, placement, (*first, *alone, *rows), machine)


def _processes(subject: Subject, folder: Path, settings: Settings, absent: list[Row]) -> Iterator[_Process]:
    """Every contender's, Vitral's first; a row without numbers goes to `absent`."""
    photo = folder / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (*_PIXELS, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    save_checkpoint(folder / "vitral", subject.checkpoint)
    yield _first_prediction("vitral", _OURS, folder, settings)
    python = [sys.executable]
    yield _Process(Row(_START, "vitral", "--help"), [*python, "-m", "vitral", "--help"])
    yield _Process(Row(_START, "torch", "import"), [*python, "-c", "import torch"])
    for library, programs in peers.FIRST_PREDICTIONS.items():
        try:
            if not peers.is_installed(library):
                raise VitralError("not installed")
            convert(str(folder / "vitral"), folder / library, library)
        except VitralError as error:
            absent.append(Row(_FIRST, library, reason=str(error)))
            continue
        for program in programs:
            yield _first_prediction(library, program, folder, settings)


def _first_prediction(library: str, program: Program, folder: Path, settings: Settings) -> _Process:
    row = Row(_FIRST, library, program.configuration, program.detail)
    code = _TEMPLATE.format(imports=program.imports, load=program.load, predict=program.predict)
    given = [str(folder / library), str(folder / "photo.jpg"), settings.placement.device.type]
    return _Process(row, [sys.executable, "-c", code, *given])
