"""Measures agree with hand-worked numbers, formulas and scikit-learn; splits are those that were held out."""

import json
import math
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

from tests.conftest import write_images
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.data.batches import Batch
from vitral.data.image_data import open_data
from vitral.data.loader import Loader
from vitral.data.split import Split
from vitral.evaluation import evaluate as evaluation_module
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes, calibration_error
from vitral.evaluation.task import SINGLE_LABEL
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, load
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.plainjson import to_json
from vitral.training.loop import train

CPU = Placement.choose("cpu", "float32")


def random_logits(count: int = 211, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.randint(classes, (count,), generator=generator)
    logits_BL = torch.randn(count, classes, generator=generator)
    # Right about half the time.
    logits_BL[torch.arange(count), labels_B] += 1.5
    return logits_BL, labels_B


def evaluated(logits_BL: Tensor, labels_B: Tensor) -> SingleLabelEvaluation:
    return SingleLabelEvaluation.of(
        SingleLabelOutcomes.of(logits_BL, labels_B), map(str, range(logits_BL.shape[1]))
    )


# --- Measures ------------------------------------------------------------------------------------


def test_four_images_by_hand() -> None:
    # Probabilities 0.7, 0.6, 0.9 and 0.5 for what is predicted: 0, 1, 1 and 2.
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.05, 0.9, 0.05], [0.3, 0.2, 0.5]])
    result = evaluated(probabilities.log(), torch.tensor([0, 1, 0, 2]))
    assert result.n == 4
    assert result.top1 == 0.75
    assert result.top5 == 1.0
    assert result.loss == pytest.approx(-math.log(0.7 * 0.6 * 0.05 * 0.5) / 4)
    # Each in a bin of its own.
    assert result.ece == pytest.approx((0.3 + 0.4 + 0.9 + 0.5) / 4)
    assert result.confusion == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert [(row.n, row.accuracy, row.precision) for row in result.per_class.values()] == [
        (2, 0.5, 1.0),
        (1, 1.0, 0.5),
        (1, 1.0, 1.0),
    ]


def test_measures_are_scikit_learns() -> None:
    logits_BL, labels_B = random_logits()
    result, true, predicted = evaluated(logits_BL, labels_B), labels_B.numpy(), logits_BL.argmax(1).numpy()
    probabilities = logits_BL.double().softmax(1).numpy()
    assert result.top1 == metrics.accuracy_score(true, predicted)
    assert result.top5 == metrics.top_k_accuracy_score(true, probabilities, k=5)
    assert result.loss == pytest.approx(metrics.log_loss(true, probabilities), rel=1e-5)
    recalls = metrics.recall_score(true, predicted, average=None)
    precisions = metrics.precision_score(true, predicted, average=None)
    assert [row.accuracy for row in result.per_class.values()] == pytest.approx(recalls)
    assert [row.precision for row in result.per_class.values()] == pytest.approx(precisions)


def test_confusion_counts_pairs() -> None:
    logits_BL, labels_B = random_logits()
    counted = [[0] * 7 for _ in range(7)]
    for true, predicted in zip(labels_B.tolist(), logits_BL.argmax(1).tolist(), strict=True):
        counted[true][predicted] += 1
    assert evaluated(logits_BL, labels_B).confusion == counted


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (97, 100), (1, 3), (500, 1000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    labels_B = torch.zeros(n, dtype=torch.long)
    logits_BL = torch.eye(2)[(torch.arange(n) >= right).long()]
    z, p = 1.959963984540054, right / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert evaluated(logits_BL, labels_B).ci95 == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_calibration_error_is_its_formula() -> None:
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.2, 1, 500)
    correct = generator.uniform(size=500) < confidences**2
    expected = 0.0
    for low in np.arange(15) / 15:
        members = (confidences > low) & (confidences <= low + 1 / 15)
        if members.any():
            gap = abs(correct[members].mean() - confidences[members].mean())
            expected += members.mean() * gap
    assert calibration_error(confidences, correct) == pytest.approx(expected)


def test_perfect_confidence_that_is_right_has_no_calibration_error() -> None:
    assert calibration_error(np.ones(5), np.ones(5, dtype=bool)) == 0


def test_with_few_classes_all_are_in_the_top_five() -> None:
    assert evaluated(*random_logits(classes=3)).top5 == 1.0


