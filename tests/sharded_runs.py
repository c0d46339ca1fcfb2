"""A program that `test_sharding.py` starts, under torchrun or alone: several runs, one after the other."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.conftest import StopAt
from vitral.data.image_data import open_data
from vitral.recipes.recipe import Recipe
from vitral.runtime.world import joined
from vitral.training import saving
from vitral.training.loop import train


def carry_out(data: str, runs: list[dict[str, Any]]) -> None:
    """Carry out each of the runs, which say a folder and what differs from a new run of the default."""
    with joined() as world:
        for run in runs:
            saving.LARGE = 0 if run.get("in_pieces") else 4 << 30
            stops = [StopAt(run["stop"])] if "stop" in run else []
            recipe, resume = Recipe(**run.get("settings", {})), run.get("resume", False)
            train(open_data(data), Path(run["folder"]), recipe, resume=resume, listeners=stops, world=world)


if __name__ == "__main__":
    carry_out(*json.loads(sys.argv[1]))
