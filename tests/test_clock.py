"""Where a run's time goes is counted by hand, adds up, and survives a resume."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.image_data import open_data
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.training import clock as module
from vitral.training.clock import LOADING, PARTS, Clock, TimeSpent
from vitral.training.loop import train


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that loads and alters each image for each batch."""
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=2, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    given = {"model": str(tmp_path / "base"), "batch_size": 6, "rand_augment": 5, "seed": 3, "device": "cpu"}
    return {**given, "workers": 0, "keep_state": True}


def test_what_is_within_another_part_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 15.0, 16.0, 20.0, 21.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clock.of("evaluating"), clock.of("opening"):  # from 10 and from 12 to 15; the outer one to 16
        pass
    with pytest.raises(ValueError, match="no"), clock.of("evaluating"):
        raise ValueError("no")
    clock.add("decoding", 0.25)
    assert clock.record() == {"decoding": 0.25, "evaluating": 2.0 + 1.0 + 1.0, "opening": 3.0}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_where_its_time_went_over_a_resume(
    image_folder: Path, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    data, folder = open_data(image_folder), tmp_path / "run"
    begun = time.perf_counter()
    train(data, folder, Recipe(**tiny, epochs=2))
    first = TimeSpent.of(json.loads((folder / "summary.json").read_text()))
    lines = records(folder)
    train(data, folder, Recipe(epochs=3), resume=True)
    wall = time.perf_counter() - begun
    last = TimeSpent.of(json.loads((folder / "summary.json").read_text()))
    assert first is not None
    assert last is not None
    assert set(last.parts) == set(PARTS) - {"choosing"}
    # The resume goes on from its checkpoint; the first session's conclusion came after that.
    for part in ("stepping", "evaluating", "saving"):
        assert last.parts[part] > lines[-1]["time"][part] > 0
        assert first.parts[part] >= lines[-1]["time"][part]
    assert last.total == pytest.approx(sum(last.parts.values()) + last.other)
    assert last.other >= 0
    assert sum(last.parts.values()) <= wall
    # Loaded in this process, decoding and augmentation are what is waited for.
    assert last.parts["waiting"] >= last.decoding + last.altering - 0.002
    assert min(last.decoding, last.altering) > 0
    earlier = [TimeSpent.of(line) for line in lines]
    assert [spent.parts["stepping"] for spent in earlier if spent] == sorted(
        spent.parts["stepping"] for spent in earlier if spent
    )
    assert set(lines[0]["time"]) <= {*PARTS, *LOADING}


def test_a_run_of_before_has_no_times() -> None:
    assert TimeSpent.of({"step": 3, "seconds": 2.0}) is None
    assert TimeSpent.of({"seconds": 2.0, "time": None}) is None


def test_workers_count_what_they_decode(image_folder: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    train(open_data(image_folder), tmp_path / "run", Recipe(**{**tiny, "workers": 1}, epochs=1))
    spent = TimeSpent.of(records(tmp_path / "run")[-1])
    assert spent is not None
    assert min(spent.decoding, spent.altering) > 0