def test_a_class_without_images_or_predictions_counts_nothing() -> None:
    result = SingleLabelEvaluation.of(
        SingleLabelOutcomes.of(torch.eye(3)[:2], torch.tensor([0, 1])), ["a", "b", "c"]
    )
    assert (result.per_class["c"].n, result.per_class["c"].accuracy, result.per_class["c"].precision) == (
        0,
        0.0,
        0.0,
    )


@pytest.mark.parametrize("part", [1, 10, 200])
def test_parts_merge_to_the_whole(part: int) -> None:
    logits_BL, labels_B = random_logits()
    pieces = map(SingleLabelOutcomes.of, logits_BL.split(part), labels_B.split(part))
    merged = SingleLabelEvaluation.of(SingleLabelOutcomes.merge(pieces), map(str, range(7)))
    whole = evaluated(logits_BL, labels_B)
    assert merged.confusion == whole.confusion
    assert (merged.loss, merged.ece) == pytest.approx((whole.loss, whole.ece), rel=1e-5)


def random_outcomes(classes: int, count: int) -> SingleLabelOutcomes:
    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(0, classes, (2, count))
    in_top5, confidences, losses = draw.random(count) < 0.1, draw.random(count), draw.random(count)
    return SingleLabelOutcomes(labels, predictions, in_top5, confidences, losses)


def test_the_matrix_and_the_commonest_mistakes_are_scikit_learns() -> None:
    outcomes = random_outcomes(13, 500)
    result = SingleLabelEvaluation.of(outcomes, map(str, range(13)))
    matrix = metrics.confusion_matrix(outcomes.labels, outcomes.predictions)
    assert result.confusion == result.to_dict()["confusion"] == matrix.tolist()
    np.fill_diagonal(matrix, 0)
    assert result.taken_most_often_for() == {
        truth: (int(row.argmax()), int(row.max())) for truth, row in enumerate(matrix) if row.any()
    }


def test_two_classes_of_one_name_stay_two() -> None:
    outcomes = random_outcomes(4, 100)
    result = SingleLabelEvaluation.of(outcomes, ["crane", "bird", "crane", "dog"])
    assert list(result.per_class) == ["crane", "bird", "crane (class 2)", "dog"]
    assert [row.n for row in result.per_class.values()] == np.bincount(outcomes.labels).tolist()
    assert np.array(result.confusion).shape == (4, 4)


def test_twenty_thousand_classes_take_no_square_of_memory_or_time() -> None:
    outcomes = random_outcomes(21_843, 50_000)
    names = [f"class {index}" for index in range(21_843)]
    SingleLabelEvaluation.of(random_outcomes(3, 10), "abc")  # imports what it needs
    tracemalloc.start()
    try:
        content = to_json(SingleLabelEvaluation.of(outcomes, names).to_dict())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * 2**20  # the matrix alone would take 3.8 GB
    assert json.loads(content)["confusion"] is None
    assert len(json.loads(content)["per_class"]) == 21_843


def test_labels_of_many_classes_are_matched_quickly(tmp_path: Path) -> None:
    labels = tuple(f"class {index}" for index in range(21_843))
    split = Split([b""] * 5, np.arange(5), ["a"] * 5)
    began = time.monotonic()
    found = evaluation_module.relabelled(split, labels[::-1], labels)
    assert time.monotonic() - began < 5  # of comparing each with each, half a minute
    assert found.labels.tolist() == [21_842, 21_841, 21_840, 21_839, 21_838]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_are_refused(value: float) -> None:
    logits_BL, labels_B = random_logits()
    logits_BL[3, 2] = value
    with pytest.raises(VitralError, match="the model's answers are not finite numbers"):
        SINGLE_LABEL.evaluate(nn.Identity(), [Batch(logits_BL, labels_B, ())], map(str, range(7)), CPU)


# --- A model over batches ------------------------------------------------------------------------


def test_batches_of_any_size_count_each_image_once() -> None:
    logits_BL, labels_B = random_logits()
    batches = [
        Batch(logits_BL[:4], labels_B[:4], ()),
        Batch(torch.empty(0), labels_B[:0], (("bad.png", "no image"),)),
        Batch(logits_BL[4:], labels_B[4:], ()),
    ]
    seen: list[Batch] = []
    result = SINGLE_LABEL.evaluate(nn.Identity(), batches, map(str, range(7)), CPU, on_batch=seen.append)
    assert result.confusion == evaluated(logits_BL, labels_B).confusion
    assert seen == batches


