#!/usr/bin/env python3
"""What `vitral bench` does not measure of a training step as `vitral train` takes it.

    scripts/gpu_measure.py host model=Conv+ViT-Pico/4 img_size=32 batch_size=512 --out host.json
    scripts/gpu_measure.py memory model=ViT-L/16 img_size=224 checkpoint_layers=true --out memory.json

"host": the milliseconds of a step by the clock, those after which the host had issued it, those in which the
GPU was busy by its own profiler, and the share of the step in which it was not. "memory": the peak of the
device's memory beside what was foretold; its images are noise. Settings are those of `vitral train`, the data
scikit-learn's digits, resized.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitral.bench.rounds import synchronizer
from vitral.data.batches import Batch
from vitral.data.image_data import open_data
from vitral.model.config import height_and_width
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import resolve
from vitral.runtime.devices import Placement
from vitral.runtime.threads import cpu_count
from vitral.training.begin import first_checkpoint
from vitral.training.determinism import deterministic
from vitral.training.listeners import Listeners
from vitral.training.loop import training_batches
from vitral.training.run import Run
from vitral.training.run_folder import RunFolder

Steps = Callable[[int], None]
WARM_UP = 12  # kernels' choice, the recording of CUDA graphs; of mixed batches and others
MEBIBYTE = 2**20


def stepper(run: Run, batches: Iterator[Batch]) -> Steps:
    """What takes so many steps."""

    def take(count: int) -> None:
        for batch in islice(batches, count):
            run.step(batch)
            run.state.step += 1
            run.budget.tick()

    return take


def noise(run: Run) -> Batch:
    """A batch on the device."""
    recipe, device = run.recipe, run.placement.device
    shape = recipe.batches.batch_size, 3, *height_and_width(recipe.start.img_size)
    labels = torch.randint(len(run.data.classes), shape[:1], device=device)
    return Batch(torch.randn(shape, device=device), labels, ())


def host(run: Run, steps: int, save: Callable[[dict[str, Any]], None]) -> None:
    take, wait = stepper(run, training_batches(run)), synchronizer(run.placement)
    take(WARM_UP)
    wait()
    began = time.perf_counter()
    take(steps)
    issued = time.perf_counter()
    wait()
    wall = (time.perf_counter() - began) / steps
    found = {
        "wall_ms": 1000 * wall,
        "issued_ms": 1000 * (issued - began) / steps,
        "images_per_second": run.recipe.batches.batch_size / wall,
    }
    save(found)  # should the profiler fail
    if run.placement.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            take(steps)
            wait()
        busy = busy_seconds(profiled) / steps
        save({**found, "gpu_ms": 1000 * busy, "host_share": 1 - busy / wall})


def busy_seconds(profiled: profile) -> float:
    """How long at least one kernel or copy ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy / 1e6


def memory(run: Run, steps: int, save: Callable[[dict[str, Any]], None]) -> None:
    need = run.memory
    take, wait = stepper(run, repeat(noise(run))), synchronizer(run.placement)
    cuda = run.placement.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    take(WARM_UP)
    wait()
    began = time.perf_counter()
    take(steps)
    wait()
    speed = run.recipe.batches.batch_size * steps / (time.perf_counter() - began)
    found = {"foretold_mib": need.total / MEBIBYTE, "images_per_second": speed}
    if cuda:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        found |= {
            "peak_mib": peak / MEBIBYTE,
            "reserved_mib": reserved / MEBIBYTE,
            "share": peak / need.total,
        }
    save(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["host", "memory"])
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_intermixed_args()
    # A budget that is never reached, so that rate and mixing are those of a run's middle.
    asked = Recipe(steps=1000).with_words(arguments.settings)
    with tempfile.TemporaryDirectory(prefix="vitral-gpu-") as folder:
        data = open_data("digits")
        recipe = resolve(asked, data, None, cpu_count())
        files = RunFolder(Path(folder) / "run")
        placement = Placement.choose(recipe.machine.device, recipe.machine.precision)
        checkpoint = first_checkpoint(recipe, data, None)
        run = Run(recipe, data, checkpoint, placement, files, Listeners())
        with deterministic():
            measure = {"host": host, "memory": memory}[arguments.what]
            measure(run, arguments.steps, lambda found: arguments.out.write_text(json.dumps(found) + "\n"))


if __name__ == "__main__":
    main()
