"""A program that `processes.launch` starts, under torchrun or alone: several runs, one after the other."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.conftest import StopAt
from vitral.cli.app import main
from vitral.data.image_data import open_data
from vitral.recipes.recipe import Recipe
from vitral.runtime.world import joined
from vitral.training import saving
from vitral.training.loop import train


def carry_out(data: str, runs: list[dict[str, Any]]) -> None:
    """Carry out each of the runs, which say a folder and what differs from a new run of the default.

    One that says a command is `vitral`'s, which joins the others, and leaves them again.
    """
    for run in runs:
        if "command" in run:
            command(run["command"], run["status"])
            continue
        saving.LARGE = 0 if run.get("in_pieces") else 4 << 30
        stops = [StopAt(run["stop"])] if "stop" in run else []
        recipe, resume = Recipe(**run.get("settings", {})), run.get("resume", False)
        with joined() as world:
            train(
                open_data(data, seed=3),
                Path(run["folder"]),
                recipe,
                resume=resume,
                listeners=stops,
                world=world,
            )


def command(words: list[str], status: int) -> None:
    sys.argv = ["vitral", *words]
    ended = None
    try:
        main()
    except SystemExit as end:
        ended = end.code or 0
    assert ended in (None, status), ended


if __name__ == "__main__":
    carry_out(*json.loads(sys.argv[1]))
