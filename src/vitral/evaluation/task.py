"""`Task`: what differs between one label an image and several. `task_of` alone decides which it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vitral.data.batches import Batch
from vitral.evaluation.evaluation import Evaluation
from vitral.evaluation.multi_label import MultiLabelEvaluation, MultiLabelOutcomes
from vitral.evaluation.outcomes import Outcomes, Share, nothing_read
from vitral.evaluation.single_label import SingleLabelEvaluation, SingleLabelOutcomes
from vitral.inference.activation import log_sigmoid, log_softmax
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError
from vitral.runtime.world import ALONE, World


class Task(ABC):
    """What a model says of an image, and how that is judged."""

    words: ClassVar[str]  # how many classes an image shows
    activation_words: ClassVar[str]  # what is done to the logits
    loss: ClassVar[Literal["cross_entropy", "binary"]]  # what training minimizes unless told otherwise
    calibrates: ClassVar[bool]  # whether a temperature is fitted to the probabilities
    outcomes: ClassVar[type[Outcomes]]
    evaluation: ClassVar[type[Evaluation]]

    @staticmethod
    @abstractmethod
    def log_probabilities(logits_BL: Tensor) -> Tensor:
        """Apply the activation: logits (B, L) -> logarithms of probabilities (B, L)."""

    @staticmethod
    @abstractmethod
    def hits(logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Count the images whose likeliest class the targets show, as a scalar on their device."""

    @staticmethod
    @abstractmethod
    def renumber(labels: np.ndarray, index: np.ndarray, num_classes: int) -> np.ndarray:
        """Express a split's labels in another list of classes, class i being there `index[i]`."""

    @property
    def score_name(self) -> str:
        """The figure that people are told of an epoch: its name in an `Evaluation` and in JSON."""
        return self.evaluation.score_name

    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        classes: Iterable[str],
        placement: Placement,
        on_batch: Callable[[Batch], None] = lambda _: None,
        *,
        temperature: float = 1.0,
        world: World = ALONE,
    ) -> Evaluation:
        """Run a model over every batch and judge its answers.

        Several processes each have a share of the batches, and all get the evaluation of all.

        Args:
            model: images (B, C, H, W) -> logits (B, L), on the placement's device.
            batches: each image once.
            classes: the names of the L classes.
            placement: device and precision to compute with.
            on_batch: told of each batch, for progress and damaged images.
            temperature: probabilities are of logits / temperature.
            world: the processes.

        Raises:
            VitralError: if no image could be read, or an answer is not a finite number.
        """
        was_training = model.training
        rows: list[np.ndarray] = []

        def note(batch: Batch) -> None:
            rows.append(batch.rows)
            on_batch(batch)

        def share() -> Share:
            parts = [
                self.outcomes.of(self.log_probabilities(logits_BL / temperature), labels_B)
                for logits_BL, labels_B in outputs(model.eval(), batches, placement, note, some=world.alone)
            ]
            return np.concatenate([np.empty(0, dtype=np.int64), *rows]), parts

        shares = world.gathered(share)
        model.train(was_training)
        return world.from_first(lambda: self.evaluation.of(self.outcomes.of_shares(shares), classes))

    def score(self, evaluation: Evaluation) -> float:
        """Return the figure that `score_name` names."""
        return evaluation.score

    def summary_fields(self, score: float) -> dict[str, Any]:
        """Return a run's best score under its true name, for ``summary.json``."""
        return {f"val_{self.score_name}": score}

    def probabilities(self, temperature: float) -> str:
        """Return what is done to the logits, for people."""
        divided = "logits" if temperature == 1 else f"logits / {temperature:.3f}"
        return self.activation_words.format(divided)

    def headline(self, figures: Mapping[str, Any]) -> str:
        """Return the score of `Evaluation.to_dict` in words, with its interval if it has one."""
        text = f"{self.evaluation.score_words} {figures[self.score_name]:.2%}"
        if "ci95" not in figures:
            return text
        low, high = figures["ci95"]
        return f"{text} (95 % interval {low:.2%} to {high:.2%})"


class SingleLabel(Task):
    """An image shows one class: softmax, cross-entropy, accuracy."""

    words = "one class per image"
    activation_words = "softmax({})"
    loss = "cross_entropy"
    calibrates = True
    outcomes = SingleLabelOutcomes
    evaluation = SingleLabelEvaluation

    log_probabilities = staticmethod(log_softmax)

    @staticmethod
    def hits(logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
        return (logits_BL.argmax(1) == targets_BL.argmax(1)).sum()

    @staticmethod
    def renumber(labels: np.ndarray, index: np.ndarray, num_classes: int) -> np.ndarray:  # noqa: ARG004
        return index[labels]


class MultiLabel(Task):
    """An image shows any number of classes: sigmoid, binary cross-entropy, mean average precision."""

    words = "any number of classes per image"
    activation_words = "sigmoid({}), each label for itself (multi-label)"
    loss = "binary"
    calibrates = False
    outcomes = MultiLabelOutcomes
    evaluation = MultiLabelEvaluation

    log_probabilities = staticmethod(log_sigmoid)

    @staticmethod
    def hits(logits_BL: Tensor, targets_BL: Tensor) -> Tensor:
        # An image of no class is never among them.
        return (targets_BL.gather(1, logits_BL.argmax(1)[:, None]) > 0).sum()

    @staticmethod
    def renumber(labels: np.ndarray, index: np.ndarray, num_classes: int) -> np.ndarray:
        shown = np.zeros((len(labels), num_classes), dtype=bool)
        shown[:, index] = labels
        return shown


SINGLE_LABEL, MULTI_LABEL = SingleLabel(), MultiLabel()


class _Labelled(Protocol):
    @property
    def multi_label(self) -> bool: ...


def task_of(what: _Labelled) -> Task:
    """Return the task of a checkpoint, a classifier, a split or all of a data source."""
    return MULTI_LABEL if what.multi_label else SINGLE_LABEL


@torch.inference_mode()
def outputs(
    answer: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    placement: Placement,
    on_batch: Callable[[Batch], None] = lambda _: None,
    *,
    some: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the answers (B, L) in float32 and the labels of each batch that has a readable image.

    Args:
        answer: images (B, C, H, W) -> logits (B, L); a model in evaluation mode, for one.
        batches: each image once.
        placement: device and precision.
        on_batch: told of each batch.
        some: whether there has to be an image; another process may have some.

    Raises:
        VitralError: if no image could be read, or an answer is not a finite number.
    """
    found = False
    for batch in batches:
        on_batch(batch)
        if len(batch.labels):
            found = True
            with placement.autocast():
                logits_BL = answer(placement.put(batch.images))
            if not bool(torch.isfinite(logits_BL).all()):
                raise VitralError(_not_finite(placement))
            yield logits_BL.float(), placement.put(batch.labels)
    if not found and some:
        raise nothing_read()


def _not_finite(placement: Placement) -> str:
    """Weights are damaged, or overflow on the way."""
    advice = "" if placement.precision == torch.float32 else "; precision=float32 may help"
    return f"the model's answers are not finite numbers, so there is nothing to evaluate{advice}"
