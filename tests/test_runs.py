"""`vitral runs` and `vitral sweep`: what the files of runs tell, and several runs in a row."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import StopAt, write_images
from tests.test_cli import Vitral, assert_failed_in_one_line
from tests.test_cli import vitral as vitral  # the fixture
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.image_data import open_data
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.runtime.lock import is_locked, locked
from vitral.training.loop import train
from vitral.training.runs import look_at, own_settings, survey
from vitral.training.sweep import Plan, Range, named, sweep


@pytest.fixture
def base(tmp_path: Path) -> Recipe:
    return recipe_in(tmp_path)


def recipe_in(tmp_path: Path) -> Recipe:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    return Recipe(
        model=str(tmp_path / "base"), steps=4, batch_size=7, workers=0, device="cpu", precision="float32",
        probe_head=False,
    )  # fmt: skip


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs and a stopped one."""
    place = tmp_path_factory.mktemp("trained")
    folder, base = place / "runs", recipe_in(place)
    data = open_data(str(write_images(place / "images", {"ant": 12, "bee": 12, "cat": 12})))
    train(data, folder / "a", base)
    train(data, folder / "deep" / "b", base.changed(learning_rate=1e-2, seed=1))
    train(data, folder / "c", base.changed(steps=9), listeners=[StopAt(2)])
    return folder


def by_name(folder: Path) -> dict[str, Any]:
    return {Path(run.name).name: run for run in survey([folder])}


def test_each_run_is_told_with_its_state_and_figures(runs: Path) -> None:
    found = by_name(runs)
    assert {name: run.state for name, run in found.items()} == {
        "a": "finished", "b": "finished", "c": "stopped"
    }  # fmt: skip
    for name in ("a", "deep/b"):
        run = found[Path(name).name]
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((runs / name / "summary.json").read_bytes())
        assert run.score == max(line["val_top1"] for line in lines) == summary["val_top1"]
        assert (run.steps, run.score_name) == (4, "top1")
    assert found["c"].why == "goes on with --resume"


def test_what_differs_is_what_the_recipes_do_not_share(runs: Path) -> None:
    found = survey([runs], "name")
    assert [Path(run.name).name for run in found] == ["a", "c", "b"]
    own = own_settings(found)
    assert [set(of) for of in own] == [{"learning_rate", "seed", "steps"}] * 3
    assert own[2] == {"learning_rate": 0.01, "seed": 1, "steps": 4}


def test_the_order_is_by_score_the_best_first(runs: Path) -> None:
    scores = [run.score for run in survey([runs])]
    assert scores == sorted(scores, key=lambda score: -1 if score is None else score, reverse=True)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("checkpoints/state.pt", b"PK half", "its checkpoint is damaged"),
        ("checkpoints/run.json", b"{", "checkpoints/run.json is damaged"),
        ("recipe.toml", None, "recipe.toml is gone"),
    ],
)
def test_a_broken_run_says_why(runs: Path, file: str, content: bytes | None, why: str) -> None:
    place = runs / "c" / file
    place.unlink() if content is None else place.write_bytes(content)
    run = by_name(runs)["c"]
    assert run.state == "broken"
    assert run.why.startswith(why)


def test_a_finished_run_without_its_weights_is_broken(runs: Path) -> None:
    (runs / "a" / "model.safetensors").unlink()
    assert (by_name(runs)["a"].state, by_name(runs)["a"].why) == ("broken", "model.safetensors is gone")


