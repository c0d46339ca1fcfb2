"""What a method of attribution is: what it is given, what it gives, and what a stranger is told of it.

Axes are those of `model/embedding.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from vitral.explain.target import Question
from vitral.inference.classifier import Classifier
from vitral.model.config import ViTConfig
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.spelling import meant


@dataclass(frozen=True)
class Settings:
    """What the slow and the random methods can be told."""

    seed: int = 0
    steps: int = 32  # integrated gradients: points between no image and the image
    masks: int = 1000  # RISE: random choices of patches
    kept: float = 0.5  # RISE: the share of the patches that each choice keeps
    progress: Callable[[float], None] = lambda _: None  # is told which share of the work is done

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Settings":
        """Reads settings by their names. Raises VitralError if one is unknown or out of its range."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise VitralError(
                    f"methods have no setting {name!r}; they have {', '.join(known)}{meant(name, known)}"
                )
        settings = cls(**options)
        for name in ("steps", "masks"):
            if getattr(settings, name) < 1:
                raise VitralError(f"{name} is {getattr(settings, name)}; it is 1 or more")
        if not 0 < settings.kept < 1:
            raise VitralError(f"kept is {settings.kept}; it is a share above 0 and below 1")
        return settings


@dataclass(frozen=True)
class Subject:
    """A batch of images, the model, and what is asked of them."""

    classifier: Classifier
    images_BCHW: Tensor  # preprocessed, on the model's device
    ask: Callable[[Tensor], Question]  # logits (B, L) -> the score to explain
    settings: Settings = Settings()

    @property
    def model(self) -> VisionTransformer:
        return self.classifier.model


class Found(NamedTuple):
    """What a method gives for a batch."""

    map_BT: Tensor  # of all tokens, or of the patches alone where no other token can get anything
    logits_BL: Tensor
    certificate: float = 0.0  # see `Relevance`


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    name: str
    says: str  # what the map shows, for someone who has never heard of the method
    needs: str  # of the model
    of_class: bool  # whether the map depends on the class that is asked for
    cost: Callable[[ViTConfig, Settings], float]  # forward passes of one image, roughly
    reference: str
    compute: Callable[[Subject], Found]
    limits: str = ""  # what to know before believing it
    layers: str = "all"  # which the map is of: all, the last, or none, but what goes in and what comes out
    is_control: bool = False  # knows nothing of the model
