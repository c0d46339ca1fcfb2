"""What a run wrote down of its course: a line an evaluation, and how it ended."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class History:
    """A run's course so far, as its files tell it."""

    evaluations: tuple[dict[str, Any], ...]  # `Evaluated.record` of each, by rising step
    summary: dict[str, Any] | None  # `Summary`; None: it has not ended, or the file is damaged


def read_history(metrics: Path, summary: Path) -> History:
    """Read the files of a run; what of them is not there or damaged is left out."""
    return History(tuple(evaluation for evaluation, _ in whole_lines(metrics)), _summary(summary))


def whole_lines(metrics: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each evaluation and its line; a killed process may have written half a line."""
    if not metrics.exists():
        return
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            evaluation = json.loads(line)
            yield {**evaluation, "step": int(evaluation["step"])}, line


def _summary(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        summary = json.loads(file.read_bytes())
        return summary if isinstance(summary, dict) else None
    return None
