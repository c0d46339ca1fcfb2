"""Training computes what its formulas say, ends when its budget says, and learns."""

import json
import math
import os
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Reporter, settled, write_images
from tests.test_resume import Crash, CrashAt
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.batches import Batch
from vitral.data.image_data import ImageData, open_data
from vitral.data.randomness import seeded
from vitral.evaluation.evaluation import Evaluation
from vitral.images.preprocess import Preprocess
from vitral.model.embedding import ConvStem
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base, start
from vitral.runtime import process
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.training.events import CheckpointWritten, Evaluated, Event
from vitral.training.listeners import Listeners, Message, Progress
from vitral.training.loop import train
from vitral.training.optimizers import parameter_groups
from vitral.training.run import Run
from vitral.training.run_folder import RunFolder
from vitral.training.schedule import Schedule


class Recorder(Reporter):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.averages: dict[int, dict[str, Tensor]] = {}

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, run: Run) -> None:
        self.steps.append(run.state.step)

    def epoch(self, run: Run, evaluation: Evaluation) -> None:
        self.averages[run.state.step] = copied(run.average)


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def tiny(**options: Any) -> VisionTransformer:
    return VisionTransformer(16, 8, embed_dim=16, num_layers=2, num_heads=2, num_classes=2, **options)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A model folder to start from, far smaller than any named variant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny(dropout=0.0)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    return str(tmp_path / "base")


@pytest.fixture
def data(image_folder: Path) -> ImageData:
    """30 images to train on and 6 to validate on."""
    return open_data(str(image_folder))


def small(base: str, **settings: Any) -> Recipe:
    """A run of less than a second; three steps of eight images per epoch."""
    quick = Recipe(model=base, steps=6, batch_size=8, workers=0, device="cpu", precision="float32")
    return quick.changed(**settings)


def opened(data: ImageData, recipe: Recipe) -> Run:
    """A run that the test steps through itself."""
    resolved = settled(data, recipe)
    with seeded(resolved.course.seed):
        checkpoint = start(resolved, data.classes, load_base(recipe))
    placement = Placement.choose("cpu", resolved.machine.precision)
    return Run(resolved, data, checkpoint, placement, RunFolder(Path()), Listeners())


def random_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(8, 3, 16, 16, generator=generator), torch.randint(3, (8,), generator=generator), ())
        for _ in range(count)
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    """After the last step; the best may be those that the run began with."""
    last = folder / "last"
    return ((last if last.exists() else folder) / "model.safetensors").read_bytes()


# --- One step ------------------------------------------------------------------------------------


def smoothed_cross_entropy(logits_BL: Tensor, labels_B: Tensor, smoothing: float) -> Tensor:
    classes = logits_BL.shape[1]
    targets_BL = (1 - smoothing) * F.one_hot(labels_B, classes) + smoothing / classes
    return -(targets_BL * logits_BL.log_softmax(1)).sum(1).mean()


class PlainAdamW:
    """Algorithm 2 of Decoupled Weight Decay Regularization (arXiv:1711.05101), parameter by parameter."""

    def __init__(self, model: torch.nn.Module, undecayed: tuple[str, ...]) -> None:
        self.parameters = dict(model.named_parameters())
        self.undecayed = undecayed
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.t = 0

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float, clip_norm: float) -> None:
        self.t += 1
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, clip_norm / norm)
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
            self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
            first, second = self.first[name] / (1 - 0.9**self.t), self.second[name] / (1 - 0.999**self.t)
            decay = 0.0 if name.endswith(self.undecayed) else weight_decay
            p = self.parameters[name]
            p.copy_(p - learning_rate * decay * p - learning_rate * first / (second.sqrt() + 1e-8))
            p.grad = None


