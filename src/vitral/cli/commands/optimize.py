"""`vitral optimize`: the fastest form of a model on this machine that keeps its accuracy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.console import phases, print_table, say, warn
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.ship.optimize.ledger import Ledger, Row


def optimize(
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
    ledger = _search(model, data, folder, asked)
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
    data: str,
    folder: Path,
    options: dict[str, Any],
) -> "Ledger":
    """Search, with its course on standard error."""
    from vitral.ship.optimize.optimize import Listener
    from vitral.ship.optimize.optimize import optimize as search

    with phases() as (tell, on_images):
        listener = Listener(warn, tell, on_images)
        return search(model, data, folder, **options, listener=listener).ledger


def print_ledger(ledger: "Ledger") -> None:
    """Print a row a form, why others were left out, and the conclusion."""
    say(
        f"{ledger.model} on {ledger.images['judging']:,} held-out images of {ledger.data} "
        f"({ledger.machine['cpu']}, {ledger.machine['threads']} threads)"
    )
    batch = next((row.speed.batch for row in ledger.rows if row.speed), 1)
    numbers = ("ms", f"images/s by {batch}", "times eager", "score", "points lost", "ECE", "MB")
    timed = [row for row in ledger.rows if row.speed is not None]
    cells = [(row.name, *_cells(row), row.verdict) for row in timed]
    print_table("", ("form", *numbers, "verdict"), cells, numbers)
    for row in ledger.rows:
        if row.reason and row.verdict in ("left out", "too lossy", "fits"):
            say(f"{row.name}: {row.reason}", "  ")
    for note in ledger.notes:
        say(f"note: {note}")
    say(ledger.conclusion())


def _cells(row: "Row") -> tuple[str, ...]:
    assert row.speed is not None
    speed, judged = row.speed, row.judgement
    times = f"{speed.latency_ms.median:.1f}", f"{speed.images_per_s.median:.1f}"
    gain = f"{speed.times_eager.median:.2f}"
    size = f"{row.disk_mb:.1f}" if row.disk_mb else ""
    if judged is None:
        return (*times, gain, "", "", "", size)
    ece = "" if judged.ece is None else f"{judged.ece:.2%}"
    lost = f"{100 * judged.loss + 0.0:.2f} (to {100 * judged.loss_high:.2f})"  # no -0.00
    return (*times, gain, f"{judged.score:.2%}", "" if row.verdict == "eager" else lost, ece, size)
