"""The model that a server holds: how it answers, and what it says of itself."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitral.artifacts.open import open_with_about
from vitral.artifacts.predictor import Predictor
from vitral.runtime.errors import VitralError
from vitral.ship.inside import inside

if TYPE_CHECKING:
    from vitral.inference.classifier import Classifier

_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Served:
    """A predictor, and the classifier behind it where torch computes."""

    predictor: Predictor
    name: str  # in addresses and answers
    classifier: "Classifier | None" = None
    facts: dict[str, Any] = field(default_factory=dict)  # more that is known of it

    def about(self) -> dict[str, Any]:
        """What ``GET /v1/model`` answers; nothing of the machine is in it."""
        predictor = self.predictor
        return {
            "name": self.name,
            "labels": list(predictor.labels),
            "img_size": list(predictor.preprocess.img_size),
            "multi_label": predictor.multi_label,
            "abstain_below": predictor.abstain_below,
            "engine": predictor.engine.name,
            "preprocess": predictor.preprocess.record(),
            "explains": self.explains,
            **self.facts,
        }

    @property
    def explains(self) -> bool:
        """Whether one can look into it: torch computes, and the model is one of ours."""
        return "grid" in self.facts and self.classifier is not None

    def abstaining_below(self, probability: float | None) -> "Served":
        return replace(self, predictor=replace(self.predictor, abstain_below=probability))


def served_artifact(
    path: str, name: str | None = None, form: str | None = None, *, trusted: bool = False
) -> Served:
    """Opens an artifact, which checks itself; torch is not imported unless its engine needs it.

    Raises:
        VitralError: as `open_artifact`.
    """
    predictor, about = open_with_about(path, form=form, trusted=trusted)
    facts = {"parameters": about.parameters, "temperature": about.temperature, "licence": about.licence}
    return Served(predictor, _named(name or about.name), None, facts)


def served_classifier(classifier: "Classifier", source: str, name: str | None = None) -> Served:
    """Holds a model that torch computes.

    Raises:
        VitralError: if it has no labels to predict.
    """
    from vitral.inference.engine import predictor_of
    from vitral.model.vit import VisionTransformer

    predictor = predictor_of(classifier, source)
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "temperature": classifier.temperature,
    }
    model = classifier.model
    if isinstance(model, VisionTransformer):
        facts |= inside(model.config, classifier.preprocess.img_size)
    return Served(predictor, _named(name or Path(source).resolve().name), classifier, facts)


def _named(name: str) -> str:
    """The name as it can stand in an address."""
    found = _NOT_IN_NAMES.sub("-", name).strip("-.")
    if not found:
        raise VitralError(f"the name {name!r} has no letter that an address can hold; give --name")
    return found[:100]
