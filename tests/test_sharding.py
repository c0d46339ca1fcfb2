"""A sharded run computes what one process does, and goes on with any number of processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import write_images
from tests.processes import ALL_THAT_IS_RANDOM, SMALL, assert_same_run, difference, launch, words
from vitral.checkpoints.folder import load_checkpoint
from vitral.data.image_data import open_data
from vitral.recipes.recipe import Recipe
from vitral.recipes.schema import Batches
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.world import World, share_of
from vitral.training.loop import train
from vitral.training.muon import Together, orthogonalize
from vitral.training.run import refuse_misfit
from vitral.training.sharding import shard, total_norm

# Six steps an epoch of 72 images to train on.
SETTINGS: dict[str, Any] = {
    **SMALL, **ALL_THAT_IS_RANDOM, "whiten": False, "optimizer": "muon", "steps": 50, "batch_size": 12,
    "parts": 2, "checkpoint_steps": 7, "threads": 1,
}  # fmt: skip


def new(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {key: changes.pop(key) for key in ("stop", "in_pieces") if key in changes}
    return {"folder": str(folder), "settings": {**SETTINGS, **changes}, **own}


def further(folder: Path, shard: bool | None = None, **own: Any) -> dict[str, Any]:
    settings = {} if shard is None else {"shard": shard}
    return {"folder": str(folder), "settings": settings, "resume": True, **own}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(
        tmp_path_factory.mktemp("data") / "images", {"ant": 30, "bee": 30, "cat": 20, "dog": 10}
    )


def test_two_processes_compute_what_one_does(data: Path, tmp_path: Path) -> None:
    """In one start: what does not fit is said once; replicas give the bits of one process; FSDP2 its numbers.

    Muon deals its matrices out among replicas, and AdamW has the rest.
    """
    train(open_data(str(data), seed=SETTINGS["seed"]), tmp_path / "one", Recipe(**{**SETTINGS, "steps": 8}))
    command = ["train", str(data), "--out"]
    said = launch(
        2,
        data,
        {
            "command": [*command, str(tmp_path / "misfit"), *words(**SMALL), "parts=3", "batch_size=8"],
            "status": 1,
        },
        {"command": [*command, str(tmp_path / "two"), *words(**{**SETTINGS, "steps": 8})], "status": 0},
        new(tmp_path / "sharded", steps=8, shard=True, checkpoint_layers=True),
    )
    lines = [line for line in said.splitlines() if line.startswith("vitral:")]
    assert lines == ["vitral: batch_size=8 cannot be divided into parts=3; take batch_size=6 or 9"]
    assert not (tmp_path / "misfit").exists()
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert difference(tmp_path / "sharded", tmp_path / "one") < 1e-6
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
    """To the bit but for SGD, whose fused kernel rounds in its own way and takes no divided tensors."""
    if package := {"lion": "lion_pytorch", "schedule_free": "schedulefree"}.get(optimizer):
        pytest.importorskip(package)
    settings = {"steps": 20, "optimizer": optimizer}
    stopped = new(tmp_path / "sharded", **settings, shard=True, stop=9, in_pieces=True)
    launch(2, data, stopped, further(tmp_path / "sharded"))
    launch(1, data, new(tmp_path / "one", **settings))
    found = difference(tmp_path / "sharded", tmp_path / "one")
    assert found < 1e-6 if optimizer == "sgd" else found == 0


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


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_a_norm_does_not_follow_how_tensors_are_divided(pieces: int) -> None:
    tensors = [torch.randn(21, 30), torch.randn(14), torch.randn(7, 3, 5)]
    divided = [piece for tensor in tensors for piece in tensor.chunk(pieces)]
    norm = total_norm(divided)
    assert torch.equal(norm, total_norm(tensors))
    assert norm == torch.cat([tensor.double().flatten() for tensor in tensors]).norm().float()


def test_statistics_of_batches_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(VitralError, match=r"shard=true cannot train BatchNorm2d \(1\), whose statistics"):
        shard(model, Placement.choose("cpu", "float32"))


def test_unequal_shares_are_refused() -> None:
    recipe: Any = SimpleNamespace(batches=Batches(batch_size=12, small_images=0.0, parts=3, shard=True))
    with pytest.raises(VitralError, match="shard=true needs as many parts in every process, and parts=3"):
        refuse_misfit(recipe, 2)
    refuse_misfit(recipe, 3)
