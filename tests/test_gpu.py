"""What must hold on a GPU too: the same numbers, the same bits after a resume, no step that waits for it."""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import Reporter, settled, write_images
from tests.test_in_memory import MOVES, in_memory, split_of
from tests.test_observe import SIZE, build
from tests.test_resume import Crash, CrashAt, assert_same_run
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.image_data import ImageData, open_data
from vitral.explain.inside import Inside
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.variants import create
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.recipes.resolve import load_base
from vitral.runtime.devices import Placement
from vitral.runtime.threads import cpu_count
from vitral.training.begin import first_checkpoint
from vitral.training.listeners import Listeners
from vitral.training.loop import train, training_batches
from vitral.training.run import Run
from vitral.training.run_folder import RunFolder
from vitral.training.step import update_average

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    # Warnings of other libraries, of another version of Python too, are shown there and fail nothing.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def compiler_at_its_start() -> Iterator[None]:
    """Each test compiles for itself: after eight models of one class torch goes on without compiling."""
    yield
    torch.compiler.reset()


def recipe(**changes: Any) -> Recipe:
    """With all that draws or mixes on the device."""
    settings: dict[str, Any] = {
        "model": "Conv+ViT-Pico/4",
        "batch_size": 8,
        "cutmix": 1.0,
        "drop_path": 0.2,
        "dropout": 0.1,
        "rand_augment": 0.0,
        "small_images": 0.0,
        "compile": False,
        "device": "cuda",
    }
    return Recipe(**{**settings, **changes})


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    return open_data(str(write_images(tmp_path / "images", {"ant": 30, "bee": 30}, size=(16, 16))))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def gradients(model: VisionTransformer, placement: Placement, passes: int = 1) -> dict[str, Tensor]:
    """Of a cross-entropy loss in the last of so many passes, on the CPU."""
    model = model.to(placement.device).train()
    for _ in range(passes):
        model.zero_grad()
        with placement.autocast():
            logits = model(placement.put(images(6, 3, 16, 16)))
        F.cross_entropy(logits.float(), torch.arange(6, device=placement.device) % 5).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


