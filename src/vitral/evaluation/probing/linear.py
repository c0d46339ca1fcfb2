"""The linear probe: multinomial logistic regression on frozen features."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitral.evaluation.probing.choosing import Choice, Labelled, Method, choose, temperature_of
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes
from vitral.inference.features import PooledFeatures
from vitral.model.config import Pooling
from vitral.model.vit import VisionTransformer

# Of half the squared weights of standardized features, beside the mean cross-entropy.
PENALTIES = tuple(10.0 ** (step / 2) for step in range(-8, 3))
_FIT_STEPS = 1000


@dataclass(frozen=True)
class LinearResult:
    """Multinomial logistic regression on standardized features."""

    features: Pooling
    layer: int
    penalty: float  # one of PENALTIES
    held_out_top1: float | None  # of the held-out labelled images; None: there were none
    held_out_loss: float | None  # the least among what was tried
    temperature: float  # fitted on them; loss and calibration error are of the probabilities at it
    evaluation: SingleLabelEvaluation


@dataclass(frozen=True)
class LinearHead:
    """Logits = vectors @ weight.T + bias, of the features as they come."""

    weight_LD: Tensor
    bias_L: Tensor

    @classmethod
    def fit(cls, vectors_ND: Tensor, labels_N: np.ndarray, num_classes: int, penalty: float) -> "LinearHead":
        """Multinomial logistic regression on standardized vectors, the scaling folded into the head.

        Minimizes the mean cross-entropy + penalty / 2 * |weight|² (the weight of the standardized vectors);
        of two classes, as usual, with one weight vector for both.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        mean_D, std_D = vectors_ND.mean(0), vectors_ND.std(0, correction=0)
        # A feature that never varies tells nothing, and rounding must not blow it up.
        std_D = torch.where(std_D > 1e-6 * (1 + mean_D.abs()), std_D, torch.ones_like(std_D))
        standardized = ((vectors_ND - mean_D) / std_D).numpy()
        model = LogisticRegression(C=1 / (penalty * len(labels_N)), max_iter=_FIT_STEPS)
        with warnings.catch_warnings(), _blas().limit(limits=1, user_api="blas"):
            # So many steps are near enough: what is held out decides whether the answer is good.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(standardized, labels_N)
        weight, bias = (
            torch.from_numpy(np.asarray(part)).double() for part in (model.coef_, model.intercept_)
        )
        if num_classes == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        weight /= std_D.double()
        return cls(weight.float(), (bias - weight @ mean_D.double()).float())

    def __call__(self, vectors_ND: Tensor) -> Tensor:
        return vectors_ND @ self.weight_LD.T + self.bias_L

    def put_into(self, model: VisionTransformer) -> None:
        """In the place of the weights of its head, which is of the same shape."""
        model.head.load_state_dict({"weight": self.weight_LD, "bias": self.bias_L})


@cache
def _blas() -> Any:
    """The threads of the libraries that scikit-learn's products run on.

    With two of them, beside torch's two, the products of a fit took 9 to 20 times as long (docs/log.md,
    2026-11-26).
    """
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def fit_linear(
    labelled: Labelled, kind: Pooling, layers: Sequence[int], method: Method
) -> tuple[Choice, LinearHead]:
    """The layer and penalty that did best on held-out images, and the head fitted so to all of them."""
    choice = choose(labelled, kind, layers, method)
    vectors_ND = labelled.of(choice)
    return choice, LinearHead.fit(vectors_ND, labelled.labels, labelled.num_classes, choice.setting)


def _linear_answers(
    vectors_ND: Tensor, labels_N: np.ndarray, queries_QD: Tensor, num_classes: int, penalties: Sequence[float]
) -> list[Tensor]:
    return [LinearHead.fit(vectors_ND, labels_N, num_classes, p)(queries_QD) for p in penalties]


# By the loss: of a few held-out images it tells more than their accuracy does (docs/log.md).
LINEAR = Method(PENALTIES, 0.1, _linear_answers, lambda choice: -(choice.held_out_loss or 0.0))


def judge_linear(
    choice: Choice, head: LinearHead, judged: PooledFeatures, classes: Sequence[str]
) -> LinearResult:
    temperature = temperature_of(choice)
    logits_NL = head(judged.of(choice.layer, choice.features)) / temperature
    evaluation = SingleLabelEvaluation.of(
        SingleLabelOutcomes.of(logits_NL, torch.from_numpy(judged.labels)), classes
    )
    return LinearResult(
        choice.features,
        choice.layer,
        choice.setting,
        choice.held_out_top1,
        choice.held_out_loss,
        temperature,
        evaluation,
    )
