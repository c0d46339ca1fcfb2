"""Measures a small model's step, and what the processes say to each other in one, with 1, 2 and 4 processes.

    python scripts/scaling.py --steps 60

The same run each time (`parts=4`, one thread a process), on this machine's cores. Beside the measured step
stands what docs/scale.md's model predicts for so many cores: the step of one process, divided by the cores
that work at once; the addition of gradients counts as nothing there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.processes import ENVIRONMENT, torchrun

SETTINGS = {
    "model": "Conv+ViT-Pico/4", "img_size": 32, "batch_size": 64, "parts": 4,
    "workers": 0, "device": "cpu", "precision": "float32", "compile": False, "threads": 1,
}  # fmt: skip
_WARM_UP = 5
_EXCHANGES = 400


def measure(steps: int) -> None:
    """In each process: train, and then only talk; the first prints the medians, in milliseconds."""
    from vitral.data.image_data import open_data
    from vitral.recipes.recipe import Recipe
    from vitral.runtime.world import joined
    from vitral.training.events import StepDone
    from vitral.training.loop import train

    times: list[float] = []

    def told(event: object) -> None:
        if isinstance(event, StepDone):
            times.append(time.perf_counter())

    with joined() as world, tempfile.TemporaryDirectory() as folder:
        there = Path(world.from_first(lambda: folder)) / "run"
        recipe = Recipe(**SETTINGS, steps=steps, eval_epochs=1000, checkpoint_steps=1000)
        train(open_data("digits"), there, recipe, listeners=[told], world=world)
        talk = []
        for _ in range(_EXCHANGES):
            begun = time.perf_counter()
            world.sum(0.0, 1.0, 2.0, 3.0)  # as `Run.meet` does
            talk.append(time.perf_counter() - begun)
        if world.is_first:
            taken = [after - before for before, after in pairwise(times)][_WARM_UP:]
            medians = {"step": statistics.median(taken), "exchange": statistics.median(talk)}
            print(json.dumps({name: 1000 * seconds for name, seconds in medians.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    asked = parser.parse_args()
    environment = {**os.environ, **ENVIRONMENT, "MEASURE": str(asked.steps)}
    cores, alone = os.cpu_count() or 1, None
    for processes in asked.processes:
        command = [*torchrun(processes), __file__]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        alone = alone or found["step"] * min(processes, cores)
        predicted = alone / min(processes, cores)
        print(
            f"{processes} processes on {cores} cores: step {found['step']:.1f} ms, "
            f"predicted {predicted:.1f} ms; "
            f"one exchange {found['exchange']:.3f} ms",
            flush=True,
        )


if __name__ == "__main__":
    measure(int(os.environ["MEASURE"])) if "MEASURE" in os.environ else main()
