"""`Tracking`: gives a run's figures to trackers, each in a thread of its own.

A figure goes out once the checkpoint that covers it is on disk, so that no service ever holds a step that a
resumed run takes again. What goes out are the lines of ``metrics.jsonl``; how far each tracker has them is
kept beside the checkpoint.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitral.runtime.files import write_atomically
from vitral.runtime.stopping import StopSignal
from vitral.training.events import CheckpointWritten, Event, RunBegins
from vitral.training.history import read_history
from vitral.training.listeners import Listeners
from vitral.training.run import Run
from vitral.training.tracking.trackers import TRACKERS, Tracked, Tracker, refuse_missing

# For trackers to take what is left, at a run's end and where it was asked to stop: a resume gives the rest.
_SECONDS_TO_END, _SECONDS_TO_STOP = 30.0, 1.5


@contextmanager
def tracking(tell: Listeners, stop: StopSignal) -> Iterator["Tracking"]:
    """A listener that gives what is left at the end; `tell` is told of a tracker that fails."""
    listener = Tracking(tell)
    try:
        yield listener
    finally:
        listener.end(_SECONDS_TO_STOP if stop.requested else _SECONDS_TO_END)


class Tracking:
    """A listener that trackers follow a run by, those of its setting `track`."""

    def __init__(self, tell: Listeners) -> None:
        self.tell = tell
        self.followers: list[_Follower] = []

    def __call__(self, event: Event) -> None:
        """Listen to a run. Raises VitralError if a tracker's package is not installed."""
        match event:
            case RunBegins():
                for name in event.run.recipe.course.track:
                    refuse_missing(name)
                self.followers = [_Follower(name, event.run) for name in event.run.recipe.course.track]
                if event.run.state.step:
                    self._give(event.run.state.step)
            case CheckpointWritten():
                self._give(event.step)

    def _give(self, step: int) -> None:
        for follower in self.followers:
            follower.work.put(step)
        self._tell_failures()

    def _tell_failures(self) -> None:
        for follower in self.followers:
            if follower.failure is not None and not follower.told:
                follower.told = True
                self.tell.message(f"{follower.name} does not follow this run any more: {follower.failure}")

    def end(self, seconds: float) -> None:
        """Wait for the trackers to take what is left, at most so long."""
        end = time.monotonic() + seconds
        for follower in self.followers:
            follower.work.put(None)
        for follower in self.followers:
            follower.thread.join(max(end - time.monotonic(), 0))
            if follower.thread.is_alive() and follower.failure is None:
                follower.failure = f"it did not take the last figures within {seconds:g} s"
        self._tell_failures()


class _Follower:
    """One tracker, in a thread: it may hang as long as it likes."""

    def __init__(self, name: str, run: Run) -> None:
        self.name = name
        self.failure: str | None = None
        self.told = False
        self.work: queue.Queue[int | None] = queue.Queue()  # steps of checkpoints; None: the end
        folder = run.files.path
        self._metrics, self._summary = folder / "metrics.jsonl", folder / "summary.json"
        # From the files: the first of several processes has trackers, and `RunFolder` asks them all.
        self._note = folder / "checkpoints" / f"tracked-{name}.json"
        record, before = _read_json(folder / "checkpoints" / "run.json"), _read_json(self._note)
        self._run = Tracked(
            folder,
            record.get("id", folder.name),
            run.recipe.settings(),
            before.get("known_as"),
            before.get("step", -1),
        )
        self.thread = threading.Thread(target=self._follow, name=f"vitral {name}", daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        step = self.work.get()
        if step is None:
            return  # there was nothing to tell
        try:
            tracker = TRACKERS[self.name][1](self._run)
            self._write_note(tracker)
            while step is not None:
                self._give(tracker, step)
                step = self.work.get()
            summary = read_history(self._metrics, self._summary).summary or {}
            finished = summary.get("finished") is True
            tracker.end(_end_figures(summary) if finished else {}, finished=finished)
        except Exception as error:
            self.failure = " ".join(str(error).split()) or type(error).__name__

    def _give(self, tracker: Tracker, step: int) -> None:
        for line in read_history(self._metrics, self._summary).evaluations:
            if tracker.step < line["step"] <= step:
                tracker.log(line["step"], _figures(line))
                tracker.step = line["step"]
                self._write_note(tracker)

    def _write_note(self, tracker: Tracker) -> None:
        content = {"known_as": tracker.known_as, "step": tracker.step}
        write_atomically(self._note, (json.dumps(content) + "\n").encode())


def _read_json(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(file.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}


def _figures(line: Mapping[str, Any], group: str = "") -> dict[str, float]:
    """The numbers of a record by name, those of a group as ``time/stepping``."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= _figures(value, f"{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[f"{group}{name}"] = float(value)
    return found


def _end_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """What a finished run is known by; of its test images the figures of all classes together."""
    kept = ("val_top1", "val_mean_average_precision", "best_step")
    found = {f"end/{name}": float(summary[name]) for name in kept if summary.get(name) is not None}
    test = {name: value for name, value in (summary.get("test") or {}).items() if name != "per_class"}
    return found | {f"test/{name}": value for name, value in _figures(test).items()}