def test_a_run_that_a_process_works_on_is_running(runs: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vitral.runtime.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    lock = runs / "c" / ".lock"
    other = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert by_name(runs)["c"].state == "running"
    finally:
        other.kill()
        other.wait()
        other.stdout.close() if other.stdout else None
    assert by_name(runs)["c"].state == "stopped"


def test_to_look_at_a_lock_neither_takes_nor_drops_it(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    assert not is_locked(file)
    assert not file.exists()
    with locked(file):
        assert is_locked(file)
        code = f"from vitral.runtime.lock import *; print(is_locked(Path({str(file)!r})))"
        for _ in range(2):  # our own look has not dropped it
            assert (
                subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
                == "True\n"
            )
    assert not is_locked(file)


def test_the_command_prints_a_row_a_run(vitral: Vitral, runs: Path) -> None:
    printed = vitral("runs", runs)
    assert printed.status == 0
    rows = [line for line in printed.out.splitlines() if "finished" in line or "stopped" in line]
    assert len(rows) == 3
    found = json.loads(vitral("runs", runs, "--json").out)["runs"]
    assert {run["state"] for run in found} == {"finished", "stopped"}
    assert all(run["differs"].keys() == {"learning_rate", "seed", "steps"} for run in found)
    (runs / "a" / "model.safetensors").unlink()
    assert "model.safetensors is gone" in vitral("runs", runs).out


def test_where_no_run_lies_that_is_said(vitral: Vitral, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert_failed_in_one_line(vitral("runs", tmp_path / "none"), "no run lies in")
    assert_failed_in_one_line(vitral("runs", tmp_path / "nowhere"), "is no folder; name one that runs lie in")


# --- Sweeps ----------------------------------------------------------------------------------------


def test_a_plan_is_read_from_words() -> None:
    plan = Plan.of(
        [
            "learning_rate=1e-4,3e-4",
            "img_size=[32,48],64",
            "schedule=cosine,linear",
            "minutes=5",
            "betas=[0.9,0.99]",
        ]
    )
    assert plan.fixed == {"minutes": 5, "betas": [0.9, 0.99]}
    assert plan.choices == {
        "learning_rate": [1e-4, 3e-4], "img_size": [[32, 48], 64], "schedule": ["cosine", "linear"]
    }  # fmt: skip
    assert len(plan.grid()) == 8
    assert plan.grid()[0] == {"learning_rate": 1e-4, "img_size": [32, 48], "schedule": "cosine"}
    assert Plan.of(["track=tensorboard,mlflow", "seed=1,2"]).choices == {"seed": [1, 2]}
    assert Plan.of(["weight_decay=0..0.3", "batch_size=16..256"]).choices == {
        "weight_decay": Range(0, 0.3, False), "batch_size": Range(16, 256, True)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["minutes=5"], "nothing to try"),
        (["seed=1,2", "what"], "'what' is not a setting"),
        (["learning_rate=1e-2..1e-4"], "from the smaller to the larger"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(VitralError, match=message):
        Plan.of(words)


def test_a_range_has_no_grid() -> None:
    with pytest.raises(VitralError, match="is a range, of which --random N takes N points"):
        Plan.of(["learning_rate=1e-4..1e-2"]).grid()


def test_scattered_points_fill_a_range_evenly_and_stay_when_there_are_more() -> None:
    plan = Plan.of(["learning_rate=1e-4..1e-2", "schedule=cosine,linear"])
    points = plan.scattered(64, seed=0)
    logs = np.log10([point["learning_rate"] for point in points])
    assert np.histogram(logs, bins=4, range=(-4, -2))[0].tolist() == pytest.approx([16] * 4, abs=1)
    assert abs(sum(point["schedule"] == "linear" for point in points) - 32) <= 1
    assert plan.scattered(10, seed=0) == points[:10]
    assert plan.scattered(10, seed=1) != points[:10]


def test_a_sweep_goes_on_where_it_stopped_and_takes_over_finished_runs(
    base: Recipe, image_folder: Path, tmp_path: Path
) -> None:
    out, trials = tmp_path / "sweep", Plan.of(["learning_rate=1e-3,1e-2"]).grid()
    first = list(sweep(str(image_folder), out, trials, base, listeners=lambda: [StopAt(2)]))
    assert [trial.failure for trial in first] == ["stopped"]
    told: list[str] = []
    done = list(sweep(str(image_folder), out, trials, base, tell=told.append))
    assert [trial.run.state for trial in done if trial.run] == ["finished"] * 2
    assert len(told) == 2
    more = Plan.of(["learning_rate=1e-3,1e-2,3e-2"]).grid()
    told.clear()
    assert len(list(sweep(str(image_folder), out, more, base, tell=told.append))) == 3
    assert told == ["run 3 of 3: learning_rate=0.03"]
    alone = train(open_data(str(image_folder)), tmp_path / "alone", base.changed(learning_rate=1e-3))
    assert done[0].run is not None
    assert alone.val_top1 == done[0].run.score
    with pytest.raises(VitralError, match="was begun with steps=4, and you ask for steps=5"):
        list(sweep(str(image_folder), out, trials, base.changed(steps=5)))


def test_a_run_that_fails_does_not_end_the_sweep(base: Recipe, image_folder: Path, tmp_path: Path) -> None:
    trials = [{"batch_size": 1000}, {"batch_size": 7}]
    done = list(sweep(str(image_folder), tmp_path / "sweep", trials, base))
    assert done[0].run is None
    assert "batch_size=1000 is more than" in (done[0].failure or "")
    assert done[1].failure is None


def test_a_trial_with_an_unknown_setting_is_refused_before_any(
    base: Recipe, image_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(VitralError, match="there is no setting 'learning_rat'"):
        list(sweep(str(image_folder), tmp_path / "sweep", [{"seed": 1}, {"learning_rat": 1}], base))
    assert not (tmp_path / "sweep").exists()


def test_the_command_ends_in_one_table(
    vitral: Vitral, base: Recipe, image_folder: Path, tmp_path: Path
) -> None:
    words = [f"{name}={value}" for name, value in base.given.items() if name != "probe_head"]
    result = vitral("sweep", image_folder, "--out", tmp_path / "s", "learning_rate=1e-3,1e-2", *words)
    assert result.status == 0, result.err
    assert "2 of 2 runs, the best first" in result.out
    assert "learning_rate=0.001" in result.out
    assert f"best: {tmp_path / 's'}" in result.out.replace("\n", "")
    assert look_at(tmp_path / "s" / named({"learning_rate": 0.01})).state == "finished"
