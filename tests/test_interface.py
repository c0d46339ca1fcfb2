"""The Python interface: each public function takes paths, objects and Datasets, and agrees with the parts."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import vitral
from vitral.model.cost import stages
from vitral.model.variants import parse
from vitral.runtime.errors import VitralError

SMALL = {"model": "ViT-Ti/4", "architecture": {"num_layers": 1, "embed_dim": 32, "num_heads": 2}}
QUICK: dict[str, Any] = {**SMALL, "steps": 2, "batch_size": 64, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interface") / "run"
    summary = vitral.train("digits", folder, **QUICK)
    assert (summary.finished, summary.steps) == (True, 2)
    return folder


class Digits(Dataset):
    """Some of the digits as a torch Dataset of (array, number)."""

    def __init__(self, count: int = 300) -> None:
        found: Any = load_digits()
        self.images, self.labels = (16 * found.images[:count]).clip(0, 255).astype(np.uint8), found.target

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, vitral; dir(vitral); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


def test_every_public_function_is_documented() -> None:
    for name in vitral.__all__:
        assert (getattr(vitral, name).__doc__ or "").strip(), name


def test_a_run_is_evaluated_by_its_path_as_a_classifier_and_as_a_module(run: Path) -> None:
    by_path = vitral.evaluate(run, "digits", split="val", device="cpu", precision="float32")
    classifier = vitral.load(run, device="cpu", precision="float32")
    assert vitral.evaluate(classifier, "digits").to_dict() == by_path.to_dict()
    data = vitral.open_data("digits")
    raw = vitral.evaluate(classifier.model, data, "val", preprocess=classifier.preprocess)
    assert raw.top1 == by_path.top1  # a temperature changes no answer
    assert by_path.n == len(data.split("val").labels)


def test_evaluate_warns_of_images_that_a_model_may_have_seen(run: Path) -> None:
    with pytest.warns(UserWarning, match="it may have seen some of them"):
        vitral.evaluate(run, Digits(), "val", device="cpu")


class Mean(nn.Module):
    """Logits of ten classes from the mean of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.arange(10.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.dropout(images_BCHW.mean((1, 2, 3))[:, None] * self.scale)


def test_any_module_of_logits_is_evaluated_where_its_images_are_described() -> None:
    module, preprocess = Mean().train(), vitral.Preprocess((8, 8))
    result = vitral.evaluate(module, Digits(), "all", preprocess=preprocess)
    assert module.training
    images = torch.stack([preprocess(image) for image, _ in map(Digits().__getitem__, range(300))])
    likeliest = module.eval()(images).argmax(1).numpy()
    names = list(result.per_class)
    truths = [names.index(str(label)) for label in Digits().labels[:300]]
    assert result.top1 == pytest.approx(float((likeliest == truths).mean()))
    with pytest.raises(VitralError, match="say what images a Mean takes"):
        vitral.evaluate(module, Digits())


def test_a_dataset_is_trained_on(tmp_path: Path) -> None:
    vitral.train(vitral.ImageData.from_dataset(Digits()), tmp_path / "run", **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # these are the images that were held out
        result = vitral.evaluate(tmp_path / "run", Digits(), "val", device="cpu")
    assert result.n == 60


def test_a_wrong_setting_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match="there is no setting 'minuts'; did you mean 'minutes'"):
        vitral.train("digits", tmp_path / "run", minuts=3)
    assert not (tmp_path / "run").exists()


def test_a_recipe_is_laid_under_the_keywords(tmp_path: Path) -> None:
    recipe = vitral.Recipe(**QUICK, seed=4)
    vitral.train("digits", tmp_path / "run", recipe=recipe, steps=1)
    written = (tmp_path / "run" / "recipe.toml").read_text()
    assert "seed = 4" in written
    assert "steps = 1" in written


def test_a_run_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    vitral.train("digits", tmp_path / "run", **QUICK, keep_state=True)
    assert vitral.train("digits", tmp_path / "run", resume=True, steps=4).steps == 4


def test_a_model_is_probed_and_examined_by_its_path(run: Path, tmp_path: Path) -> None:
    probed = vitral.probe(run, Digits(), limit=100, cache=tmp_path)
    assert probed.labelled == 100
    assert vitral.diagnose(run, Digits(), split="all", limit=40).n == 40


def test_info_counts_what_the_parts_count(run: Path) -> None:
    found = vitral.info("ViT-Ti/4", img_size=32)
    assert found.parameters == sum(
        parameter.numel() for parameter in vitral.create("ViT-Ti/4", img_size=32).parameters()
    )
    assert found.stages == tuple(stages(found.config))
    assert found.config.embed_dim == parse("ViT-Ti/4").embed_dim
    of_run = vitral.info(run)
    assert of_run.checkpoint is not None
    assert of_run.checkpoint.labels == tuple("0123456789")


def test_convert_writes_a_folder_that_is_loaded_again(run: Path, tmp_path: Path) -> None:
    vitral.convert(run, tmp_path / "out", to="vitral")
    image = Digits().images[0]
    first, second = (
        vitral.load(folder, device="cpu", precision="float32").logits(image)
        for folder in (run, tmp_path / "out")
    )
    assert torch.equal(first, second)


def test_benchmark_takes_keywords_as_the_command_line_takes_words() -> None:
    report = vitral.benchmark(
        "infer", "ViT-Ti/4", img_size=8, batch_size=2, num_layers=1, rounds=1, peers=["torchvision"],
        device="cpu", precision="float32", compiled=False,
    )  # fmt: skip
    assert any(row.contender == "vitral" and row.seconds for row in report.rows)
    json.dumps(report.to_dict())


# --- What a researcher passes in the place of ours -------------------------------------------------


def focal(logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
    shares_BL = logits_BL.log_softmax(1)
    return -(targets_BL * (1 - shares_BL.exp()) ** 2 * shares_BL).sum(1).mean()


def weights(folder: Path) -> Tensor:
    return vitral.load(folder, device="cpu", precision="float32").model.get_parameter("head.weight")


def test_a_loss_is_minimized_in_the_place_of_ours(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def loss(logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
        seen.append((logits_BL.shape, targets_BL.shape, logits_BL.dtype))
        return focal(logits_BL, targets_BL)

    vitral.train("digits", tmp_path / "run", **QUICK, loss=loss)
    assert seen == [((64, 10), (64, 10), torch.float32)] * 2
    vitral.train("digits", tmp_path / "ours", **QUICK)
    assert not torch.equal(weights(tmp_path / "run"), weights(tmp_path / "ours"))


def test_an_optimizer_takes_the_groups_and_the_rate_of_the_schedule(tmp_path: Path) -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append(torch.optim.NAdam(groups))
        return made[0]

    settings: dict[str, Any] = {
        **QUICK,
        "learning_rate": 0.125,
        "warmup": 0.0,
        "schedule": "constant",
        "layer_decay": 1.0,
    }
    vitral.train("digits", tmp_path / "run", **settings, optimizer=optimizer)
    assert {float(group["lr"]) for group in made[0].param_groups} == {0.125}
    assert {int(state["step"]) for state in made[0].state.values()} == {2}


def test_a_transform_makes_the_training_images(tmp_path: Path) -> None:
    modes: set[tuple[str, tuple[int, int]]] = set()

    def grey(picture: Any) -> Tensor:
        modes.add((picture.mode, picture.size))
        return torch.zeros(3, 8, 8)

    vitral.train("digits", tmp_path / "run", **QUICK, img_size=8, small_images=0, transform=grey)
    assert modes == {("RGB", (8, 8))}
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["train_accuracy"] <= 0.25  # all images are alike


def test_prepare_freezes_layers(tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}

    def prepare(model: vitral.VisionTransformer) -> None:
        model.layers.requires_grad_(False)
        before.update({name: value.clone() for name, value in model.state_dict().items()})

    vitral.train("digits", tmp_path / "run", **QUICK, prepare=prepare)
    after = vitral.load(tmp_path / "run", device="cpu", precision="float32").model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith("layers.")]


def test_listeners_hear_every_event(tmp_path: Path) -> None:
    events: list[Any] = []
    vitral.train("digits", tmp_path / "run", **QUICK, listeners=[events.append])
    kinds = [type(event).__name__ for event in events]
    assert kinds.count("StepDone") == 2
    assert (
        kinds.index("RunBegins") < kinds.index("StepDone") < kinds.index("Evaluated") < kinds.index("RunEnds")
    )


def test_a_resumed_run_takes_its_parts_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**QUICK, "keep_state": True, "loss": focal}
    vitral.train("digits", tmp_path / "run", **settings)
    seen: list[Tensor] = []

    def loss(logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
        seen.append(logits_BL)
        return focal(logits_BL, targets_BL)

    vitral.train("digits", tmp_path / "run", resume=True, steps=3, loss=loss)
    assert len(seen) == 1


def test_training_takes_no_module_of_which_nobody_says_what_images_it_takes(tmp_path: Path) -> None:
    with pytest.raises(VitralError, match="what images a Linear takes; name their size: img_size=32"):
        vitral.train("digits", tmp_path / "run", model=nn.Linear(3, 3))
    assert not (tmp_path / "run").exists()
