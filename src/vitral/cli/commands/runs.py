"""`vitral runs`: every run of a folder, and what differs between their recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.console import clock, print_table, say
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.training.runs import Overview

_SHOWN_SETTINGS = 8
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
    """Print a row a run; what is wrong with one, below the table."""
    rows = [
        (
            run.name,
            run.state,
            "-" if run.score is None else f"{run.score:.1%}",
            _test(run),
            f"{run.epochs:.1f}",
            clock(run.seconds),
            _told(settings),
        )
        for run, settings in zip(found, own, strict=True)
    ]
    headings = ("run", "state", *_NUMBERS, "what differs")
    print_table(title or f"{len(found):,} run{'s' * (len(found) != 1)}", headings, rows, _NUMBERS)
    for run in found:
        if run.why and run.state == "broken":
            say(f"{run.name}: {run.why}")


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
