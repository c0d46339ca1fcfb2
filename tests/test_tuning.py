"""A run from trained weights never ends below its start: the head's start, the watched loss, trials."""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_images
from tests.test_train import Recorder, base, copied, data, metrics, opened, small
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.image_data import ImageData, open_data
from vitral.data.randomness import seeded
from vitral.data.subsets import few_shot, in_turns
from vitral.evaluation.evaluation import Evaluation
from vitral.evaluation.probing import head_start
from vitral.evaluation.probing.linear import PENALTIES, LinearHead
from vitral.images.preprocess import Preprocess
from vitral.inference import features
from vitral.inference.classifier import Classifier
from vitral.inference.features import extract
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.runtime.stopping import Stopped, StopSignal, stop_signal
from vitral.training import choose
from vitral.training.adapt import merged, put_into
from vitral.training.budget import Budget
from vitral.training.choose import Trial, Way, extrapolated
from vitral.training.loop import train
from vitral.training.loss_watch import LossWatch, Window
from vitral.training.parts import OURS
from vitral.training.run import Run
from vitral.training.validation import evaluate_split

__all__ = ["base", "data"]  # fixtures


# --- The start is the first candidate ------------------------------------------------------------


def test_a_run_that_only_gets_worse_ends_with_its_start(base: str, data: ImageData, tmp_path: Path) -> None:
    recipe = small(base, probe_head=True, learning_rate=10.0, warmup=0.0, ema_decay=0.0, steps=3)
    recorder = Recorder()
    summary = train(data, tmp_path / "run", recipe, listeners=[recorder])
    first = metrics(tmp_path / "run")[0]
    assert summary.best_step == 0
    assert (first["step"], first["train_loss"], first["val_top1"]) == (0, None, summary.val_top1)
    assert f"{summary.val_top1:.1%}" in recorder.messages[1]
    begun = load_checkpoint(tmp_path / "run").model
    kept = load_checkpoint(base).model
    torch.testing.assert_close(begun.layers[1].state_dict(), kept.layers[1].state_dict())


def test_a_run_from_scratch_is_not_judged_before_its_first_step(data: ImageData, tmp_path: Path) -> None:
    train(data, tmp_path / "run", small("ViT-Ti/8@16", steps=1))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]


class _Rates(Recorder):
    """The rate of each step, where each step takes a second of a clock that the test moves."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def step(self, run: Run) -> None:
        self.rates.append(run.optimizer.param_groups[0]["lr"])


def test_the_schedule_is_laid_over_what_the_start_leaves(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start of 30 of the 60 seconds: the warm-up still comes first, and the rate ends near 0."""
    now = [0.0]
    monkeypatch.setattr("vitral.training.budget.time.monotonic", lambda: now[0])

    def slow_start(*_: Any, **__: Any) -> None:
        now[0] += 30

    original = Budget.tick

    def second(budget: Budget, *seconds: float) -> None:
        now[0] += budget.state.step > 0 and not seconds  # after a step; before one it is told the time
        original(budget, *seconds)

    monkeypatch.setattr("vitral.training.start.fitted_head", slow_start)
    monkeypatch.setattr(Budget, "tick", second)
    rates = _Rates()
    recipe = small(base, steps=None, minutes=1, warmup=0.5, schedule="linear", probe_head=True)
    train(data, tmp_path / "run", recipe, listeners=[rates])
    highest = max(rates.rates)
    assert rates.rates[0] < 0.01 * highest
    assert 8 <= rates.rates.index(highest) <= 18  # half of the steps that remained
    assert rates.rates[-1] < 0.2 * highest


