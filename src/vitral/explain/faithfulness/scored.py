"""The numbers of one method of attribution on one model."""

from dataclasses import dataclass

from vitral.explain.faithfulness.redrawn import HALF, PASSES_BELOW
from vitral.explain.faithfulness.removal import Fill
from vitral.explain.faithfulness.statistics import Estimate


@dataclass(frozen=True)
class FillScores:
    """A method's faithfulness under one fill, in logits of the predicted class."""

    srg: Estimate  # insertion less deletion: by how much the order is better than its reverse
    deletion: Estimate  # mean logit while the most relevant patches go first; low is faithful
    insertion: Estimate  # mean logit while the most relevant come first; high is faithful
    group: str  # methods that share a letter do not differ in SRG beyond chance
    deletion_curve: tuple[float, ...]  # mean logit at each point of `Faithfulness.removed`
    insertion_curve: tuple[float, ...]  # mean logit with that share put in
    seconds: float  # that the curves took


@dataclass(frozen=True)
class Scored:
    """One method, or a control."""

    method: str
    control: bool
    fills: dict[Fill, FillScores]
    saco: Estimate  # from -1 to 1: whether groups of patches count for as much as the map says
    redrawn: dict[str, Estimate]  # stage of `redrawn.STAGES` -> rank correlation with the map as it was

    @property
    def shows_what_was_learned(self) -> bool:
        """Whether the map changes with the weights (`redrawn.PASSES_BELOW`)."""
        return HALF in self.redrawn and self.redrawn[HALF].mean < PASSES_BELOW
