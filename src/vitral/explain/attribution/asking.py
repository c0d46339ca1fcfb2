"""What a method is asked of images: one class, one against another, or each label that is there."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vitral.explain.attribution.method import Method
from vitral.explain.attribution.methods import METHODS
from vitral.explain.target import Question, Target, ask
from vitral.inference.activation import log_sigmoid
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import VitralError

# As a target, each label that a multi-label model says is there: a map each. "positive" may be a label.
POSITIVE = "positive labels"
_THRESHOLD = 0.5

Ask = Callable[[Tensor], Question]


def asking(classifier: Classifier, method: Method, target: Target, against: Target | None) -> Ask:
    """Gives what turns logits into a question, once the method is known to be able to answer it.

    Args:
        classifier: whose labels are meant.
        method: who is asked.
        target: "predicted", POSITIVE, a label or its index; for a model without a head a feature's index.
        against: another class, or None.

    Raises:
        VitralError: if the method or the model cannot serve, with what would.
    """
    chosen = target != "predicted" or against is not None
    if chosen and not method.of_class:
        which = f"{target!r}" if against is None else f"why {target!r} and not {against!r}"
        raise VitralError(
            f"{method.name} gives one map whatever the class, so it cannot explain {which}; "
            f"{_names(of_class=True)} can"
        )
    if method.of_class and target == "predicted" and not classifier.model.config.num_classes:
        raise VitralError(
            f"this model has features and no classes, and {method.name} explains a class; "
            f"{_names(of_class=False)} can serve, or a number such as 5 as the class, for feature 5"
        )
    if target == POSITIVE and not classifier.multi_label:
        raise VitralError(
            f'target="{POSITIVE}" is for models of several labels an image; this one gives one: "predicted"'
        )
    if target == POSITIVE and against is not None:
        raise VitralError(
            f'target="{POSITIVE}" explains each label for itself; name one to set {against!r} against'
        )
    return partial(ask, labels=classifier.labels, target=target, against=against)


def each_positive(classifier: Classifier, images_BCHW: Tensor) -> tuple[Tensor, Question]:
    """Finds which labels are there: the image of each map, (M,), and the question.

    An image without any is explained for its likeliest.
    """
    with torch.inference_mode(), classifier.placement.autocast():
        logits_BL = classifier.model(images_BCHW).float() / classifier.temperature
    there_BL = log_sigmoid(logits_BL).exp() > _THRESHOLD
    there_BL.scatter_(1, logits_BL.argmax(dim=1, keepdim=True), value=True)
    images_M, labels_M = there_BL.nonzero(as_tuple=True)
    return images_M, Question(labels_M)


def _names(*, of_class: bool) -> str:
    rows = [method for method in METHODS.values() if not method.is_control]
    return ", ".join(method.name for method in rows if method.of_class == of_class)
