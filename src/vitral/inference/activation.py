"""From logits (B, L) to the logarithms of probabilities: softmax, or each label for itself."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def log_softmax(logits_BL: Tensor) -> Tensor:
    """Of one label an image."""
    return logits_BL.log_softmax(1)


def log_sigmoid(logits_BL: Tensor) -> Tensor:
    """Of any number of labels per image, each a question of its own."""
    return F.logsigmoid(logits_BL)


def log_activation(*, multi_label: bool) -> Callable[[Tensor], Tensor]:
    return log_sigmoid if multi_label else log_softmax
