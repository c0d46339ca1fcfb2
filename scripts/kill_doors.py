"""Kills a training run at random points, resumes it, and compares it with one that was left alone.

    python scripts/kill_doors.py --kills 25 --workers 0 1 2 --doors folder parquet shards

For every door (a way in which the same images lie: `tests/test_doors.py`, and the order by blocks) and
number of worker processes: a calm run; then a run whose whole process group is killed with SIGKILL again
and again, and resumed each time, until it was killed so often and is finished. Prints a line each: kills,
whether all weights and the optimizer's state are equal to the bit, and the seconds from a resume's start to
the end of its first step.
Each run is forked from this process, which has imported what is slow to import.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

from tests import test_doors as doors
from tests.data_hub import data_hub
from vitral.reports.train import train
from vitral.training.events import StepDone

SETTINGS: dict[str, Any] = {
    "model": "ViT-Ti/16",
    "architecture": {"patch_size": 8, "embed_dim": 32, "num_layers": 2, "num_heads": 2},
    "img_size": 32, "steps": 60, "batch_size": 8, "checkpoint_steps": 3, "device": "cpu",
    "precision": "float32", "compile": False, "crop": "resized", "flip": True, "threads": 1,
    "dropout": 0.1, "mixup": 0.2,
}  # fmt: skip
STATE = ("last/model.safetensors", "model.safetensors", "last/state.pt")


def begun(data: Any, out: Path, first_batch: Path, settings: dict[str, Any]) -> int:
    """Forks a process, of a group of its own, that trains or goes on; gives its number."""
    number = os.fork()
    if number:
        return number
    os.setpgid(0, 0)
    start = time.perf_counter()

    def told(event: object) -> None:
        if isinstance(event, StepDone) and not first_batch.exists():
            first_batch.write_text(f"{time.perf_counter() - start:.3f}")

    status = 1
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        resume = (out / "last").is_dir()
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        given = {"workers": settings["workers"]} if resume else settings
        train(data, out, resume=resume, listeners=[told], **given)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
    return 0


def ended(number: int, after: float | None) -> bool:
    """Waits for a process, or kills its group after some seconds; tells whether it ended by itself."""
    limit = time.monotonic() + (600 if after is None else after)
    while time.monotonic() < limit:
        found, status = os.waitpid(number, os.WNOHANG)
        if found:
            if status:
                raise SystemExit(f"a run ended with status {status}")
            return True
        time.sleep(0.005)
    os.killpg(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return False


def bits(out: Path) -> str:
    """Digests what a run leaves."""
    digest = hashlib.sha256()
    for name in STATE:
        if (out / name).is_file() and name.endswith(".safetensors"):
            digest.update((out / name).read_bytes())
        elif (out / name).is_file():
            saved = torch.load(out / name, weights_only=True)
            digest.update(repr(tensors(saved)).encode())
    return digest.hexdigest()


def tensors(value: Any) -> Any:
    """Replaces tensors by their bytes, and leaves out times, which differ."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: tensors(inner) for key, inner in value.items() if "seconds" not in str(key)}
    return [tensors(inner) for inner in value] if isinstance(value, list | tuple) else repr(value)


def tried(data: Any, folder: Path, kills: int, draw: random.Random, settings: dict[str, Any]) -> str:
    """Does it for one door and number of workers; gives a line."""
    first = folder / "first-batch"
    ended(begun(data, folder / "calm", first, settings), None)
    start = time.monotonic()  # the first run also filled the caches
    ended(begun(data, folder / "calm-again", first, settings), None)
    length, expected, done = time.monotonic() - start, bits(folder / "calm"), 0
    seconds: list[float] = []
    right = rounds = 0
    while done < kills:
        rounds += 1
        out = folder / f"killed-{rounds}"
        while True:
            first.unlink(missing_ok=True)
            resumed = (out / "last").is_dir()
            after = draw.uniform(0.05, 0.8 * length) if done < kills else None
            over = ended(begun(data, out, first, settings), after)
            if resumed and first.exists():
                seconds.append(float(first.read_text()))
            done += not over
            if over or (out / "summary.json").exists():  # killed after it had finished
                break
        right += bits(out) == expected
        shutil.rmtree(out)
    slowest = f"{max(seconds):.2f}" if seconds else "-"
    return f"{done} kills, {right} of {rounds} runs equal to the calm one; slowest first step {slowest} s"


def main() -> None:
    """Reads the words of the command."""
    found: dict[str, Callable[[Path], Any]] = {door.__name__: door for door in doors.DOORS}
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--kills", type=int, default=25)
    words.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--doors", nargs="+", default=[*found, "parquet-blocks", "shards-blocks"])
    words.add_argument("--seed", type=int, default=0)
    asked = words.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(asked.seed)
    patch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory() as temporary:
        patch.setenv("VITRAL_CACHE", f"{temporary}/cache")
        root = doors.pictures(Path(temporary))
        with data_hub(doors.hub_files(root), Path(temporary, "hub"), patch):
            for name in asked.doors:
                try_door(name, found[name.removesuffix("-blocks")], root, asked, draw)


def try_door(name: str, door: Callable[[Path], Any], root: Path, asked: Any, draw: random.Random) -> None:
    """Prints a line for each number of workers."""
    data = door(root)
    sampling = "blocks" if name.endswith("-blocks") else "shuffled"
    for workers in asked.workers:
        folder = root / f"{name}-{workers}"
        folder.mkdir()
        line = tried(data, folder, asked.kills, draw, {**SETTINGS, "sampling": sampling, "workers": workers})
        print(f"{name}, {workers} workers: {line}", flush=True)


if __name__ == "__main__":
    main()
