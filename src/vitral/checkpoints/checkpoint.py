"""A checkpoint as the rest of Vitral uses it, whatever it was read from."""

from dataclasses import dataclass, field
from typing import Any

from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that its use needs."""

    model: VisionTransformer  # or a module of the user's, in Python alone (`own`)
    preprocess: Preprocess
    labels: tuple[str, ...]  # empty for a model without a head
    metadata: dict[str, Any] = field(default_factory=dict)  # where it comes from, how data was split
    temperature: float = 1.0  # probabilities are softmax(logits / temperature); fitted on validation images
    multi_label: bool = False  # each class for itself: probabilities are sigmoid(logits / temperature)
    notes: tuple[str, ...] = ()  # what no file of the source states, and what was taken; for the user to read
