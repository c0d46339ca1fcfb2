"""What answers tell is as counted by scikit-learn, by hand and by drawing data whose truth is known."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from torch import Tensor

from tests.test_evaluate import random_logits, tint_classifier
from vitral.data.image_data import open_data
from vitral.data.split import Split
from vitral.evaluation.analysis import abstention, answers
from vitral.evaluation.analysis.abstention import risk_coverage, threshold_for
from vitral.evaluation.analysis.answers import Answers, answers_of, training_images
from vitral.evaluation.analysis.classes import by_class
from vitral.evaluation.analysis.comparison import compare, difference, recipe_differences
from vitral.evaluation.analysis.notable import most_doubtful, worst_errors
from vitral.evaluation.analysis.reliability import reliability
from vitral.evaluation.evaluate import evaluate_classifier
from vitral.evaluation.intervals import Share, wilson
from vitral.evaluation.task import MULTI_LABEL, SINGLE_LABEL
from vitral.runtime.errors import VitralError


def answers_from(log_probabilities_BL: Tensor, labels: Tensor, names: list[str] | None = None) -> Answers:
    """As if a model had said so of images, of which every second one of the split could be read."""
    task = SINGLE_LABEL if labels.ndim == 1 else MULTI_LABEL
    outcomes, count = task.outcomes.of(log_probabilities_BL, labels), len(labels)
    classes = tuple(f"class {place}" for place in range(log_probabilities_BL.shape[1]))
    names = names or [f"image {number}" for number in range(count)]
    split = Split(
        [f"{name}.png" for name in names for _ in range(2)],  # type: ignore[arg-type]  # pyrefly: ignore
        np.repeat(outcomes.labels, 2, axis=0),
        [twin for name in names for twin in (f"{name}, damaged", name)],
    )
    evaluation = task.evaluation.of(outcomes, classes)
    values, rows = log_probabilities_BL.numpy(), 2 * np.arange(count) + 1
    return Answers("test", split, rows, classes, values, outcomes, evaluation, held_out=True)


@pytest.fixture
def single() -> Answers:
    logits_BL, labels_B = random_logits()
    return answers_from(logits_BL.log_softmax(1), labels_B)


@pytest.fixture
def several() -> Answers:
    generator = torch.Generator().manual_seed(1)
    labels_BL = torch.rand(157, 5, generator=generator) < 0.3
    logits_BL = torch.randn(157, 5, generator=generator) + 3 * labels_BL - 1.5
    return answers_from(torch.nn.functional.logsigmoid(logits_BL), labels_BL.float())


def confident(confidences: Any, right: Any) -> Answers:
    """Of two classes, each answer given with its confidence, from a half up."""
    sure = torch.tensor(np.array(confidences), dtype=torch.float32)
    labels = torch.tensor(np.where(right, 0, 1))
    return answers_from(torch.stack([sure, 1 - sure], 1).log(), labels)


# --- The pass ----------------------------------------------------------------------------------------


def test_one_pass_says_what_an_evaluation_and_predictions_say(image_folder: Path) -> None:
    (image_folder / "bee" / "001.png").write_bytes(b"no picture")
    classifier = tint_classifier()
    found = answers_of(classifier, image_folder, split="all", max_damaged=0.5)
    _, evaluation = evaluate_classifier(classifier, image_folder, split="all", max_damaged=0.5)
    assert found.evaluation == evaluation
    assert len(found) == evaluation.n == 35
    assert [name for name, _ in found.damaged] == ["bee/001.png"]
    assert "bee/001.png" not in {found.name(position) for position in range(len(found))}
    images = [found.split.images[int(row)] for row in found.rows]
    predictions = classifier.predict(images, top=3)  # type: ignore[arg-type]  # pyrefly: ignore
    for row, prediction in zip(found.probabilities, predictions, strict=True):
        assert dict(zip(found.classes, row.tolist(), strict=True)) == pytest.approx(
            dict(prediction.top), abs=1e-6
        )


def test_images_that_were_held_out_are_known_as_such(image_folder: Path) -> None:
    val = open_data(image_folder, val_fraction=0.3, seed=5).split("val")
    made = {"val_fraction": 0.3, "seed": 5, "held_out": val.fingerprint}
    classifier = tint_classifier(**made)
    assert answers_of(classifier, image_folder).held_out is True
    assert answers_of(classifier, image_folder, split="train").held_out is False
    assert answers_of(tint_classifier(), image_folder, split="val").held_out is None
    learnt = training_images(classifier, image_folder)
    assert not set(learnt.names) & set(val.names)
    assert len(learnt) + len(val) == 36
    # The model's own order of the classes, whatever that of the data is.
    turned = training_images(tint_classifier("cat bee ant", **made), image_folder)
    assert {name[:3]: label for name, label in zip(turned.names, turned.labels, strict=True)} == {
        "ant": 2,
        "bee": 1,
        "cat": 0,
    }


def test_fewer_images_are_evenly_taken_and_too_many_answers_are_refused(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answers_of(tint_classifier(), image_folder, split="all", images=6)
    assert [found.name(position)[:3] for position in range(6)] == ["ant", "ant", "bee", "bee", "cat", "cat"]
    monkeypatch.setattr(answers, "MOST_NUMBERS", 100)
    with pytest.raises(VitralError, match=r"36 images and 3 classes .* images=33"):
        answers_of(tint_classifier(), image_folder, split="all")


# --- By class ----------------------------------------------------------------------------------------


def test_a_share_has_wilsons_interval() -> None:
    # (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), with 8 of 10.
    z, p, n = 1.959964, 0.8, 10
    reach = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((p + z**2 / (2 * n) + side * reach) / (1 + z**2 / n) for side in (-1, 1))
    found = Share.of(8, 10)
    assert (found.count, found.total, found.value) == (8, 10, 0.8)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert Share.of(0, 0) == Share(0, 0, None, 0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0


def test_classes_are_as_scikit_learn_counts_them(single: Answers) -> None:
    found, said = by_class(single), single.outcomes.answers
    recalls = recall_score(single.labels, said, average=None)
    precisions = precision_score(single.labels, said, average=None)
    assert [row.recall.value for row in found.classes] == pytest.approx(recalls)
    assert [row.precision.value for row in found.classes] == pytest.approx(precisions)
    shares = confusion_matrix(single.labels, said, normalize="true")
    np.testing.assert_allclose(found.normalised.toarray(), shares)
    assert found.classes[3].recall.low < recalls[3] < found.classes[3].recall.high


def test_the_most_confused_pairs_come_first(single: Answers) -> None:
    matrix = confusion_matrix(single.labels, single.outcomes.answers)
    np.fill_diagonal(matrix, 0)
    pairs = by_class(single).pairs
    assert sum(pair.share.count for pair in pairs) == single.outcomes.wrong.sum()
    assert [pair.share.count for pair in pairs] == sorted(matrix[matrix > 0].tolist(), reverse=True)
    for pair in pairs:
        truth, other = (int(name.removeprefix("class ")) for name in (pair.truth, pair.taken_for))
        assert pair.share.count == matrix[truth, other]
        assert pair.share.total == (single.labels == truth).sum()
    equal = [pair for pair in pairs if pair.share.count == pairs[0].share.count]
    assert equal == sorted(equal, key=lambda pair: (pair.share.total, pair.truth, pair.taken_for))


def test_a_class_without_images_or_answers_has_no_share() -> None:
    found = by_class(
        answers_from(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]).log(), torch.tensor([0, 0]))
    )
    assert [row.recall.value for row in found.classes] == [0.5, None, None]
    assert [row.precision.value for row in found.classes] == [1.0, 0.0, None]
    np.testing.assert_allclose(found.normalised.toarray()[1:], 0)


def test_of_several_labels_each_class_is_a_question(several: Answers) -> None:
    found, said = by_class(several), several.outcomes.answers
    assert [row.recall.value for row in found.classes] == pytest.approx(
        recall_score(several.labels, said, average=None)
    )
    assert [row.precision.value for row in found.classes] == pytest.approx(
        precision_score(several.labels, said, average=None)
    )
    assert found.confusion is None
    assert not found.pairs


# --- How sure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "several"])
def test_bins_are_as_scikit_learn_fills_them(kind: str, request: pytest.FixtureRequest) -> None:
    of: Answers = request.getfixturevalue(kind)
    found = reliability(of)
    if kind == "single":
        confidences, right = of.probabilities.max(1), ~of.outcomes.wrong
        assert found.error == of.evaluation.ece
    else:
        confidences, right = of.probabilities.ravel(), of.labels.ravel()
    accuracy, confidence = calibration_curve(right, confidences, n_bins=15)
    filled = [row for row in found.bins if row.accuracy.total]
    assert [row.accuracy.value for row in filled] == pytest.approx(accuracy)
    assert [row.confidence for row in filled] == pytest.approx(confidence)
    assert sum(row.accuracy.total for row in found.bins) == found.questions == len(right)
    gaps = [row.accuracy.total * abs(row.confidence - row.accuracy.value) for row in filled]  # type: ignore[operator]  # pyrefly: ignore
    assert found.error == pytest.approx(sum(gaps) / len(right))
    assert (found.bins[0].low, found.bins[-1].high) == (0, 1)
    assert all((row.confidence is None) == (row.accuracy.total == 0) for row in found.bins)


def test_risk_against_coverage_by_hand() -> None:
    curve = risk_coverage(confident([0.7, 0.9, 0.8], [True, True, False]))
    assert curve is not None
    np.testing.assert_allclose(curve.coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3])
    np.testing.assert_allclose(curve.confidence, [0.9, 0.8, 0.7], rtol=1e-6)
    assert curve.area == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert curve.least_area == pytest.approx((0 + 0 + 1 / 3) / 3)
    assert curve.risk_of_all == pytest.approx(1 / 3)


def test_equal_confidences_count_as_the_mean_over_their_orders() -> None:
    confidences, wrong = np.array([0.9, 0.8, 0.8, 0.8, 0.6]), np.array([0, 1, 0, 0, 1])
    areas = [
        (np.cumsum([wrong[0], *wrong[list(order)], wrong[4]]) / np.arange(1, 6)).mean()
        for order in itertools.permutations([1, 2, 3])
    ]
    curve = risk_coverage(confident(confidences, wrong == 0))
    assert curve is not None
    assert curve.area == pytest.approx(np.mean(areas))
    np.testing.assert_allclose(curve.coverage, [0.2, 0.8, 1])


def test_a_curve_of_few_points_keeps_its_ends(single: Answers) -> None:
    curve = risk_coverage(single)
    assert curve is not None
    few = curve.at_most(10)
    assert len(few.coverage) <= 10
    assert (few.coverage[0], few.coverage[-1]) == (curve.coverage[0], 1)
    assert set(few.risk) <= set(curve.risk)
    assert few.area == curve.area


def test_a_threshold_is_honest_about_new_images() -> None:
    """Answers that mean what they say: of confidences in 0.5..1, at t or above (1 + t) / 2 are right."""
    generator, contained, optimism = np.random.default_rng(0), [], []
    for _ in range(300):
        confidences = generator.uniform(0.5, 1, 200)
        found = abstention._threshold(confidences, generator.uniform(size=200) < confidences, 0.9)
        if found.confidence is not None:
            truth = (1 + found.confidence) / 2
            contained.append(found.accuracy.low <= truth <= found.accuracy.high)
            optimism.append((found.chosen_accuracy or 0) - truth)
    assert len(contained) > 280
    assert np.mean(contained) > 0.93
    assert np.mean(optimism) > 0.01


def test_an_assured_threshold_keeps_its_word() -> None:
    generator, draws, truths = np.random.default_rng(1), 200, []
    for _ in range(draws):
        confidences = generator.uniform(0.5, 1, 1000)
        found = abstention._assured(confidences, generator.uniform(size=1000) < confidences, 0.9)
        truths += [] if found is None else [(1 + found) / 2]
    assert len(truths) > draws / 2
    assert sum(truth < 0.9 for truth in truths) < 0.05 * draws


def test_a_threshold_that_no_image_reaches_is_none() -> None:
    found = threshold_for(confident([0.9, 0.8, 0.7], [False, False, False]), 0.5)
    assert found is not None
    assert (found.confidence, found.chosen_accuracy, found.assured_confidence) == (None, None, None)
    assert found.coverage.count == 0
    assert found.accuracy.value is None


def test_a_model_that_is_always_right_answers_all() -> None:
    found = threshold_for(confident(np.linspace(0.5, 1, 400, endpoint=False), np.ones(400)), 0.95)
    assert found is not None
    assert found.confidence is not None
    assert found.confidence < 0.51
    assert found.coverage.value is not None
    assert found.coverage.value > 0.98
    assert (found.accuracy.value, found.assured_coverage) == (1, 1)
    # Of so many right answers in a row; of 100 it is not: 0.95 ** n = 0.05 / 20 for n = 117.
    few = threshold_for(confident(np.linspace(0.5, 1, 100, endpoint=False), np.ones(100)), 0.95)
    assert few is not None
    assert few.assured_confidence is None
    assert 0.95**100 > (1 - abstention._ASSURANCE) / abstention._TRIED > 0.95**400


def test_several_labels_have_no_one_confidence(several: Answers) -> None:
    assert risk_coverage(several) is None
    assert threshold_for(several, 0.9) is None


# --- Single images -----------------------------------------------------------------------------------


def test_doubtful_and_worst_images_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.44, 0.11], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6]])
    of = answers_from((probabilities + 1e-9).log(), torch.tensor([1, 0, 0, 2]))
    doubtful = most_doubtful(of, 3)
    assert [image.position for image in doubtful] == [1, 0, 3]
    assert [image.margin for image in doubtful] == pytest.approx([0.01, 0.2, 0.4], abs=1e-6)
    worst = worst_errors(of, 5)
    assert [(image.position, image.row, image.name) for image in worst] == [
        (2, 5, "image 2"),
        (0, 1, "image 0"),
    ]
    assert (worst[0].truth, worst[0].answer, worst[0].right) == ("class 0", "class 1", False)
    labels, values = zip(*worst[1].probabilities, strict=True)
    assert labels == ("class 0", "class 1", "class 2")
    assert values == pytest.approx((0.5, 0.3, 0.2))


def test_of_several_labels_the_nearest_to_a_half_is_the_most_doubtful() -> None:
    yes = torch.tensor([[0.9, 0.2], [0.52, 0.1], [0.8, 0.4]])
    of = answers_from(yes.log(), torch.tensor([[1.0, 0], [1, 1], [0, 0]]))
    assert [image.position for image in most_doubtful(of, 2)] == [1, 2]
    worst = worst_errors(of, 2)
    assert [(image.position, image.truth, image.answer) for image in worst] == [
        (1, ("class 0", "class 1"), ("class 0",)),
        (2, (), ("class 0",)),
    ]


# --- Side by side ------------------------------------------------------------------------------------


def test_a_difference_by_hand() -> None:
    first = np.array([True] * 11 + [False] * 9)
    second = first.copy()
    second[[0, 11, 12, 13, 14, 15]] = [False, True, True, True, True, True]
    found = difference(first, second)
    assert (found.gained, found.lost, found.value) == (5, 1, 0.2)
    assert (found.first, found.second) == (0.55, 0.75)
    # Two of the sides of six coins: 2 (1 + 6) / 2**6.
    assert found.p_value == pytest.approx(14 / 64)
    assert not found.beyond_chance
    # 5.5 and 1.5 of 22 images.
    reach = 1.959964 * np.sqrt(7 - 16 / 22) / 22
    assert (found.low, found.high) == pytest.approx((4 / 22 - reach, 4 / 22 + reach))


def test_the_interval_of_a_difference_holds_what_it_says() -> None:
    generator = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        # Right: both 0.6, the first alone 0.05, the second alone 0.15: a difference of 0.1.
        kinds = generator.choice(4, 60, p=[0.6, 0.05, 0.15, 0.2])
        found = difference(kinds <= 1, (kinds == 0) | (kinds == 2))
        held.append(found.low <= 0.1 <= found.high)
    assert 0.935 < np.mean(held) < 0.985


def test_models_are_compared_on_the_images_that_both_judged() -> None:
    right = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.7, 0.3]]).log()
    first = answers_from(right, torch.tensor([0, 1, 1, 0]), ["a", "b", "c", "d"])
    second = answers_from(right.flip(0), torch.tensor([0, 1, 1, 1]), ["d", "c", "b", "e"])
    found = compare(first, second)
    assert (found.all.images, found.left_out) == (3, 2)
    assert (found.all.gained, found.all.lost) == (0, 0)
    assert [(name, of.images) for name, of in found.by_class] == [("class 0", 1), ("class 1", 2)]
    other = answers_from(right, torch.tensor([1, 1, 1, 0]), ["a", "b", "c", "d"])
    with pytest.raises(VitralError, match="a is class 0 for the one run and class 1 for the other"):
        compare(first, other)
    with pytest.raises(VitralError, match="not one image in common"):
        compare(first, answers_from(right, torch.tensor([0, 1, 1, 0]), ["e", "f", "g", "h"]))


def test_recipes_are_compared_setting_by_setting() -> None:
    found = recipe_differences([{"epochs": 3, "seed": 1}, {"epochs": 5, "seed": 1, "mixup": 0.2}])
    assert found == {"epochs": (3, 5), "mixup": (None, 0.2)}
