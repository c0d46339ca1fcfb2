"""`vitral sweep`: several recipes on the same data, and one table at the end."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitral.cli import options
from vitral.cli.commands.runs import print_runs
from vitral.cli.console import print_lines, warn
from vitral.runtime.errors import VitralError
from vitral.runtime.plainjson import to_json
from vitral.runtime.process import keep_freed_memory

if TYPE_CHECKING:
    from vitral.training.sweep import Trial


def sweep(
    data: options.Data,
    out: Annotated[Path, options.folder("Folder of the runs.")],
    settings: Annotated[
        list[str],
        options.text(
            "KEY=A,B,C...", "Settings to try, a range as 1e-4..1e-2; those with one value hold for all."
        ),
    ],
    random: Annotated[
        int | None, options.number((1, 10_000), "Runs, evenly scattered; by default every combination.")
    ] = None,
    seed: options.Seed = 0,
    recipe: Annotated[
        str | None, options.name("NAME_OR_FILE", "What all runs begin with: a recipe, or a file of settings.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Train on DATA with several values of settings, a run each, and say which did best.

    The same command goes on where it was stopped.

    \b
    vitral sweep photos/ --out sweeps/rate learning_rate=1e-4,3e-4,1e-3 minutes=5
    vitral sweep photos/ --out sweeps/both learning_rate=1e-4..1e-2 weight_decay=0,0.05 --random 8 minutes=5
    """
    from vitral.cli.training import TrainingConsole
    from vitral.recipes.packaged import recipe_of
    from vitral.training.sweep import Plan
    from vitral.training.sweep import sweep as run_sweep

    plan = Plan.of(settings)
    trials = plan.grid() if random is None else plan.scattered(random, seed)
    base = recipe_of(recipe).changed(**plan.fixed)
    keep_freed_memory()
    done = list(run_sweep(data, out, trials, base, listeners=lambda: [TrainingConsole()], tell=warn))
    _print(done, len(trials), as_json=json_output)


def _print(done: "list[Trial]", planned: int, *, as_json: bool) -> None:
    from vitral.training.runs import in_order

    judged = in_order(trial.run for trial in done if trial.run)
    if as_json:
        print(to_json({"planned": planned, "trials": [asdict(trial) for trial in done]}))
    elif judged:
        tried = {trial.run.name: trial.settings for trial in done if trial.run}
        own = [tried[run.name] for run in judged]
        print_runs(judged, own, f"{len(done)} of {planned} runs, the best first")
    for trial in done:
        if trial.failure and trial.failure != "stopped":
            warn(f"{trial.folder.name} failed: {trial.failure}")
    if len(done) < planned or any(trial.failure == "stopped" for trial in done):
        warn("stopped; the same command goes on")
        raise typer.Exit(1)
    best = next((run for run in judged if run.score is not None), None)
    if best is None:
        raise VitralError("not one run came to an evaluation")
    if not as_json:
        print_lines(f"best: {best.name}; try: vitral predict {shlex.quote(best.name)} IMAGE...")
