"""`vitral runs`: every run of a folder, and what differs between their recipes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.console import clock, columns, print_table, say
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.training.runs import Overview

_SHOWN_SETTINGS = 8
_ROOM_FOR_SETTINGS = 100  # columns; in fewer, the table would break their words
_NUMBERS = ("val", "test", "epochs", "time")


def runs(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Runs, or folders of runs.")],
    order: Annotated[str, options.choice(limits.RUN_ORDERS, ": what comes first.", "--sort")] = "score",
    json_output: options.Json = False,
) -> None:
    """List every run in FOLDER: how far it is, how good, and what its recipe has of its own.

    \b
    vitral runs runs/
    vitral runs runs/photos runs/tuned --sort name
    """
    from vitral.training.runs import own_settings, survey

    found = survey(folders, order)  # type: ignore[arg-type]  # pyrefly: ignore[bad-argument-type]
    own = own_settings(found)
    if json_output:
        rows = [{**asdict(run), "differs": of} for run, of in zip(found, own, strict=True)]
        print(to_json({"runs": rows}))
    else:
        print_runs(found, own)


def print_runs(found: "Sequence[Overview]", own: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print a row a run, what its recipe has of its own beside it or below; then what is wrong with one."""
    folder = _shared_folder([run.name for run in found])
    names = [os.path.relpath(run.name, folder) if folder else run.name for run in found]
    rows = [_row(name, run) for name, run in zip(names, found, strict=True)]
    told = [_told(settings) for settings in own]
    headings = ("run", "state", *_NUMBERS)
    beside = columns() >= _ROOM_FOR_SETTINGS
    if beside:
        headings = (*headings, "what differs")
        rows = [(*row, settings) for row, settings in zip(rows, told, strict=True)]
    counted = title or f"{len(found):,} run{'s' * (len(found) != 1)}"
    print_table(f"{counted}, in {folder}" if folder else counted, headings, rows, _NUMBERS)
    for name, settings in zip(names, told, strict=True):
        if settings and not beside:
            say(f"{name}: {settings}")
    for run in found:
        if run.why and run.state == "broken":
            say(f"{run.name}: {run.why}")


def _shared_folder(names: Sequence[str]) -> str:
    """Where all of them are, which need not be said of each."""
    folders = [os.path.dirname(name) for name in names]
    one_kind = len({os.path.isabs(name) for name in names}) == 1
    shared = os.path.commonpath(folders) if one_kind else ""
    return "" if shared in names else shared


def _row(name: str, run: "Overview") -> tuple[str, ...]:
    score = "-" if run.score is None else f"{run.score:.1%}"
    return name, run.state, score, _test(run), f"{run.epochs:.1f}", clock(run.seconds)


def _test(run: "Overview") -> str:
    if run.test is None:
        return "-"
    if run.test_interval is None:
        return f"{run.test:.1%}"
    reach = max(abs(end - run.test) for end in run.test_interval)
    return f"{run.test:.1%} ±{reach * 100:.1f}"


def _told(settings: Mapping[str, Any]) -> str:
    words = [f"{name}={_value(value)}" for name, value in settings.items()]
    more = len(words) - _SHOWN_SETTINGS
    return ", ".join(words[:_SHOWN_SETTINGS] + [f"{more} more"] * (more > 0))


def _value(value: Any) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if value in (True, False)
        else str(value)
    )
