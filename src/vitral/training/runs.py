"""The runs below a folder, as their files tell: how far each is, how good, and how their recipes differ."""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitral.checkpoints.folder import CONFIG_FILE, WEIGHTS_FILE
from vitral.evaluation.analysis.comparison import recipe_differences
from vitral.recipes.packaged import RUN_FILE
from vitral.runtime.errors import VitralError
from vitral.runtime.lock import is_locked
from vitral.runtime.settings import flat, read_toml
from vitral.training.run_folder import RunFolder

State = Literal["finished", "running", "stopped", "broken"]
Order = Literal["score", "name", "date", "time"]
# Figures that are told of an evaluation, one for each task.
_SCORES = ("top1", "mean_average_precision")


@dataclass(frozen=True)
class Overview:
    """A run at a glance."""

    name: str  # its folder
    state: State
    why: str  # what is wrong with a broken one, or what a stopped one waits for
    score_name: str | None  # "top1" or "mean_average_precision"; None: it was not judged yet
    score: float | None  # the best of the validation images, 0 to 1
    best_step: int | None
    test: float | None  # the same figure of the test images
    test_interval: tuple[float, float] | None  # 95 %
    steps: int  # up to its last evaluation
    epochs: float
    seconds: float
    begun: str | None  # UTC
    settings: dict[str, Any] = field(default_factory=dict)  # of its recipe, by dotted names; and "data"


def survey(folders: Iterable[Path], order: Order = "score") -> list[Overview]:
    """Look at every run below some folders; each may be a run itself.

    Args:
        folders: where to look.
        order: by falling score, by name, by the date of its beginning, or by the time that it took.

    Raises:
        VitralError: if a folder is not there, or no run is found.
    """
    found = [look_at(path) for folder in folders for path in _run_folders(folder)]
    if not found:
        raise VitralError(f"no run lies in {', '.join(map(str, folders))}; `vitral train` makes one")
    return in_order(found, order)


def in_order(found: Iterable[Overview], order: Order = "score") -> list[Overview]:
    return sorted(found, key=_KEYS[order])


_KEYS: dict[str, Any] = {
    "score": lambda run: (-1.0 if run.score is None else run.score) * -1,
    "name": lambda run: run.name,
    "date": lambda run: run.begun or "",
    "time": lambda run: run.seconds,
}


def _run_folders(root: Path) -> Iterator[Path]:
    """The folders of runs at or below `root`; none is looked for within a run."""
    if not root.is_dir():
        raise VitralError(f"{root} is no folder; name one that runs lie in")
    for place, folders, _ in os.walk(root):
        path = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if RunFolder(path).holds_run:
            folders.clear()
            yield path


def look_at(path: Path) -> Overview:
    """Look at one run; nothing of it is changed, and none of its tensors read."""
    complaints: list[str] = []
    files = RunFolder(path, complaints.append)
    lines, summary = files.history.evaluations, files.history.summary or {}
    name = next((one for one in _SCORES if lines and f"val_{one}" in lines[-1]), None)
    best = max(lines, key=lambda line: line.get(f"val_{name}") or 0.0) if name else None
    record = files.record
    test = summary.get("test") or {}
    state, why = _state(files, complaints)
    last: Mapping[str, Any] = lines[-1] if lines else {}
    return Overview(
        name=str(path),
        state=state,
        why=why,
        score_name=name,
        score=best.get(f"val_{name}") if best else None,
        best_step=best["step"] if best else None,
        test=test.get(name) if name else None,
        test_interval=tuple(test["ci95"]) if test.get("ci95") else None,
        steps=summary.get("steps", last.get("step", 0)),
        epochs=summary.get("epochs", last.get("epoch", 0.0)),
        seconds=summary.get("seconds", last.get("seconds", 0.0)),
        begun=record.machine.get("date") if record else None,
        settings=_settings(files),
    )


def _state(files: RunFolder, complaints: Sequence[str]) -> tuple[State, str]:
    """How a run stands, and what is to be said of that."""
    path = files.path
    if is_locked(path / ".lock"):
        return "running", ""
    if files.finished:
        lost = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (path / name).exists()]
        return ("broken", f"{lost[0]} is gone") if lost else ("finished", "")
    if complaints:
        return "broken", complaints[0].removeprefix(f"{path}/")
    if not (path / RUN_FILE).exists():
        return "broken", f"{RUN_FILE} is gone"
    if not files.has_state:
        return "stopped", "before its first checkpoint"
    state = path / "checkpoints" / "state.pt"
    if state.exists() and not zipfile.is_zipfile(state):  # a large one of several processes is a folder
        return "broken", "its checkpoint is damaged"
    return "stopped", "goes on with --resume"


def _settings(files: RunFolder) -> dict[str, Any]:
    """What the run's recipe has, and its data; whatever of it can be read."""
    try:
        settings = flat(read_toml(files.path / RUN_FILE))
    except VitralError:
        settings = flat(files.record.recipe) if files.record else {}
    try:
        config = json.loads((files.path / CONFIG_FILE).read_bytes())
        data = config.get("metadata", {}).get("data")
    except (OSError, ValueError, AttributeError):
        data = None
    return settings if data is None else {"data": data, **settings}


def own_settings(runs: Sequence[Overview]) -> list[dict[str, Any]]:
    """Give for each run the settings that are not the same in all of them."""
    readable = [run.settings for run in runs if run.settings]
    names = recipe_differences(readable)
    return [{name: run.settings[name] for name in names if name in run.settings} for run in runs]
