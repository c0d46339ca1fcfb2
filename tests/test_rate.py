"""`vitral rate`: the rates of the steps, the suggestion on curves that are known, and nothing left behind."""

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_images
from tests.test_cli import Vitral, assert_failed_in_one_line
from tests.test_cli import vitral as vitral  # the fixture
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.training.rate import RateTest, find_rate
from vitral.training.run import Run


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with images and a small model."""
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    write_images(tmp_path / "images", {"ant": 12, "bee": 12, "cat": 12})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**settings: object) -> Recipe:
    given = {"model": "base", "batch_size": 7, "workers": 0, "device": "cpu", "precision": "float32"}
    return Recipe(**{**given, "probe_head": False, **settings})


def words() -> list[str]:
    return ["model=base", "batch_size=7", "workers=0", "device=cpu", "probe_head=false"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def curve(losses_of_log: "np.ndarray", planned: int = 141) -> RateTest:
    return RateTest(np.geomspace(1e-6, 10, planned), losses_of_log, planned, 1e-3)


# --- The steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"learning_rate_batch": 14, "warmup": 0.5, "schedule": "cosine"}])
def test_each_step_takes_the_rate_of_a_sequence_by_hand(
    desk: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    taken = []
    step = Run.step

    def watched(run: Run, *batches: object, **how: object) -> object:
        taken.append(run.learning_rate)
        return step(run, *batches, **how)  # pyrefly: ignore[bad-argument-type]

    monkeypatch.setattr(Run, "step", watched)
    found = find_rate("images", recipe(optimizer="sgd", **settings), 29)
    # 28 steps from 1e-6 to 10: each is 10 ** (1/4) times the one before. A batch is half of what it is for.
    by_hand = [1e-6, 1.7783e-6, 3.1623e-6, 5.6234e-6, 1e-5, 1.7783e-5, 3.1623e-5, 5.6234e-5, 1e-4]
    scale = 0.5 if settings else 1.0
    assert taken[:9] == pytest.approx([scale * rate for rate in by_hand], rel=1e-4)
    assert found.rates[:9] == pytest.approx(by_hand, rel=1e-4)
    assert found.planned == 29
    assert len(found.losses) == len(found.rates) == len(found.means)


def test_the_first_losses_are_those_of_a_model_that_learns_nothing(desk: Path) -> None:
    found = find_rate("images", recipe(), 40)
    assert found.losses[0] == pytest.approx(math.log(3), rel=0.1)  # a drawn head of three classes
    again = find_rate("images", recipe(), 40)
    assert again.losses.tolist() == found.losses.tolist()


def test_a_lost_loss_ends_the_test(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0] * 30 + [math.nan])
    monkeypatch.setattr(Run, "step", lambda *_, **__: [torch.tensor(next(losses))])
    found = find_rate("images", recipe(), 60)
    assert (len(found.rates), found.diverged) == (30, True)
    losses = iter([1.0] * 30 + [1e3] * 30)
    assert len(find_rate("images", recipe(), 60).rates) == 30
    losses = iter([math.inf])
    with pytest.raises(VitralError, match="the loss is lost in the first steps"):
        find_rate("images", recipe(), 60)


def test_nothing_is_changed_on_disk_or_in_torch(desk: Path) -> None:
    before, drawn = contents(desk), torch.random.get_rng_state()
    find_rate("images", recipe(), 20)
    assert contents(desk) == before
    assert not (desk / "rate-test").exists()
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_what_a_range_test_cannot_take_is_refused() -> None:
    with pytest.raises(VitralError, match="name the one whose learning rate"):
        find_rate("images", Recipe(model="auto", minutes=1))


# --- The suggestion ------------------------------------------------------------------------------


def test_the_steepest_point_of_a_known_curve_is_found() -> None:
    """A logistic curve of log10(rate) is steepest at its middle; its mean a bit later."""
    logs = np.linspace(-6, 1, 141)
    for middle in (-4.0, -2.5, -1.0):
        found = curve(2.3 - 2 / (1 + np.exp(-(logs - middle) / 0.3)))
        assert found.suggestion is not None
        # The mean goes back over a tenth of the steps, which is 0.7 of these decades.
        assert middle <= math.log10(found.suggestion) <= middle + 0.75


def test_the_suggestion_does_not_follow_the_number_of_steps() -> None:
    rates = []
    for planned in (71, 141, 701):
        logs = np.linspace(-6, 1, planned)
        rates.append(curve(2.3 - 2 / (1 + np.exp(-(logs + 3) / 0.3)), planned).suggestion)
    assert max(map(float, rates)) <= 1.3 * min(map(float, rates))  # pyrefly: ignore[bad-argument-type]


def test_the_mean_is_adams(desk: Path) -> None:
    """By hand, memory 2: (1, then (1/4 + 3/2) / (3/4), ...)."""
    found = RateTest(np.array([1.0, 2, 3]), np.array([1.0, 3, 5]), 20, 1.0)
    assert found.memory == 2
    assert found.means == pytest.approx([1, 7 / 3, (1 / 8 + 3 / 4 + 5 / 2) / (7 / 8)])


def test_a_curve_that_only_wavers_or_rises_gets_no_suggestion() -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 141)
    for losses in (2.3 + noise, np.linspace(1, 3, 141), np.ones(141)):
        found = curve(losses)
        assert found.suggestion is None
        assert not found.alike
        assert found.conclusion().startswith("nothing to suggest")
        assert "learning_rate=0.001" in found.conclusion()


def test_a_rate_near_the_recipes_own_is_said_to_be_alike() -> None:
    logs = np.linspace(-6, 1, 141)
    near, far = (curve(2.3 - 2 / (1 + np.exp(-(logs - middle) / 0.3))) for middle in (-3.3, -1.5))
    assert near.alike
    assert "cannot tell them apart" in near.conclusion()
    assert not far.alike
    assert f"learning_rate={far.suggestion:g} may do better" in far.conclusion()


# --- The command ---------------------------------------------------------------------------------


def test_the_command_prints_a_table_that_fits_and_one_suggestion(
    vitral: Vitral, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RateTest, "steepest", 11)
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "80")
    result = vitral("rate", "images", *words(), "--steps", "20", "--out", "curve.png")
    assert result.status == 0, result.err
    assert result.out.count("steepest fall") == 1
    assert result.out.count("may do") == 1
    table = result.out[: result.out.index("learning_rate=")].splitlines()
    assert max(map(len, table)) <= 80
    assert (desk / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in desk.iterdir()} - {"cache"} == {"base", "images", "curve.png"}


def test_json_has_every_step(vitral: Vitral, desk: Path) -> None:
    result = vitral("rate", "images", *words(), "--steps", "20", "--json")
    told = json.loads(result.out)
    assert told["planned"] == 20
    assert set(told) == {"suggestion", "recipe", "alike", "planned", "diverged", "steps"}
    assert set(told["steps"][0]) == {"learning_rate", "loss", "mean"}


def test_what_is_wrong_is_told_before_any_step(vitral: Vitral, desk: Path) -> None:
    assert_failed_in_one_line(vitral("rate", "images", "learning_rat=1"), "there is no setting")
    assert_failed_in_one_line(vitral("rate", "nowhere"), "nowhere")
    assert vitral("rate", "images", "--steps", "3").status == 2
    assert vitral("rate", "images", "--out", "curve.txt").status == 2


def test_ctrl_c_ends_it_at_once_in_one_line(
    vitral: Vitral, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0.0

    def interrupted(*_: object, **__: object) -> None:
        nonlocal begun
        begun = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(Run, "step", interrupted)
    before = contents(desk)
    result = vitral("rate", "images", *words(), "--out", "curve.png")
    assert time.monotonic() - begun < 2
    assert result.status == 130
    assert result.err.splitlines() == ["vitral: interrupted"]
    assert contents(desk) == before
