"""A sharded run computes what one process does, and goes on with any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import write_images
from vitral.checkpoints.folder import load_checkpoint
from vitral.recipes.schema import Batches
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.world import World, share_of
from vitral.training.muon import Together, orthogonalize
from vitral.training.run import refuse_misfit
from vitral.training.sharding import shard

# Every draw is on; five steps an epoch of 72 images to train on.
SETTINGS: dict[str, Any] = {
    "model": "Conv+ViT-Pico/4", "img_size": 16, "whiten": False, "optimizer": "muon", "steps": 50,
    "batch_size": 12, "parts": 2, "workers": 0, "device": "cpu", "precision": "float32", "seed": 3,
    "keep_state": True, "checkpoint_steps": 7, "mixup": 0.3, "cutmix": 0.5, "dropout": 0.1, "drop_path": 0.3,
    "rand_augment": 7, "clip_norm": 0.5,
}  # fmt: skip


def launch(processes: int, data: Path, *runs: dict[str, Any]) -> None:
    command = [sys.executable, "-W", "error::FutureWarning:vitral"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [str(Path(__file__).with_name("sharded_runs.py")), json.dumps([str(data), runs])]
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), here) if part)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([*command, *program], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr


def new(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {key: changes.pop(key) for key in ("stop", "in_pieces") if key in changes}
    return {"folder": str(folder), "settings": {**SETTINGS, **changes}, **own}


def further(folder: Path, shard: bool | None = None, **own: Any) -> dict[str, Any]:
    settings = {} if shard is None else {"shard": shard}
    return {"folder": str(folder), "settings": settings, "resume": True, **own}


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "state.pt", weights_only=True)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.double().flatten()]
    if isinstance(value, dict):  # a state that was read is in another order
        value = [value[key] for key in sorted(value)]
    children = value if isinstance(value, list) else ()
    return [tensor for child in children for tensor in tensors(child)]


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of the weights, of the average and of the optimizer's state."""
    found = []
    for part in ("model", "average", "optimizer"):
        ours, theirs = (torch.cat(tensors(state(run)[part])) for run in (one, other))
        found.append(float((ours - theirs).norm() / theirs.norm()))
    return max(found)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", {"ant": 30, "bee": 30, "cat": 30})


def test_a_sharded_run_computes_what_one_process_does(data: Path, tmp_path: Path) -> None:
    """Twelve steps of Muon and AdamW; under DDP, where the processes share Muon's matrices, the same bits."""
    launch(
        2,
        data,
        new(tmp_path / "sharded", steps=12, shard=True, checkpoint_layers=True),
        new(tmp_path / "dealt", steps=12),
    )
    launch(1, data, new(tmp_path / "one", steps=12))
    assert difference(tmp_path / "sharded", tmp_path / "one") < 1e-6
    assert difference(tmp_path / "dealt", tmp_path / "one") == 0
    model = load_checkpoint(tmp_path / "sharded").model
    assert type(next(model.parameters()).data) is Tensor


@pytest.mark.slow
def test_saved_by_any_number_of_processes_it_goes_on_with_any_other(data: Path, tmp_path: Path) -> None:
    """Fifty steps in five sessions: sharded, one process, replicas, sharded, one process."""
    hops, back = tmp_path / "hops", tmp_path / "back"
    launch(
        2,
        data,
        new(tmp_path / "sharded", shard=True),
        new(hops, shard=True, stop=9, in_pieces=True),
        new(back, stop=9),
    )
    steps = sorted(folder.name for folder in (hops / "checkpoints").glob("step-*"))
    assert steps == ["step-7", "step-9"]
    assert not (hops / "checkpoints/state.pt").exists()
    launch(1, data, new(tmp_path / "one"), further(hops, stop=17), further(back, stop=17))
    assert not list((hops / "checkpoints").glob("step-*"))
    launch(
        2,
        data,
        further(hops, shard=False, stop=24),
        further(hops, shard=True, stop=30, in_pieces=True),
        further(hops, stop=37, in_pieces=True),
        further(hops, stop=40),
        further(back, stop=25),
        further(back, shard=True),
    )
    launch(1, data, further(hops))
    for run in (tmp_path / "sharded", hops, back):
        assert difference(run, tmp_path / "one") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "schedule_free"])
def test_every_optimizer_is_sharded(optimizer: str, data: Path, tmp_path: Path) -> None:
    if package := {"lion": "lion_pytorch", "schedule_free": "schedulefree"}.get(optimizer):
        pytest.importorskip(package)
    settings = {"steps": 20, "optimizer": optimizer}
    stopped = new(tmp_path / "sharded", **settings, shard=True, stop=9, in_pieces=True)
    launch(2, data, stopped, further(tmp_path / "sharded"))
    launch(1, data, new(tmp_path / "one", **settings))
    assert difference(tmp_path / "sharded", tmp_path / "one") < 1e-6


@pytest.mark.slow
def test_with_damaged_images_in_one_process_the_pieces_are_as_many(data: Path, tmp_path: Path) -> None:
    """Three passes a part; where images are lost in one process, it still takes as many as the other."""
    for place, image in enumerate(sorted(data.rglob("*.png"))[:60]):
        if place % 3 == 0:
            image.write_bytes(b"damage")
    settings = {"steps": 12, "accumulate": 3, "max_damaged": 0.9}
    launch(2, data, new(tmp_path / "sharded", **settings, shard=True))
    launch(1, data, new(tmp_path / "one", **settings))
    assert difference(tmp_path / "sharded", tmp_path / "one") < 1e-6


# --- Without processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_matrices_are_orthogonalized_as_the_parts_divide_them(count: int) -> None:
    matrices = [torch.randn(6, 4) if place % 2 else torch.randn(4, 6) for place in range(count)]
    rates_G = torch.linspace(-1, -2, count)
    found = Together(World(), parts=4).updates(matrices, [matrix.shape for matrix in matrices], rates_G)
    for matrix, update, rate in zip(matrices, found, rates_G, strict=True):
        expected = orthogonalize((matrix if len(matrix) == 4 else matrix.mT)[None])[0] * rate
        torch.testing.assert_close(update, expected if len(matrix) == 4 else expected.mT)


def test_each_part_s_matrices_are_one_stack() -> None:
    """The bits are those of a stack for each part, whoever computes it."""
    stacked = torch.randn(7, 4, 6)
    found = Together(World(), parts=3).updates(
        [*stacked], [matrix.shape for matrix in stacked], torch.ones(7)
    )
    parts = [share_of(part, 3, 7) for part in range(3)]
    expected = torch.cat([orthogonalize(stacked[part.start : part.stop]) for part in parts])
    assert torch.equal(torch.stack([*found]), expected)


def test_statistics_of_batches_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(VitralError, match=r"shard=true cannot train BatchNorm2d \(1\), whose statistics"):
        shard(model, Placement.choose("cpu", "float32"))


def test_unequal_shares_are_refused() -> None:
    recipe: Any = SimpleNamespace(batches=Batches(batch_size=12, small_images=0.0, parts=3, shard=True))
    with pytest.raises(VitralError, match="shard=true needs as many parts in every process, and parts=3"):
        refuse_misfit(recipe, 2)
    refuse_misfit(recipe, 3)