@pytest.mark.parametrize("training", [True, False])
def test_dropout_rests_while_a_model_is_evaluated(training: bool) -> None:
    logits_BL, labels_B = random_logits()
    model = nn.Dropout(0.9).train(training)
    result = SINGLE_LABEL.evaluate(model, [Batch(logits_BL, labels_B, ())], map(str, range(7)), CPU)
    assert result.loss == pytest.approx(evaluated(logits_BL, labels_B).loss)
    assert model.training is training


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": "foo"}, "split='foo': input should be 'train', 'val', 'test' or 'all'"),
        ({"max_damaged": math.nan}, "max_damaged=nan: it must be a number from 0 to 1"),
        ({"batch_size": 0}, "batch_size=0: it must be a whole number from 1 to 1,048,576"),
        ({"workers": -1}, "workers=-1: it must be a whole number from 0 to 1,024"),
        ({"workers": True}, "workers=true: it must be a whole number from 0 to 1,024"),
        ({"mistake": True}, "there is no setting 'mistake'; did you mean 'mistakes'?"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant_is_refused_before_the_data_is_read(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(VitralError, match=f"^{re.escape(text)}"):
        evaluate_classifier(tint_classifier(), "nowhere", **options)


# --- The choice of images ------------------------------------------------------------------------


class Tint(nn.Module):
    """Tells the tinted classes of `write_images` apart without fail: red, green and blue."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.channels = list(channels)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return 50 * images_BCHW.mean((2, 3))[:, self.channels]


def tint_classifier(labels: str = "ant bee cat", **metadata: Any) -> Classifier:
    names = tuple(labels.split())
    model = cast(Any, Tint(*(("ant", "bee", "cat").index(name) for name in names)))
    return Classifier(model, Preprocess((8, 8)), names, CPU, metadata)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were evaluated, in this process."""
    names: list[str] = []

    def watched(split: Any, transform: Any, _: Any) -> Loader:
        names.extend(split.names)
        return Loader(split, transform)

    monkeypatch.setattr(evaluation_module, "Loader", watched)
    return names


def all_names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))


@pytest.fixture
def run(image_folder: Path, tmp_path: Path) -> Path:
    """A run on `image_folder` with a seed and share of its own."""
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2)
    save_checkpoint(tmp_path / "base", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    recipe = Recipe(model=str(tmp_path / "base"), steps=1, batch_size=8, workers=0, seed=11, val_fraction=0.4)
    data = open_data(str(image_folder), val_fraction=0.4, seed=11)
    train(data, tmp_path / "run", recipe)
    return tmp_path / "run"


def held_out(folder: Path) -> list[str]:
    """The images of `folder` that `run` held out."""
    return list(open_data(str(folder), val_fraction=0.4, seed=11).split("val").names)


@pytest.mark.parametrize("split", ["val", None])
def test_a_run_is_judged_on_exactly_what_it_held_out(
    split: str | None, run: Path, image_folder: Path, seen: list[str]
) -> None:
    name, result = evaluate_classifier(load(run), str(image_folder), split=split)
    assert name == "val"
    assert sorted(seen) == sorted(held_out(image_folder))
    assert result.n == 15


def test_the_other_images_are_those_it_trained_on(run: Path, image_folder: Path, seen: list[str]) -> None:
    evaluate_classifier(load(run), str(image_folder), split="train")
    assert sorted(seen + held_out(image_folder)) == all_names(image_folder)


def test_all_is_every_image_once(run: Path, image_folder: Path, seen: list[str]) -> None:
    name, result = evaluate_classifier(load(run), str(image_folder), split="all")
    assert (name, result.n) == ("all", 36)
    assert sorted(seen) == all_names(image_folder)


def test_the_held_out_images_of_a_folder_that_changed_are_doubted(
    run: Path, image_folder: Path, seen: list[str]
) -> None:
    (image_folder / held_out(image_folder)[0]).unlink()
    warnings: list[str] = []
    evaluate_classifier(load(run), str(image_folder), split="val", warn=warnings.append)
    (warning,) = warnings
    assert "not the images that were held out when the model was trained" in warning


def test_of_other_images_all_are_taken(run: Path, tmp_path: Path, seen: list[str]) -> None:
    other = write_images(tmp_path / "other", {"ant": 3, "bee": 3, "cat": 3}, seed=9)
    warnings: list[str] = []
    name, _ = evaluate_classifier(load(run), str(other), warn=warnings.append)
    assert name == "all"
    assert sorted(seen) == all_names(other)
    assert warnings == []


@pytest.mark.parametrize(
    ("splits", "asked", "taken", "count"),
    [
        (["train", "val", "test"], None, "test", 6),
        (["train", "val"], None, "val", 6),
        (["train", "test"], None, "test", 6),
        (["train", "val", "test"], "val", "val", 6),
        (["train", "val", "test"], "train", "train", 6),
        (["train", "val", "test"], "all", "all", 18),
        (["train", "test"], "all", "all", 12),
    ],
    ids=str,
)
def test_a_folder_with_splits_is_taken_at_its_word(
    splits: list[str], asked: str | None, taken: str, count: int, tmp_path: Path, seen: list[str]
) -> None:
    for number, split in enumerate(splits):
        write_images(tmp_path / split, {"ant": 2, "bee": 2, "cat": 2}, seed=number)
    name, result = evaluate_classifier(tint_classifier(), str(tmp_path), split=asked)
    assert (name, result.n) == (taken, count)
    folders = {Path(name).parts[0] for name in seen}
    assert folders == (set(splits) if taken == "all" else {taken})


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split, {"ant": 2, "bee": 2})
    with pytest.raises(VitralError, match="has no 'test' split; it has 'train', 'val'"):
        evaluate_classifier(tint_classifier(), str(tmp_path), split="test")