def test_evaluations_take_a_tenth_of_the_time_at_most(
    base: str, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = opened(data, small(base, steps=None, minutes=10)).budget
    budget.state.step = budget.steps_per_epoch
    budget.evaluation_seconds, budget.evaluated_at, budget.state.seconds = 5.0, 100.0, 120.0
    assert not budget.evaluation_is_due
    budget.state.seconds = 151.0
    assert budget.evaluation_is_due
    steps = opened(data, small(base)).budget
    steps.state.step, steps.evaluation_seconds = steps.steps_per_epoch, 1e9
    assert steps.evaluation_is_due


def test_where_time_is_short_fewer_images_validate_and_always_the_same(
    base: str, many: ImageData, tmp_path: Path
) -> None:
    recorder = Recorder()
    train(many, tmp_path / "run", small(base, steps=2, minutes=10), listeners=[recorder])
    assert "time for 256 of the 400 validation images" in recorder.messages
    run = opened(many, small(base, steps=2, minutes=10))
    run.state.val_images = 256
    assert run.loader("val").in_memory
    assert evaluate_split(run, "val").n == 256
    validated = run.loader("val").split.take(run.validated)
    assert np.bincount(validated.labels).tolist() == [128, 128]
    again = opened(many, small(base, steps=2, minutes=10)).loader("val").split
    assert list(again.names[:256]) == list(validated.names)


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """400 validation images, more than a run in minutes looks at, however fast the machine."""
    monkeypatch.setattr("vitral.training.validation._VALIDATION_SHARE", 0.0)
    write_images(tmp_path / "many", {"a": 400, "b": 400}, size=(16, 16))
    return open_data(str(tmp_path / "many"), val_fraction=0.5)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_start_is_judged_by_the_images_of_later_evaluations(
    in_memory: bool, base: str, many: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights have the same loss on the same images alone: hardly a step is taken."""
    monkeypatch.setattr("vitral.data.loader.fits_in_memory", lambda *_: in_memory)
    still = {"learning_rate": 1e-12, "warmup": 0.0, "probe_head": False}
    train(many, tmp_path / "run", small(base, steps=2, minutes=10, **still))
    start, *later = (record["val_loss"] for record in metrics(tmp_path / "run"))
    assert later == pytest.approx([start], rel=1e-5)


class _Validated(Recorder):
    """Knows the images that evaluations looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def epoch(self, run: Run, evaluation: Evaluation) -> None:
        self.names = set(run.loader("val").split.take(run.validated).names)
        assert evaluation.n == len(self.names)


@pytest.mark.parametrize(
    ("begun", "resumed", "images"),
    [({"steps": 2, "minutes": 10}, {"steps": 4, "minutes": None}, 256),
     ({"steps": 2}, {"steps": 4, "minutes": 10}, 400)],
    ids=["minutes-steps", "steps-minutes"],
)  # fmt: skip
def test_another_kind_of_budget_compares_scores_of_the_same_images(
    begun: dict[str, Any], resumed: dict[str, Any], images: int, base: str, many: ImageData, tmp_path: Path
) -> None:
    before, after = _Validated(), _Validated()
    train(many, tmp_path / "run", small(base, keep_state=True, **begun), listeners=[before])
    train(many, tmp_path / "run", Recipe(**resumed), resume=True, listeners=[after])
    assert after.names == before.names
    assert len(after.names) == images


# --- The head's start ----------------------------------------------------------------------------


def test_the_first_epoch_does_not_begin_with_the_images_that_the_head_knows() -> None:
    """NumPy's generators of 0 and of [0, 0] are one: a head's images came first, its loss then 'rose'."""
    assert np.array_equal(
        np.random.default_rng(0).permutation(9), np.random.default_rng([0, 0]).permutation(9)
    )
    orders = [np.random.default_rng(key).permutation(99) for key in (1, [0, 0], [0, 1])]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def classifier_of(base: str, data: ImageData) -> Classifier:
    run = opened(data, small(base))
    return Classifier(run.model, run.checkpoint.preprocess, data.classes, run.placement)


def test_turns_are_even_over_the_classes(data: ImageData) -> None:
    split = data.split("train")
    order = in_turns(split, seed=3)
    assert sorted(order) == list(range(len(split)))
    for first in range(0, len(split), 3):
        assert sorted(split.labels[order[first : first + 3]]) == [0, 1, 2]
    assert set(order[:12]) == {split.names.index(name) for name in few_shot(split, 4, seed=3).names}


def test_a_head_without_time_looks_at_one_batch_and_tries_one_penalty(
    base: str, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[float] = []
    fit = LinearHead.fit.__func__  # pyrefly: ignore[missing-attribute]

    def counted(cls: Any, vectors: Any, labels: Any, classes: int, penalty: float) -> LinearHead:
        fitted.append(penalty)
        time.sleep(0.05)
        return fit(cls, vectors, labels, classes, penalty)

    monkeypatch.setattr(LinearHead, "fit", classmethod(counted))
    start = head_start.fitted_head(classifier_of(base, data), data.split("train"), 0, seconds=1e-9)
    assert start is not None
    assert start.images == len(data.split("train"))  # fewer than a batch
    assert set(fitted) == {0.1}
    fitted.clear()
    assert head_start.fitted_head(classifier_of(base, data), data.split("train"), 0) is not None
    assert set(fitted) == set(PENALTIES)


def test_features_end_with_the_time_and_go_on_from_there(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitral.data.batches import DamageCount

    classifier, split = classifier_of(base, data), data.split("train")
    monkeypatch.setattr("vitral.inference.features._BATCH_SIZE", 8)
    damage = DamageCount(99, 1.0, print)
    part = extract(classifier, split, (-1,), tmp_path, until=0.0, damage=damage)
    assert len(part.labels) == 8
    rest = extract(classifier, split, (-1,), tmp_path, damage=damage)
    assert (len(rest.labels), rest.cached) == (len(split), 8)


def test_too_little_time_for_every_class_leaves_the_head_as_it_was_drawn(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitral.training.start.fitted_head", lambda *_, **__: None)
    recorder = Recorder()
    train(data, tmp_path / "run", small(base, probe_head=True, steps=1), listeners=[recorder])
    assert "begins at random" in recorder.messages[0]


# --- One signal ----------------------------------------------------------------------------------


def test_a_signal_ends_work_that_never_looks() -> None:
    def work(stop: StopSignal) -> None:
        with stop.raises():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with stop_signal() as stop, pytest.raises(Stopped):
        work(stop)
    assert stop.requested
    with pytest.raises(Stopped), StopSignal(requested=True).raises():
        raise AssertionError("is not reached")


def test_a_signal_in_the_start_stops_the_run_and_it_can_be_taken_up(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    recipe = small(base, probe_head=True, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("vitral.training.start.fitted_head", interrupted)
        begun = time.monotonic()
        summary = train(data, tmp_path / "run", recipe)
        assert time.monotonic() - begun < 5
    assert (summary.finished, summary.steps) == (False, 0)
    assert train(data, tmp_path / "run", recipe, resume=True).finished
    train(data, tmp_path / "never", recipe)
    ends = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("run", "never")]
    assert ends[0] == ends[1]


# --- The watch over the loss ---------------------------------------------------------------------


def test_a_rise_must_be_beyond_noise_and_large() -> None:
    low = Window(1.0, 0.01**2)
    assert Window(2.0, 0.01**2).rose_from(low)
    assert not Window(2.0, 0.5**2).rose_from(low)  # within its noise
    assert not Window(1.2, 0.01**2).rose_from(low)  # a fifth: the first steps of tuning often do that
    assert Window(math.nan, math.nan).rose_from(low)


def test_windows_are_a_quarter_epoch_and_go_on_after_a_save() -> None:
    watch = LossWatch(80, torch.device("cpu"))
    assert watch.window == 20
    assert LossWatch(4, torch.device("cpu")).window == 8
    losses = torch.cat([torch.linspace(1, 0.9, 20), torch.linspace(3, 3.1, 20)])
    found = []
    for index, loss in enumerate(losses):
        watch.add(loss)
        if index == 30:
            watch = LossWatch(80, torch.device("cpu")).load_state_dict(watch.state_dict())
            assert (
                LossWatch(40, torch.device("cpu")).load_state_dict(watch.state_dict()).state_dict()["losses"]
                == []
            )
        if watch.is_full:
            found.append(watch.rose())
    assert found == [False, True]
    assert watch.lowest is not None
    assert watch.lowest.mean == pytest.approx(0.95)


class _Spoiler(Recorder):
    """Ruins the model once, as a rate that is too high does."""

    def step(self, run: Run) -> None:
        super().step(run)
        if run.state.step == 16:
            with torch.no_grad():
                run.model.head.get_parameter("weight").mul_(-1000)


def test_a_run_that_blows_up_goes_back_to_the_best_weights_at_a_lower_rate(
    base: str, data: ImageData, tmp_path: Path
) -> None:
    spoiler = _Spoiler()
    recipe = small(base, probe_head=True, learning_rate=1e-4, warmup=0.0, schedule="constant", steps=33)
    summary = train(data, tmp_path / "run", recipe, listeners=[spoiler])
    told = [message for message in spoiler.messages if message.startswith("the loss rose from")]
    assert len(told) == 1
    assert "at 0.3 of the rate" in told[0]
    records = metrics(tmp_path / "run")
    assert summary.val_top1 == max(record["val_top1"] for record in records)
    assert records[-1]["learning_rate"] == pytest.approx(0.3e-4)
    assert records[-1]["val_loss"] < 0.1  # the ruined head is gone


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_going_back_makes_a_model_compute_what_the_best_does(
    trained: str, base: str, data: ImageData
) -> None:
    pytest.importorskip("peft")
    run = opened(data, small(base, trained=trained))
    best = merged(run.model)
    with torch.no_grad(), seeded(1):
        for parameter in run.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    put_into(run.model, best)
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(run.model.eval()(images), best.eval()(images))


def test_a_run_that_stays_at_chance_says_so_once(tmp_path: Path, data: ImageData) -> None:
    many = open_data(str(write_images(tmp_path / "many", {"a": 200, "b": 200, "c": 200})), val_fraction=0.5)
    recorder = Recorder()
    recipe = small("ViT-Pico/8@16", steps=9, batch_size=100, learning_rate=1e-12)
    train(many, tmp_path / "run", recipe, listeners=[recorder])
    told = [message for message in recorder.messages if "no better than chance" in message]
    assert len(told) == 1
    assert "learning_rate (now 1e-12)" in told[0]
    few = Recorder()  # six images tell nothing
    train(data, tmp_path / "few", small("ViT-Pico/8@16", steps=3, learning_rate=1e-12), listeners=[few])
    assert few.messages == []


# --- Which way is best ---------------------------------------------------------------------------


def trial(name: str, score: float, expected: float, images: int = 400, steps: int = 500) -> Trial:
    return Trial(Way(name, {}), score, images, expected, steps)


def test_the_first_way_is_taken_unless_another_is_better_by_more_than_chance() -> None:
    assert choose.choose([trial("all", 0.8, 0.85), trial("lora", 0.8, 0.87)]).name == "all"
    assert choose.choose([trial("all", 0.8, 0.85), trial("lora", 0.8, 0.92)]).name == "lora"
    assert choose.choose([trial("all", 0.8, 0.85, 20), trial("lora", 0.8, 0.92, 20)]).name == "all"
    assert choose.choose([trial("all", 0.8, 0.85), trial("lora", 0.8, 0.92, steps=60)]).name == "all"
    # Fewer steps say nothing of the first either, so that nothing can be better than it.
    assert choose.choose([trial("all", 0.8, 0.85, steps=60), trial("scratch", 0.8, 0.92)]).name == "all"


def test_adapters_are_left_out_first_where_time_is_short() -> None:
    ways = [Way("all", {"trained": "all"}), Way("lora", {"trained": "lora"}), Way("scratch", {})]
    for count, kept in ((9.0, "all lora scratch"), (2.9, "all scratch"), (1.5, "all"), (0.1, "all")):
        assert " ".join(way.name for way in choose._affordable(ways, count)) == kept


def test_scores_are_extrapolated_along_a_power_of_the_time() -> None:
    """Errors of 0.2 and 0.1 after 1 and 4 halve as the time grows fourfold: after 16, 0.05 is left."""
    assert extrapolated([(1.0, 0.8), (4.0, 0.9)], 16.0) == pytest.approx(0.95)
    # No steeper than by the root of the time, as 0.4, 0.2, 0.1 after 1, 2, 4 would be.
    assert extrapolated([(1.0, 0.6), (2.0, 0.8), (4.0, 0.9)], 16.0) == pytest.approx(0.95)
    assert extrapolated([(1.0, 0.7), (4.0, 0.7)], 400.0) == pytest.approx(0.7)
    assert extrapolated([(4.0, 0.5)], 4.0) == pytest.approx(0.5)
    assert extrapolated([(0.0, 1.0), (4.0, 1.0)], 40.0) <= 1.0


class _Told(Recorder):
    def epoch(self, run: Run, evaluation: Evaluation) -> None:
        self.averages[run.state.step] = copied(run.average)
        self.trained = run.recipe.tuning.trained
        self.model = run.recipe.start.model


def always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine."""
    monkeypatch.setattr(choose, "_MOST_SHARE", 1000.0)
    monkeypatch.setattr(choose, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(choose, "_LEAST_STEPS", 1)


@pytest.mark.parametrize(("winner", "expected"), [(0, "all"), (1, "lora")])
def test_where_time_is_the_budget_ways_are_tried(
    winner: int, expected: str, base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    always_tried(monkeypatch)
    monkeypatch.setattr(choose, "choose", lambda trials: trials[winner].way)
    told = _Told()
    recipe = small(base, steps=None, minutes=0.05)
    summary = choose.train(data, tmp_path / "run", recipe, listeners=[told])
    assert told.trained == expected
    assert summary.seconds > 0.2 * 3  # the trials are part of it
    assert any("all of it" in message for message in told.messages)
    assert not any(tmp_path.glob("**/trial"))


def test_auto_tries_candidates_beside_a_model_from_scratch(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_tried(monkeypatch)
    monkeypatch.setattr(choose, "choose", lambda trials: trials[-1].way)
    told = _Told()
    recipe = small("auto", steps=None, minutes=0.05, candidates=(base, str(tmp_path / "none")))
    choose.train(data, tmp_path / "run", recipe, listeners=[told])
    assert told.model is not None
    assert told.model.startswith("Conv+ViT-Pico")
    assert any("none cannot be tried" in message for message in told.messages)
    assert any("base, all of it" in message for message in told.messages)


def test_the_head_of_every_trial_begins_with_the_same_features(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first trial with a cold cache began at 70 % where the next one had 86 (docs/log.md, 2026-11-26)."""
    pytest.importorskip("peft")
    always_tried(monkeypatch)
    computed: list[list[int]] = [[]]
    train_as_before, compute = choose.loop.train, features._computed

    def counted(*arguments: Any, **settings: Any) -> Any:
        computed.append([])
        return train_as_before(*arguments, **settings)

    def looked_at(classifier: Classifier, split: Any, *rest: Any) -> Any:
        computed[-1].append(len(split))
        return compute(classifier, split, *rest)

    monkeypatch.setattr(features, "_computed", looked_at)
    monkeypatch.setattr(choose.loop, "train", counted)
    choose.train(data, tmp_path / "run", small(base, steps=None, minutes=0.05, probe_head=True))
    assert len(computed) == 1 + 2 * 2 + 1  # made ready, tried, carried out
    assert [sum(images) for images in computed[2:]] == [0] * 4
    assert sum(computed[1]) > 0


def test_ways_whose_trials_would_have_few_steps_are_not_tried(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(choose, "_LEAST_STEPS", 10**9)
    told = _Told()
    choose.train(data, tmp_path / "run", small(base, steps=None, minutes=0.05), listeners=[told])
    assert told.trained == "all"
    assert "too long to try several ways; Vitral takes: base, all of it" in told.messages[1]
    assert not any(message.startswith("trying") for message in told.messages)


def test_a_trial_is_judged_by_the_images_that_it_looked_at(base: str, many: ImageData) -> None:
    way = Way("all", {"trained": "all"})
    trial = choose._trial(many, small(base, steps=None, minutes=10), way, 0.5, OURS)
    assert trial.images == 256


@pytest.mark.parametrize(
    ("base_side", "image_side", "tuned"),
    [(32, 28, (32, 32)), (32, 40, (32, 32)), (64, 28, 28), (64, 44, 44), (64, 60, (64, 64)), (96, 96, 64)],
)
def test_a_base_keeps_its_size_unless_that_is_clearly_larger_than_the_images(
    base_side: int, image_side: int, tuned: int | tuple[int, int], tmp_path: Path
) -> None:
    model = VisionTransformer(base_side, 4, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((base_side, base_side)), ("x", "y")))
    size = (image_side, image_side)
    images = open_data(str(write_images(tmp_path / "images", {"a": 4, "b": 4}, size=size)))
    assert choose._size(str(tmp_path / "base"), images) == tuned


def test_ways_are_not_tried_without_validation_images(base: str, tmp_path: Path) -> None:
    images = open_data(str(write_images(tmp_path / "images", {"a": 8, "b": 8})), val_fraction=0)
    told = _Told()
    with pytest.raises(VitralError, match=r"has no validation images; .* val_fraction=0.2"):
        choose.train(images, tmp_path / "run", small(base, minutes=10), listeners=[told])
    assert told.messages == []


def test_auto_needs_a_time(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=r"model=auto .* minutes=30"):
        choose.train(data, tmp_path / "run", Recipe(model="auto", epochs=1))
    assert not (tmp_path / "run").exists()


def test_too_short_a_time_takes_the_first_way(base: str, data: ImageData, tmp_path: Path) -> None:
    told = _Told()
    choose.train(data, tmp_path / "run", small(base, minutes=0.5, steps=1), listeners=[told])
    assert told.trained == "all"
    assert Recipe(trained="all") != Recipe()
