"""What the tests of several processes share: how they are started, and what of two runs has to be equal."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error::UserWarning:vitral,error::FutureWarning:vitral",
}

# Every draw is on.
ALL_THAT_IS_RANDOM: dict[str, Any] = {
    "mixup": 0.3, "cutmix": 0.5, "dropout": 0.1, "drop_path": 0.3, "rand_augment": 7,
    "rand_augment_share": 0.5, "three_augment": True, "color_jitter": 0.3, "erasing": 0.5, "repeats": 3,
    "clip_norm": 0.5,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "model": "Conv+ViT-Pico/4", "img_size": 16, "workers": 0, "device": "cpu", "precision": "float32",
    "seed": 3, "keep_state": True,
}  # fmt: skip


def words(**settings: Any) -> list[str]:
    """Settings as a command line has them."""
    return [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in settings.items()
    ]


def torchrun(processes: int, *options: str) -> list[str]:
    """The command that starts so many processes of what follows; of one without options, Python's own."""
    if processes == 1 and not options:
        return [sys.executable]
    elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    return [sys.executable, *elastic]


def started(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
    """A command of this checkout, ended."""
    path = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, **kwargs)


def launch(processes: int, data: Path, *runs: dict[str, Any]) -> str:
    """Carry out runs one after the other in one start (`sharded_runs.py`); gives what was said of errors."""
    program = [str(Path(__file__).with_name("sharded_runs.py")), json.dumps([str(data), runs])]
    done = started([*torchrun(processes), *program])
    assert done.returncode == 0, done.stderr
    return done.stderr


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "state.pt", weights_only=True)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a state, in the order of their names: one that was read is in another order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    children = value if isinstance(value, list) else ()
    return [tensor for child in children for tensor in tensors(child)]


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of the weights, of the average and of the optimizer's state."""
    found = []
    for part in ("model", "average", "optimizer"):
        ours, theirs = (
            torch.cat([of.double().flatten() for of in tensors(state(run)[part])]) for run in (one, other)
        )
        found.append(float((ours - theirs).norm() / theirs.norm()))
    return max(found)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, average, optimizer's state and metrics are equal to the bit."""
    for file in ("model.safetensors", "last/model.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    states = [state(run) for run in (one, other)]
    for part in ("model", "average", "optimizer"):
        pairs = [tensors(of[part]) for of in states]
        assert len(pairs[0]) > 20
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True)), part
    clocks = {"seconds": 0, "time": {}}
    assert states[0]["state"] | clocks == states[1]["state"] | clocks
    assert judged(one) == judged(other)


def judged(run: Path) -> list[dict[str, Any]]:
    """All that a run wrote down of its course, but the time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines.append(json.loads((run / "summary.json").read_text()))
    # What was learnt from since the last evaluation is counted anew by a process that takes a run up.
    forgotten = {"seconds", "time", "train_loss", "train_accuracy"}
    return [{name: value for name, value in line.items() if name not in forgotten} for line in lines]