# In bfloat16 on a CPU the stem's first filters are off by 0.09, all else by less than 0.06.
@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-3), ("bfloat16", 0.15)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["ViT-Ti/4", "Conv+ViT-Pico/4"])
def test_gradients_are_those_of_the_cpu_in_float32(
    name: str, compiled: bool, precision: Any, allowed: float
) -> None:
    options = {"img_size": 16, "num_classes": 5, "num_layers": 2, "dropout": 0.0}
    torch.manual_seed(0)
    model = create(name, **options)
    twin = create(name, **options)
    twin.load_state_dict(model.state_dict())
    wanted = gradients(model, Placement.choose("cpu", "float32"))
    placement = Placement.choose("cuda", precision)
    if compiled:
        twin.compile(**placement.compile_options())
    # Compiled, the first pass runs as it is, the second is recorded, and later ones are replayed.
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = gradients(twin, placement, passes=4 if compiled else 1)
    assert found.keys() == wanted.keys()
    for part, expected in wanted.items():
        assert (found[part] - expected).norm() <= allowed * expected.norm() + 1e-6, part


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="held images"),
        pytest.param({"sampling": "balanced"}, id="balanced"),
        pytest.param({"compile": True}, id="compiled"),
        pytest.param({"compile": True, "accumulate": 2}, id="compiled, in parts"),
        pytest.param({"rand_augment": 9.0, "workers": 0}, id="loaded images"),
    ],
)
def test_no_step_waits_for_the_device(data: ImageData, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = recipe(steps=40, class_weights="balanced", **changes)
    resolved = settled(data, settings, cpu_count())
    checkpoint = first_checkpoint(resolved, data, load_base(settings))
    placement = Placement.choose(resolved.machine.device, resolved.machine.precision)
    run = Run(resolved, data, checkpoint, placement, RunFolder(tmp_path / "run"), Listeners())
    batches = training_batches(run)
    for batch in islice(
        batches, 10
    ):  # states of optimizers, handles of kernels, graphs with and without mixing
        run.step(batch)
        run.state.step += 1
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in islice(batches, 5):
            run.step(batch)
            run.state.step += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"precision": "float32"}, id="float32"),
        pytest.param({"precision": "bfloat16"}, id="bfloat16"),
        pytest.param({"precision": "float32", "compile": True}, id="float32, compiled"),
        pytest.param({"compile": True}, id="bfloat16, compiled"),
        pytest.param({"compile": True, "accumulate": 2}, id="compiled, in parts"),
        pytest.param({"rand_augment": 9.0, "workers": 2}, id="loaded by workers"),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    data: ImageData, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = recipe(steps=14, checkpoint_steps=4, **changes)
    train(data, tmp_path / "whole", settings)
    with pytest.raises(Crash):
        train(data, tmp_path / "parts", settings, listeners=[CrashAt(10)])
    train(data, tmp_path / "parts", Recipe(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_compiled_run_learns(data: ImageData, tmp_path: Path) -> None:
    summary = train(data, tmp_path / "run", recipe(compile=None, epochs=20.0))
    assert summary.finished
    assert summary.val_top1 is not None
    assert summary.val_top1 > 0.8


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_captured_step_is_the_eager_one_to_the_bit(
    data: ImageData, tmp_path: Path, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, mixing, clipping, averages and a rate that changes; recorded at the fourth."""
    found = {}
    for name, warm_up in (("captured", 3), ("eager", 10**6)):
        monkeypatch.setattr("vitral.training.step._WARM_UP", warm_up)
        train(data, tmp_path / name, recipe(steps=12, optimizer=optimizer, compile=True))
        found[name] = load_checkpoint(tmp_path / name / "last").model.state_dict()
        torch.compiler.reset()
    for part, expected in found["eager"].items():
        assert torch.equal(found["captured"][part], expected), part


def test_an_update_of_the_average_by_a_tensor_is_that_by_a_number() -> None:
    averages, weights = ([images(5, 3).cuda(), images(7).cuda()] for _ in range(2))
    others = [average.clone() for average in averages]
    weights = [weight + 1 for weight in weights]
    update_average(averages, weights, 0.3)
    update_average(others, weights, torch.tensor(0.3, device="cuda"))
    for ours, theirs in zip(averages, others, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_step_in_parts_is_the_step_of_the_whole(data: ImageData, tmp_path: Path) -> None:
    """Eager, compiled, and compiled in two and in three parts, of which the last is smaller."""
    found = {}
    for name, changes in {
        "eager": {},
        "whole": {"compile": True},
        "halves": {"compile": True, "accumulate": 2},
        "thirds": {"compile": True, "accumulate": 3},
    }.items():
        still = {"dropout": 0.0, "drop_path": 0.0, "cutmix": 0.0, "precision": "float32"}
        settings = recipe(steps=4, optimizer="sgd", **still, **changes)
        train(data, tmp_path / name, settings)
        found[name] = load_checkpoint(tmp_path / name / "last").model.state_dict()
    for name in found.keys() - {"eager"}:
        for part, expected in found["eager"].items():
            torch.testing.assert_close(
                found[name][part], expected, rtol=1e-3, atol=1e-4, msg=f"{name}: {part}"
            )


class Listener(Reporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize(
    ("trained", "compiled"), [("all", False), ("all", True), ("head", False), ("lora", False)]
)
def test_a_small_model_is_fine_tuned_from_a_probe_of_its_head(
    data: ImageData, tmp_path: Path, trained: Any, compiled: bool
) -> None:
    if trained == "lora":
        pytest.importorskip("peft")
    torch.manual_seed(0)
    model = create("ViT-Ti/4", img_size=16, num_classes=3, num_layers=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y", "z")))
    settings = recipe(model=str(tmp_path / "base"), trained=trained, epochs=2.0, compile=compiled)
    listener = Listener()
    summary = train(data, tmp_path / "run", settings, listeners=[listener])
    assert any("linear probe" in message for message in listener.messages)
    assert summary.val_top1 is not None
    assert summary.val_top1 > 0.8
    assert load_checkpoint(tmp_path / "run").labels == ("ant", "bee")


def test_probabilities_are_those_of_the_cpu(data: ImageData) -> None:
    torch.manual_seed(0)
    model = create("Conv+ViT-Pico/4", img_size=16, num_classes=5, num_layers=2).eval()
    pixels = list((images(7, 16, 16, 3) * 40 + 128).clamp(0, 255).byte().numpy())
    found = {}
    for device in ("cpu", "cuda"):
        placement = Placement.choose(device, "float32")
        twin = copy.deepcopy(model).to(placement.device)
        found[device] = Classifier(twin, Preprocess((16, 16)), tuple("abcde"), placement).predict(pixels)
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert dict(ours.top) == pytest.approx(dict(theirs.top), abs=2e-3)


def test_a_gpu_is_chosen_where_there_is_one() -> None:
    assert Placement.choose() == Placement(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kind", ["paper", "mixed rotary", "relative", "map", "distilled"])
def test_attention_and_attribution_are_those_of_the_cpu(kind: str, precision: Any, most: float) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        placement = Placement.choose(device, precision if device == "cuda" else "float32")
        twin = placement.place(copy.deepcopy(build(kind))).eval()
        looked = Inside(Classifier(twin, Preprocess(SIZE), tuple("abcdefg"), placement))
        maps = looked.attention(images(2, 3, *SIZE).sigmoid(), layers=[0, 1, 2], queries=["mean", (1, 2)])
        assert max(maps.certificate) <= most
        found[device] = (
            maps,
            looked.relevance(images(2, 3, *SIZE).sigmoid(), method="attention_gradient", target=1),
        )
    (ours, relevance), (theirs, expected) = found["cuda"], found["cpu"]
    torch.testing.assert_close(ours.values, theirs.values, atol=most, rtol=0)
    scale = float(expected.values.abs().max())
    torch.testing.assert_close(relevance.values / scale, expected.values / scale, atol=10 * most, rtol=0)


def test_images_in_memory_are_those_of_the_cpu() -> None:
    split = split_of(13, damaged=(3,))
    course: dict[str, Any] = {"batch_size": 4, "seed": 1, "first_step": 2}
    there = in_memory(split, device=torch.device("cuda")).training_batches(MOVES, **course)
    here = in_memory(split).training_batches(MOVES, **course)
    for ours, theirs in islice(zip(there, here, strict=True), 5):
        assert ours.images.device.type == ours.labels.device.type == "cuda"
        torch.testing.assert_close(ours.images.cpu(), theirs.images)
        assert torch.equal(ours.labels.cpu(), theirs.labels)
