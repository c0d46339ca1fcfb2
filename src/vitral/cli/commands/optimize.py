"""`vitral optimize`: the fastest form of a model on this machine that keeps its accuracy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.console import columns, phases, print_table, say, warn
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.data.image_data import DataSource
    from vitral.ship.optimize.ledger import Goal, Ledger, Row

_WIDE = 76  # columns that the whole table takes


def optimize(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    out: Annotated[
        Path | None, options.folder("New folder for the artifact; by default MODEL's name with -optimized.")
    ] = None,
    max_drop: Annotated[
        float, options.real(limits.POINTS, "Points of accuracy that it may lose, by the upper 95 % bound.")
    ] = 0.5,
    goal: Annotated[
        str, options.choice(limits.GOALS, ": one image at a time, or many.", "--for")
    ] = "latency",
    minutes: Annotated[float, options.real(limits.MINUTES, "Minutes that the search may take.")] = 10,
    judge_all: Annotated[
        bool, typer.Option("--all", help="Judge every form, for the ledger, not only until one fits.")
    ] = False,
    column: options.Column = None,
    json_output: options.Json = False,
) -> None:
    """Find the fastest form of MODEL on this machine that keeps its accuracy, and write it as an artifact.

    Forms of PyTorch, OpenVINO and ONNX Runtime in float32, bfloat16 and int8 are timed in turns, then the
    fastest are judged on held-out images of DATA. Nothing is saved if none is faster within the bound; the
    exit status is then 1.

    \b
    vitral optimize runs/photos photos/ --out fast/
    """
    from vitral.runtime.files import refuse_filled

    folder = out or Path(f"{Path(model).resolve().name}-optimized")
    refuse_filled(folder)
    asked = {"max_drop": max_drop, "goal": goal, "minutes": minutes, "judge_all": judge_all}
    ledger = _search(model, options.opened(data, column), folder, asked)
    if json_output:
        print(to_json(ledger.to_dict()))
    else:
        print_ledger(ledger)
        if ledger.chosen:
            say(f"{folder}: predict, eval and serve take it as MODEL; ledger.json and frontier.png are in it")
    if ledger.chosen is None:
        raise typer.Exit(1)


def _search(
    model: str,
    data: "DataSource",
    folder: Path,
    asked: dict[str, Any],
) -> "Ledger":
    """Search, with its course on standard error."""
    from vitral.ship.optimize.optimize import Listener
    from vitral.ship.optimize.optimize import optimize as search

    with phases() as (tell, on_images):
        listener = Listener(warn, tell, on_images)
        return search(model, data, folder, **asked, listener=listener).ledger


def print_ledger(ledger: "Ledger") -> None:
    """Print a row a form, why others were left out, and the conclusion."""
    say(
        f"{ledger.model} on {ledger.images['judging']:,} held-out images of {ledger.data} "
        f"({ledger.machine['cpu']}, {ledger.machine['threads']} threads)"
    )
    headings, kept = _headings(ledger), slice(None)
    if columns() < _WIDE:
        headings, kept = (*headings[:4], headings[-1]), slice(0, 3)
    timed = [row for row in ledger.rows if row.speed is not None]
    cells = [(row.name, *_cells(row, ledger.goal)[kept], row.verdict) for row in timed]
    print_table("", headings, cells, headings[1:-1])
    for row in ledger.rows:
        if row.reason and row.verdict in ("left out", "too lossy", "fits"):
            say(f"{row.name}: {row.reason}", "  ")
    for note in ledger.notes:
        say(f"note: {note}")
    say(ledger.conclusion())


def _headings(ledger: "Ledger") -> tuple[str, ...]:
    batch = next((row.speed.batch for row in ledger.rows if row.speed), 1)
    speed = "ms" if ledger.goal == "latency" else f"images/s by {batch}"
    other = f"images/s by {batch}" if ledger.goal == "latency" else "ms"
    return (
        "form",
        speed,
        "times eager",
        "lost at most",
        other,
        ledger.score_name,
        "lost",
        "ECE",
        "MB",
        "verdict",
    )


def _cells(row: "Row", goal: "Goal") -> tuple[str, ...]:
    """What is shown of a form: the most important first."""
    assert row.speed is not None
    speed, judged = row.speed, row.judgement
    times = f"{speed.latency_ms.median:.1f}", f"{speed.images_per_s.median:.1f}"
    first, other = times if goal == "latency" else reversed(times)
    gain, size = f"{speed.times_eager.median:.2f}", f"{row.disk_mb:.1f}" if row.disk_mb else ""
    if judged is None:
        return first, gain, "", other, "", "", "", size
    ece = "" if judged.ece is None else f"{judged.ece:.2%}"
    if row.verdict == "eager":
        return first, gain, "", other, f"{judged.score:.2%}", "", ece, size
    lost, at_most = (f"{100 * share + 0.0:.2f}" for share in (judged.loss, judged.loss_high))  # no -0.00
    return first, gain, at_most, other, f"{judged.score:.2%}", lost, ece, size
