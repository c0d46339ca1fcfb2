"""Likely label errors are those of cleanlab, of the paper's definition, and those that were put in."""

import numpy as np
import pytest
import torch

from tests.test_analysis import answers_from
from vitral.evaluation.analysis.answers import Answers
from vitral.evaluation.analysis.label_errors import label_errors


def noisy(count: int, classes: int, share: float, seed: int = 0) -> tuple[Answers, np.ndarray]:
    """Answers of a good model, and which of the labels were changed."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (count,), generator=generator)
    logits_BL = torch.randn(count, classes, generator=generator)
    # Some classes are harder than others.
    logits_BL[torch.arange(count), truth] += 2 + 3 * truth / classes
    changed = torch.rand(count, generator=generator) < share
    labels = torch.where(changed, (truth + 1) % classes, truth)
    return answers_from(logits_BL.log_softmax(1), labels), changed.numpy()


def several(count: int = 400, classes: int = 4) -> Answers:
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(count, classes, generator=generator) < 0.3
    logits_BL = 1.5 * torch.randn(count, classes, generator=generator) + 5 * truth - 2.5
    labels = truth ^ (torch.rand(count, classes, generator=generator) < 0.05)
    return answers_from(torch.nn.functional.logsigmoid(logits_BL), labels.float())


def test_four_images_by_hand() -> None:
    # Thresholds: class 0 (0.8 + 0.6 + 0.1) / 3 = 0.5, class 1 0.7, class 2 has no image.
    yes = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]])
    found = label_errors(answers_from(yes.log(), torch.tensor([0, 0, 0, 1])))
    np.testing.assert_allclose(found.thresholds, [0.5, 0.7, np.inf], rtol=1e-6)
    assert found.joint.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    (suspect,) = found.suspects
    assert (suspect.image.position, suspect.given, suspect.suggested) == (2, "class 0", "class 1")
    assert suspect.self_confidence == pytest.approx(0.1)
    assert suspect.margin == pytest.approx(0.1 - 0.8)
    # A third of the three images of class 0.
    assert found.share == pytest.approx(1 / 4)


def test_changed_labels_are_found() -> None:
    of, changed = noisy(2000, 10, 0.05)
    found = label_errors(of)
    named = {suspect.image.position for suspect in found.suspects}
    hits = len(named & set(np.flatnonzero(changed).tolist()))
    assert hits > 0.5 * changed.sum()
    assert hits > 0.7 * len(named)
    assert changed[[suspect.image.position for suspect in found.suspects[:30]]].mean() > 0.9
    assert found.share == pytest.approx(changed.mean(), abs=0.03)


@pytest.mark.parametrize(("count", "classes", "share"), [(2000, 10, 0.05), (300, 3, 0.2), (500, 40, 0.1)])
def test_suspects_are_those_of_cleanlab(count: int, classes: int, share: float) -> None:
    pytest.importorskip("cleanlab", reason="cleanlab, of the extra test, is not installed")
    from cleanlab.count import compute_confident_joint, get_confident_thresholds
    from cleanlab.filter import find_label_issues

    of, _ = noisy(count, classes, share)
    labels, probabilities = of.labels, of.probabilities.astype(float)
    theirs = find_label_issues(
        labels=labels,
        pred_probs=probabilities,
        return_indices_ranked_by="self_confidence",
        filter_by="confident_learning",
        n_jobs=1,
    )
    found = label_errors(of)
    assert [suspect.image.position for suspect in found.suspects] == theirs.tolist()
    assert len(theirs) > 10
    np.testing.assert_allclose(found.thresholds, get_confident_thresholds(labels, probabilities), rtol=1e-5)
    joint = compute_confident_joint(labels, probabilities, calibrate=False)
    np.testing.assert_array_equal(found.joint, joint)


def test_of_several_labels_too() -> None:
    pytest.importorskip("cleanlab", reason="cleanlab, of the extra test, is not installed")
    from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class

    of = several()
    labels = [np.flatnonzero(row).tolist() for row in of.labels]
    theirs = find_multilabel_issues_per_class(
        labels, of.probabilities.astype(float), filter_by="confident_learning", n_jobs=1
    )
    found = label_errors(of)
    ours = np.zeros_like(of.labels)
    for suspect in found.suspects:
        place = int(suspect.given.split()[-1])
        assert suspect.suggested == ("" if suspect.given.startswith("not") else "not ") + f"class {place}"
        ours[suspect.image.position, place] = True
    np.testing.assert_array_equal(ours, theirs)
    assert 20 < len(found.suspects) < 200


def test_a_model_that_learnt_the_images_is_said_to_hide_errors() -> None:
    from dataclasses import replace

    of, _ = noisy(100, 3, 0.1)
    assert "no part in its answers" in label_errors(of).note
    assert "not found here" in label_errors(replace(of, held_out=False)).note
    assert "No record" in label_errors(replace(of, held_out=None)).note


def test_images_that_are_all_alike_are_no_errors() -> None:
    same = torch.tensor([[0.7, 0.2, 0.1]] * 9).log()
    found = label_errors(answers_from(same, torch.zeros(9, dtype=torch.int64)))
    assert not found.suspects
    assert found.joint[0, 0] == 9
    assert found.share == 0