def test_one_image_a_class_is_enough_to_evaluate_all(tmp_path: Path, seen: list[str]) -> None:
    folder = write_images(tmp_path, {"ant": 1, "bee": 1, "cat": 1})
    _, result = evaluate_classifier(tint_classifier(), str(folder), split="all")
    assert (result.n, result.top1) == (3, 1.0)


# --- Labels --------------------------------------------------------------------------------------


def test_labels_in_another_order_than_the_datas_are_matched_by_name(
    image_folder: Path, seen: list[str]
) -> None:
    _, result = evaluate_classifier(tint_classifier("cat ant bee"), str(image_folder), split="all")
    assert result.top1 == 1.0
    assert list(result.per_class) == ["cat", "ant", "bee"]
    assert result.confusion == [[12, 0, 0], [0, 12, 0], [0, 0, 12]]


def test_data_may_lack_classes_of_the_model(image_folder: Path, seen: list[str]) -> None:
    shutil.rmtree(image_folder / "bee")
    _, result = evaluate_classifier(tint_classifier(), str(image_folder), split="all")
    assert result.confusion == [[12, 0, 0], [0, 0, 0], [0, 0, 12]]


def test_classes_that_the_model_lacks_are_named(image_folder: Path) -> None:
    write_images(image_folder, {"dog": 2, "elk": 2})
    with pytest.raises(
        VitralError, match="the data has classes that the model lacks: dog, elk; it knows ant, bee, cat"
    ):
        evaluate_classifier(tint_classifier(), str(image_folder))


# --- Damage and progress -------------------------------------------------------------------------


def damage(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).write_bytes(b"no picture")


def test_a_damaged_image_is_named_and_left_out(image_folder: Path, seen: list[str]) -> None:
    damage(image_folder, ["ant/003.png"])
    warnings: list[str] = []
    _, result = evaluate_classifier(
        tint_classifier(), str(image_folder), split="all", max_damaged=0.1, warn=warnings.append
    )
    assert result.n == 35
    (warning,) = warnings
    assert warning.startswith("skipped damaged image ant/003.png: ")


@pytest.mark.parametrize(
    ("limit", "text"),
    [(0.01, "of 36 images are damaged, more than the limit of 1.0%"), (1.0, "none of the images could")],
)
def test_too_much_damage_is_refused(limit: float, text: str, image_folder: Path, seen: list[str]) -> None:
    damage(image_folder, all_names(image_folder)[1:] if limit < 1 else all_names(image_folder))
    with pytest.raises(VitralError, match=text):
        evaluate_classifier(tint_classifier(), str(image_folder), split="all", max_damaged=limit)


def progress_of(classifier: Classifier, folder: Path) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    told: Callable[[int, int], None] = lambda done, total: calls.append((done, total))  # noqa: E731
    evaluate_classifier(classifier, str(folder), split="all", batch_size=10, max_damaged=0.1, on_images=told)
    return calls


def test_progress_counts_damaged_images_too(image_folder: Path, seen: list[str]) -> None:
    damage(image_folder, ["ant/003.png"])
    assert progress_of(tint_classifier(), image_folder) == [(10, 36), (20, 36), (30, 36), (36, 36)]


def test_worker_processes_measure_the_same(image_folder: Path) -> None:
    _, result = evaluate_classifier(tint_classifier(), str(image_folder), split="all")
    assert result.confusion == [[12, 0, 0], [0, 12, 0], [0, 0, 12]]