@pytest.mark.parametrize("clip_norm", [0.1, 100.0], ids=["clipped", "unclipped"])
def test_steps_are_those_of_plain_pytorch(clip_norm: float, base: str, data: ImageData) -> None:
    run = opened(
        data,
        small(
            base,
            steps=10,
            learning_rate=1e-3,
            warmup=0.3,
            layer_decay=1.0,
            weight_decay=0.1,
            clip_norm=clip_norm,
            label_smoothing=0.2,
        ),
    )
    model = tiny(dropout=0.0)
    model.reset_classifier(3)
    model.load_state_dict(run.model.state_dict())
    optimizer = PlainAdamW(model, undecayed=("bias", "norm.weight", "class_token", "positions.table"))
    # Three steps of warm-up (from a thousandth), then two of a cosine over the other seven.
    rates = [1e-6, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3 * (1 + math.cos(math.pi / 7)) / 2]
    for batch, rate in zip(random_batches(5), rates, strict=True):
        run.step(batch)
        run.state.step += 1
        smoothed_cross_entropy(model(batch.images), batch.labels, 0.2).backward()
        optimizer.step(rate, 0.1, clip_norm)
    for name, expected in model.state_dict().items():
        found = run.model.state_dict()[name]
        if name.endswith("qkv.bias"):
            # A key's bias moves all scores of a query alike: its gradient is rounding, which Adam scales up.
            found, expected = (torch.cat([q, v]) for q, _, v in (found.chunk(3), expected.chunk(3)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)


def test_the_average_follows_its_formula(base: str, data: ImageData) -> None:
    run = opened(data, small(base, steps=4, learning_rate=0.01, warmup=0.0, ema_decay=0.15))
    expected = copied(run.model)
    # (1 + s) / (10 + s) until it passes ema_decay: 1/10, then 2/11 is more than 0.15.
    for batch, decay in zip(random_batches(4), (0.1, 0.15, 0.15, 0.15), strict=True):
        run.step(batch)
        run.state.step += 1
        now = run.model.state_dict()
        expected = {name: decay * old + (1 - decay) * now[name] for name, old in expected.items()}
    for name, tensor in run.average.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_step_says_the_same_whatever_was_drawn_before(base: str, data: ImageData) -> None:
    after = []
    for draws in (0, 1000):
        run = opened(data, small(base, dropout=0.3, drop_path=0.3, mixup=0.5, cutmix=0.5))
        torch.rand(draws)
        run.step(random_batches(1)[0])
        after.append(copied(run.model))
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5, "cutmix": 0.5}], ids=["plain", "mixed"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_batch_in_parts_is_the_same_step(
    parts: int, mixing: dict[str, float], base: str, data: ImageData
) -> None:
    after = []
    for accumulate in (1, parts):
        # SGD, for Adam divides rounding errors by themselves where a gradient is nought.
        run = opened(data, small(base, accumulate=accumulate, optimizer="sgd", learning_rate=0.1, **mixing))
        for batch in random_batches(3):
            run.step(batch)
            run.state.step += 1
        after.append((copied(run.model), run.recent.loss, run.recent.accuracy))
    for name, tensor in after[0][0].items():
        torch.testing.assert_close(after[1][0][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert after[1][1:] == pytest.approx(after[0][1:])


def test_layers_computed_twice_give_the_same_bits(base: str, data: ImageData) -> None:
    after = []
    for twice in (False, True):
        run = opened(data, small(base, checkpoint_layers=twice, dropout=0.3, drop_path=0.3, warmup=0.0))
        for batch in random_batches(2):
            run.step(batch)
            run.state.step += 1
        after.append(copied(run.model))
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())


def test_images_grow_from_half_their_size_in_whole_patches(base: str, data: ImageData) -> None:
    run = opened(data, small(base, img_size=32, small_images=0.5))
    images = torch.rand(2, 3, 1, 1).expand(-1, -1, 32, 32)
    # After 0, 1 and 2 of 6 steps 1/2, 2/3 and 5/6 of 4 patches of 8 pixels.
    for run.state.step, side in enumerate((16, 24, 24)):
        torch.testing.assert_close(run.sized(images), images[:, :, :side, :side])
    run.state.step = 3
    assert run.sized(images) is images


@pytest.mark.parametrize(
    ("mix_passes", "step", "share"), [(2.0, 0, 0), (2.0, 3, 0.5), (2.0, 6, 1), (0.0, 0, 1)]
)
def test_batches_are_mixed_the_likelier_the_more_often_images_were_seen(
    mix_passes: float, step: int, share: float, base: str, data: ImageData
) -> None:
    run = opened(data, small(base, cutmix=1.0, mix_passes=mix_passes))  # an epoch has three steps
    run.state.step = step
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    with seeded(0):
        batches = [run.mixed(images, labels) for _ in range(200)]
    assert all(targets.sum(1).allclose(torch.ones(4)) for _, targets in batches)
    # A CutMix of the whole image, or of nothing, leaves a batch as it is: as good as never.
    mixed = sum(not torch.equal(altered, images) for altered, _ in batches) / 200
    assert abs(mixed - share) < (0.15 if share == 0.5 else 0.05)


@pytest.mark.parametrize("whiten", [True, False])
def test_a_new_stem_begins_with_filters_that_whiten(whiten: bool, data: ImageData, tmp_path: Path) -> None:
    recipe = small("Conv+ViT-Pico/4@16", steps=1, learning_rate=1e-9, whiten=whiten)
    train(data, tmp_path / "run", recipe)
    stem = load_checkpoint(tmp_path / "run").model.embedding.stem
    assert isinstance(stem, ConvStem)
    filters = stem.convolutions()[0].weight  # 27 and their negatives
    close = torch.allclose(filters[27:54], -filters[:27], atol=1e-6)
    assert close == whiten


def test_a_new_head_begins_as_the_probe_of_what_the_model_had_learnt(
    base: str, data: ImageData, tmp_path: Path
) -> None:
    recorder = Recorder()
    recipe = small(base, steps=1, learning_rate=1e-9, ema_decay=0.0, probe_head=True)
    train(data, tmp_path / "run", recipe, listeners=[recorder])
    assert recorder.messages[0].startswith("the head begins as a linear probe of 30 images, right on ")
    begun, checkpoint = load_checkpoint(tmp_path / "run").model, load_checkpoint(base)
    split = data.split("train")
    images = torch.stack([checkpoint.preprocess(image) for image in split.images])
    seen: list[Tensor] = []
    begun.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        answers = begun(images).argmax(1).numpy()
    # 30 images in 16 numbers each: scikit-learn, asked directly, with hardly a penalty.
    direct = LogisticRegression(C=100, max_iter=5000).fit(seen[0], split.labels)
    assert (answers == direct.predict(seen[0])).mean() > 0.8
    assert (answers == split.labels).mean() > 0.8
    drawn = small(base, steps=1, learning_rate=1e-9, ema_decay=0.0, probe_head=False)
    train(data, tmp_path / "drawn", drawn)
    with torch.inference_mode():
        guesses = load_checkpoint(tmp_path / "drawn").model(images).argmax(1).numpy()
    assert (guesses == split.labels).mean() < 0.7


def test_a_head_of_the_same_labels_is_kept(data: ImageData, tmp_path: Path) -> None:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=3, dropout=0.0)
    save_checkpoint(tmp_path / "same", Checkpoint(model, Preprocess((16, 16)), data.classes))
    train(data, tmp_path / "run", small(str(tmp_path / "same"), steps=1, learning_rate=1e-9, ema_decay=0.0))
    torch.testing.assert_close(load_checkpoint(tmp_path / "run").model.head.weight, model.head.weight)


def test_in_bfloat16_weights_and_moments_stay_float32_and_gradients_agree(base: str, data: ImageData) -> None:
    gradients = []
    for precision in ("float32", "bfloat16"):
        run = opened(data, small(base, warmup=0.0, device="cpu", precision=precision))
        # Kept from being zeroed, to be compared.
        run.optimizer.zero_grad = lambda: None
        run.step(random_batches(1)[0])
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        moments = [v for part in run.optimizer.parts for state in part.state.values() for v in state.values()]
        assert {moment.dtype for moment in moments} == {torch.float32}
        gradients.append({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    exact = torch.cat([g.flatten() for g in gradients[0].values()])
    rounded = torch.cat([g.flatten() for g in gradients[1].values()])
    # bfloat16 keeps 8 bits: 2^-8 a rounding, and a few dozen on the way, with random signs.
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    assert not torch.equal(exact, rounded)


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one(base: str, data: ImageData) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    after = []
    for compiled in (False, True):
        run = opened(data, small(base, compile=compiled, warmup=0.0, optimizer="sgd", learning_rate=0.1))
        for batch in random_batches(3):
            run.step(batch)
            run.state.step += 1
        after.append(copied(run.model))
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_differs_from_step_to_step(base: str, data: ImageData) -> None:
    after = []
    for number in (0, 1):
        run = opened(data, small(base, dropout=0.5, warmup=0.0, learning_rate=0.01))
        run.state.step = number
        run.step(random_batches(1)[0])
        after.append(copied(run.model)["norm.weight"])
    assert not torch.equal(*after)


# --- The schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "warmup", "share"),
    [
        (0.0, 0.2, 0.001),
        (0.05, 0.2, 0.25),
        (0.1, 0.2, 0.5),
        (0.2, 0.2, 1.0),
        (0.4, 0.2, (1 + math.sqrt(0.5)) / 2),
        (0.6, 0.2, 0.5),
        (1.0, 0.2, 0.0),
        (0.0, 0.0, 1.0),
        (0.5, 0.0, 0.5),
        (1.0, 0.0, 0.0),
    ],
)
def test_the_rate_rises_linearly_and_falls_as_a_cosine(progress: float, warmup: float, share: float) -> None:
    rate = Schedule("cosine", 0.02, warmup=warmup).at(progress)
    assert rate == pytest.approx(0.02 * share, abs=1e-12)


# --- Groups of parameters ------------------------------------------------------------------------

ENCODER = {
    "attention_norm.weight": False,
    "attention_norm.bias": False,
    "attention.qkv.weight": True,
    "attention.qkv.bias": False,
    "attention.out.weight": True,
    "attention.out.bias": False,
    "feed_forward_norm.weight": False,
    "feed_forward_norm.bias": False,
    "feed_forward.expand.weight": True,
    "feed_forward.expand.bias": False,
    "feed_forward.contract.weight": True,
    "feed_forward.contract.bias": False,
}
# Name -> (layers between it and the head, whether it decays), for two layers.
EMBEDDING = {
    "embedding.class_token": (3, False),
    "embedding.patches.projection.weight": (3, True),
    "embedding.patches.projection.bias": (3, False),
}
TABLE = {"embedding.positions.table": (3, False)}
STEM = {"embedding.stem.stages.0.0.weight": (3, True), "embedding.stem.stages.1.0.weight": (3, True)}
LAYERS = {f"layers.{i}.{name}": (2 - i, decays) for i in (0, 1) for name, decays in ENCODER.items()}
NORM = {"norm.weight": (0, False), "norm.bias": (0, False)}
HEAD = {"head.weight": (0, True), "head.bias": (0, False)}
MEAN = {name: fate for name, fate in EMBEDDING.items() if name != "embedding.class_token"}

FATES = [
    ({}, EMBEDDING | TABLE | LAYERS | NORM | HEAD),
    ({"stem": (4, 8)}, EMBEDDING | TABLE | STEM | LAYERS | NORM | HEAD),
    ({"layer": {"order": "post"}}, EMBEDDING | TABLE | LAYERS | HEAD),
    ({"pooling": "mean"}, MEAN | TABLE | LAYERS | NORM | HEAD),
    ({"position": "sinusoidal"}, EMBEDDING | LAYERS | NORM | HEAD),
    ({"position": "none"}, EMBEDDING | LAYERS | NORM | HEAD),
]


@pytest.mark.parametrize(("options", "fates"), FATES, ids=[str(options) for options, _ in FATES])
def test_each_parameter_has_the_rate_and_decay_of_its_place(
    options: dict[str, Any], fates: dict[str, tuple[int, bool]]
) -> None:
    groups = parameter_groups(tiny(**options), layer_decay=0.5, weight_decay=0.3)
    found = {name: (group["scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found == {name: (0.5**level, 0.3 if decays else 0.0) for name, (level, decays) in fates.items()}


@pytest.mark.parametrize("options", [options for options, _ in FATES], ids=str)
def test_each_parameter_is_in_one_group(options: dict[str, Any]) -> None:
    model = tiny(**options)
    groups = parameter_groups(model, layer_decay=0.5, weight_decay=0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_layer_decay_of_one_gives_every_layer_the_same_rate() -> None:
    assert {group["scale"] for group in parameter_groups(tiny(), layer_decay=1.0, weight_decay=0.05)} == {1.0}


def test_lower_layers_move_less(base: str, data: ImageData) -> None:
    # Adam's first step is the learning rate itself, in each weight with a gradient.
    run = opened(data, small(base, warmup=0.0, learning_rate=1e-3, layer_decay=0.5, weight_decay=0.0))
    before = copied(run.model)
    run.step(random_batches(1)[0])
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in copied(run.model).items()}
    assert moved["head.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moved["layers.1.feed_forward.contract.weight"] == pytest.approx(5e-4, rel=0.01)
    assert moved["layers.0.feed_forward.contract.weight"] == pytest.approx(2.5e-4, rel=0.01)
    assert moved["embedding.patches.projection.weight"] == pytest.approx(1.25e-4, rel=0.01)


# --- The budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 5}, 5),
        ({"steps": None, "epochs": 2}, 6),
        ({"steps": None, "epochs": 1.5}, 4),
        ({"steps": None, "epochs": 0.01}, 1),
        ({"steps": 5, "epochs": 1}, 3),
        ({"steps": 2, "epochs": 1}, 2),
        ({"steps": 2, "minutes": 10}, 2),
    ],
    ids=str,
)
def test_the_first_budget_reached_ends_the_run(
    budget: dict[str, Any], steps: int, base: str, data: ImageData, tmp_path: Path
) -> None:
    recorder = Recorder()
    summary = train(data, tmp_path / "run", small(base, **budget), listeners=[recorder])
    assert summary.finished
    assert summary.steps == steps
    assert recorder.steps == list(range(1, steps + 1))


def test_minutes_end_a_run(base: str, data: ImageData, tmp_path: Path) -> None:
    recipe = small(base, steps=None, minutes=0.01)
    summary = train(data, tmp_path / "run", recipe)
    assert summary.finished
    assert 0.6 <= summary.seconds < 30  # on a busy machine the first step takes seconds


@pytest.mark.parametrize("budget", [{"steps": 4}, {"steps": None, "minutes": 0.005}], ids=str)
def test_the_schedule_is_laid_out_for_the_budget(
    budget: dict[str, Any], base: str, data: ImageData, tmp_path: Path
) -> None:
    train(data, tmp_path / "run", small(base, **budget))
    assert metrics(tmp_path / "run")[-1]["learning_rate"] == 0


def test_without_clipping_gradients_stay_as_they_are(base: str, data: ImageData, tmp_path: Path) -> None:
    norms = {"clip_norm": 0.0}, {"clip_norm": 100.0}, {"clip_norm": 1e-3}
    for name, norm in zip(("off", "far", "near"), norms, strict=True):
        train(data, tmp_path / name, small(base, betas=(0.0, 0.999), probe_head=False, **norm))
    assert weights(tmp_path / "off") == weights(tmp_path / "far")
    assert weights(tmp_path / "off") != weights(tmp_path / "near")
    assert weights(tmp_path / "off") != weights(Path(base))


# --- A run and its folder ------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(base: str, data: ImageData, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(data, tmp_path / name, small(base, seed=5, mixup=0.2, dropout=0.1, rand_augment=5))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_keeping_decoded_images_changes_nothing(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share in (0.0, 0.1):
        monkeypatch.setattr("vitral.data.kept.SHARE_TO_TAKE", share)
        train(data, tmp_path / str(share), small(base, flip=True, crop="padded", color_jitter=0.2))
    assert weights(tmp_path / "0.0") == weights(tmp_path / "0.1")


def test_evaluations_may_be_passes_apart_and_checkpoints_stay(
    base: str, data: ImageData, tmp_path: Path
) -> None:
    train(data, tmp_path / "run", small(base, steps=8, eval_epochs=2))  # an epoch has three steps
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 6, 8]
    assert opened_at_a_checkpoint(data, small(base, steps=100, eval_epochs=50), tmp_path / "stopped") == 3


def opened_at_a_checkpoint(data: ImageData, recipe: Recipe, folder: Path) -> int:
    """Where a run that crashes after its fourth step is taken up."""
    with pytest.raises(Crash):
        train(data, folder, recipe, listeners=[CrashAt(4)])
    return torch.load(folder / "checkpoints" / "state.pt", weights_only=True)["state"]["step"]


def test_another_seed_gives_other_weights(base: str, data: ImageData, tmp_path: Path) -> None:
    for seed in (5, 6):
        train(data, tmp_path / str(seed), small(base, seed=seed))
    assert weights(tmp_path / "5") != weights(tmp_path / "6")


def test_the_seed_draws_a_fresh_model(data: ImageData) -> None:
    runs = [opened(data, small("ViT-Pico/8", img_size=16, seed=seed)) for seed in (0, 0, 1)]
    zero, again, one = (run.model.state_dict()["head.weight"] for run in runs)
    assert torch.equal(zero, again)
    assert not torch.equal(zero, one)


def test_a_tiny_model_learns_the_tints(base: str, data: ImageData, tmp_path: Path) -> None:
    recipe = small(
        base, steps=None, epochs=25, learning_rate=3e-3, layer_decay=1.0, ema_decay=0.9, probe_head=False
    )
    train(data, tmp_path / "run", recipe)
    _, first, *_, last = metrics(tmp_path / "run")
    assert last["val_top1"] == 1.0
    assert last["train_accuracy"] > 0.9
    assert last["train_loss"] < 0.7 * first["train_loss"]
    assert last["val_loss"] < 0.7 * first["val_loss"]


def test_the_model_that_is_kept_is_the_best_average(base: str, data: ImageData, tmp_path: Path) -> None:
    recorder = Recorder()
    summary = train(
        data,
        tmp_path / "run",
        small(base, steps=15, learning_rate=3e-3, probe_head=False),
        listeners=[recorder],
    )
    kept = load_checkpoint(tmp_path / "run").model.state_dict()
    best = recorder.averages[summary.best_step]
    assert all(torch.equal(tensor, best[name]) for name, tensor in kept.items())
    chosen = max(metrics(tmp_path / "run"), key=lambda record: (record["val_top1"], -record["val_loss"]))
    assert (summary.best_step, summary.val_top1) == (chosen["step"], chosen["val_top1"])


def test_each_epoch_and_the_end_are_recorded(base: str, data: ImageData, tmp_path: Path) -> None:
    train(data, tmp_path / "run", small(base, steps=7))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 3, 6, 7]
    assert [record["epoch"] for record in metrics(tmp_path / "run")] == pytest.approx([0, 1, 2, 7 / 3])


def test_a_listener_is_told_of_a_run_in_order(base: str, data: ImageData, tmp_path: Path) -> None:
    told: list[Event] = []
    train(data, tmp_path / "run", small(base, steps=4, probe_head=False), listeners=[told.append])
    kinds = [type(event).__name__ for event in told if not isinstance(event, Message | Progress)]
    steps = ["StepDone"] * 3 + ["Evaluated", "StepDone", "Evaluated"]  # an epoch has three steps
    assert [kind for kind in kinds if kind != "CheckpointWritten"] == [
        "RunBegins",
        "Evaluated",
        *steps,
        "RunEnds",
    ]
    # A checkpoint is told of once it is on disk, which may be some steps later.
    assert [event.step for event in told if isinstance(event, CheckpointWritten)] == [3, 4]
    records = [json.loads(json.dumps(event.record())) for event in told if isinstance(event, Evaluated)]
    assert [record["step"] for record in records] == [0, 3, 4]
    assert [{**line, "train_loss": 0} for line in metrics(tmp_path / "run")] == [
        {**record, "train_loss": 0} for record in records
    ]


def test_the_summary_says_how_it_ended(base: str, data: ImageData, tmp_path: Path) -> None:
    summary = train(data, tmp_path / "run", small(base))
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written == {**vars(summary), "test": None}
    assert (summary.finished, summary.steps, summary.epochs) == (True, 6, 2.0)


def test_a_test_split_is_judged_at_the_end(base: str, tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 3), ("test", 5)):
        write_images(tmp_path / "images" / split, {"ant": count, "bee": count}, seed=count)
    summary = train(open_data(str(tmp_path / "images")), tmp_path / "run", small(base))
    assert summary.test is not None
    assert summary.test["n"] == 10


def test_the_run_is_a_model_folder_with_the_datas_labels(base: str, data: ImageData, tmp_path: Path) -> None:
    train(data, tmp_path / "run", small(base))
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.labels == ("ant", "bee", "cat")
    assert checkpoint.metadata["base"] == base
    assert checkpoint.metadata["data"] == data.source


def test_a_run_can_be_tuned_to_other_images(base: str, data: ImageData, tmp_path: Path) -> None:
    train(data, tmp_path / "first", small(base))
    other = open_data(str(write_images(tmp_path / "wide", {"dog": 9, "elk": 9}, size=(40, 26))))
    train(other, tmp_path / "second", small(str(tmp_path / "first"), img_size=(24, 32), layer_decay=0.7))
    tuned = load_checkpoint(tmp_path / "second")
    assert tuned.labels == ("dog", "elk")
    assert tuned.model.config.grid_size == (3, 4)
    assert tuned.model(torch.zeros(1, 3, 24, 32)).shape == (1, 2)


def test_a_folder_with_a_run_is_not_overwritten(base: str, data: ImageData, tmp_path: Path) -> None:
    train(data, tmp_path / "run", small(base))
    before = weights(tmp_path / "run")
    with pytest.raises(VitralError, match="already holds a run; go on with --resume, or choose another"):
        train(data, tmp_path / "run", small(base, seed=1))
    assert weights(tmp_path / "run") == before


# --- What can go wrong ---------------------------------------------------------------------------


def test_several_processes_need_a_place_to_meet(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VitralError, match="WORLD_SIZE=2 is set, and RANK is not; start with torchrun"):
        train(data, tmp_path / "run", small(base))
    assert not (tmp_path / "run").exists()


def test_a_lost_loss_stops_the_run(base: str, data: ImageData, tmp_path: Path) -> None:
    recipe = small(base, learning_rate=1e30, warmup=0.0)
    with pytest.raises(
        VitralError, match=r"^the loss is (nan|inf) after step 3; lower learning_rate \(it is 1e\+30\)"
    ):
        train(data, tmp_path / "run", recipe)


def test_a_damaged_image_is_passed_over_and_named_once(base: str, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "bee" / "004.png").write_bytes(b"no picture")
    recorder = Recorder()
    recipe = small(base, epochs=3, steps=None, max_damaged=0.05)
    summary = train(open_data(str(image_folder)), tmp_path / "run", recipe, listeners=[recorder])
    assert summary.finished
    *_, message = recorder.messages  # those before are of the start
    assert sum("004.png" in text for text in recorder.messages) == 1
    assert message.startswith("skipped damaged image bee/004.png: not an image")


@pytest.mark.parametrize(("accumulate", "usual"), [(1, {8}), (3, {3, 2})])
def test_a_batch_that_damage_made_smaller_is_not_compiled_for(
    accumulate: int,
    usual: set[int],
    base: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_for: list[int] = []

    def compiling(function: Callable[[Tensor], list[Tensor]], **_: Any) -> Callable[[Tensor], list[Tensor]]:
        def compiled(images: Tensor) -> list[Tensor]:
            compiled_for.append(len(images))
            return function(images)

        return compiled

    monkeypatch.setattr(torch, "compile", compiling)
    for number in range(3):
        (image_folder / "bee" / f"{number:03}.png").write_bytes(b"no picture")
    recipe = small(base, compile=True, accumulate=accumulate, epochs=2, steps=None, max_damaged=0.2)
    summary = train(open_data(str(image_folder)), tmp_path / "run", recipe)
    assert summary.steps == 6
    assert set(compiled_for) == usual
    assert len(compiled_for) < 6 * accumulate


def test_too_many_damaged_images_stop_a_run(base: str, image_folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        (image_folder / "bee" / f"{number:03}.png").write_bytes(b"no picture")
    with pytest.raises(VitralError, match=r"of 36 images are damaged, more than the limit of 5\.0%"):
        train(open_data(str(image_folder)), tmp_path / "run", small(base, epochs=3, max_damaged=0.05))


def test_data_with_nothing_to_validate_on_is_refused_before_training(
    base: str, image_folder: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    with pytest.raises(VitralError, match="has no validation images; give a val folder"):
        train(
            open_data(str(image_folder), val_fraction=0), tmp_path / "run", small(base), listeners=[recorder]
        )
    assert recorder.steps == []


# --- The process ---------------------------------------------------------------------------------


def test_a_run_leaves_the_process_as_it_was(base: str, data: ImageData, tmp_path: Path) -> None:
    def settings() -> tuple:
        kinds = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD
        deterministic = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # pyrefly: ignore[missing-attribute]
        )
        drawn = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
        kept = torch.get_default_device(), torch.get_default_dtype(), torch.get_num_threads()
        handlers = [signal.getsignal(kind) for kind in kinds]
        return handlers, deterministic, drawn, kept, dict(os.environ), list(warnings.filters)

    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        before = settings()
        train(data, tmp_path / "run", small(base, workers=2))
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_in_a_users_own_program_leaves_malloc_alone(
    base: str, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What mallopt sets cannot be asked for, and so not be given back: the command line alone may set it."""
    asked: list[None] = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: asked.append(None))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda *_: pytest.fail("a library is asked"))
    train(data, tmp_path / "run", small(base))
    assert not asked


def test_a_run_may_live_in_a_thread(base: str, data: ImageData, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(data, tmp_path / "run", small(base)))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "summary.json").exists()
