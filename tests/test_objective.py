"""Losses follow their formulas and other libraries; teachers see what they expect."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional as F

from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.training.objective import Distillation, Objective, Teacher, balanced_weights

IMAGES = torch.zeros(6, 3, 16, 16)


def logits(seed: int = 0) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def mixed() -> Tensor:
    """Targets of which two rows show two classes."""
    targets = F.one_hot(torch.tensor([0, 1, 2, 3, 0, 1]), 4).float()
    targets[4], targets[5] = torch.tensor([0.3, 0.0, 0.7, 0.0]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    return targets


def test_cross_entropy_weighs_classes() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0, 0.25])
    found = Objective("cross_entropy", 0.0, weights)([logits()], mixed(), IMAGES)
    by_hand = -(weights * mixed() * logits().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, by_hand)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 1)
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(balanced_weights(labels, 3), theirs)
    assert balanced_weights(labels, 3)[labels].mean() == pytest.approx(1)


def test_binary_loss_is_timms() -> None:
    timm_loss = pytest.importorskip("timm.loss")
    theirs = timm_loss.BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    found = Objective("binary")([logits()], mixed(), IMAGES)
    torch.testing.assert_close(found, theirs(logits(), mixed()))


def test_binary_loss_smooths_towards_every_class() -> None:
    found = Objective("binary", 0.2)([logits()], mixed(), IMAGES)
    targets = torch.where(mixed() > 0, 0.85, 0.05)
    by_hand = -(targets * logits().sigmoid().log() + (1 - targets) * (-logits()).sigmoid().log()).mean()
    torch.testing.assert_close(found, by_hand)


class Fixed(Teacher):
    """A teacher that answers the same whatever it sees."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return self.answer


def test_hard_distillation_is_deits_equation_3() -> None:
    student, token, teacher = logits(0), logits(1), logits(2)
    how = Distillation(Fixed(teacher), "hard", share=0.5)
    found = Objective("cross_entropy", distillation=how)([student, token], mixed(), IMAGES)
    supervised = -(mixed() * student.log_softmax(1)).sum(1).mean()
    labels = teacher.argmax(1)
    distilled = -token.log_softmax(1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(found, supervised / 2 + distilled / 2)


def test_soft_distillation_is_deits_equation_2() -> None:
    student, teacher = logits(0), logits(2)
    how = Distillation(Fixed(teacher), "soft", share=0.1, temperature=2.0)
    found = Objective("cross_entropy", distillation=how)([student], mixed(), IMAGES)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    supervised = -(mixed() * student.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, 0.9 * supervised + 0.1 * 4 * divergence)


def classifier(labels: tuple[str, ...], preprocess: Preprocess) -> Classifier:
    torch.manual_seed(0)
    model = VisionTransformer(
        preprocess.img_size, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=len(labels)
    )
    return Classifier(model.eval(), preprocess, labels, Placement.choose("cpu", "float32"))


def test_a_teacher_sees_images_as_it_expects_them_and_answers_in_the_students_order() -> None:
    own = Preprocess((16, 16), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    teacher = classifier(("a", "b", "c"), own)
    students = Preprocess((16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def normalized(preprocess: Preprocess) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
        return (pixels - mean) / std

    found = Teacher(teacher, students, ("c", "a"))(normalized(students))
    with torch.no_grad():
        expected = teacher.model(normalized(own))[:, [2, 0]]
    torch.testing.assert_close(found, expected)


def test_a_teacher_sees_its_own_size() -> None:
    teacher = classifier(("a", "b"), Preprocess((32, 32)))
    found = Teacher(teacher, Preprocess((16, 16)), ("a", "b"))(torch.rand(2, 3, 16, 16))
    assert found.shape == (2, 2)


def test_a_teacher_without_a_label_is_refused() -> None:
    teacher = classifier(("a", "b"), Preprocess((16, 16)))
    with pytest.raises(VitralError, match="the teacher lacks the class 'c'"):
        Teacher(teacher, Preprocess((16, 16)), ("a", "c"))
