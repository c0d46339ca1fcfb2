"""`About`: what must travel with a model's weights, inside the file that holds them.

The same JSON stands in ``manifest.json`` and in the metadata of each exported file, so that a file that has
lost its folder still knows its preprocessing and its labels, and a folder whose files were mixed is noticed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vitral.images.preprocess import Preprocess
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import build


@dataclass(frozen=True)
class About:
    """A model without its weights: what it sees, what it says and where it comes from."""

    name: str  # what the model was called when it was exported
    preprocess: Preprocess
    labels: tuple[str, ...]
    temperature: float = 1.0  # probabilities are softmax(logits / temperature); it is in the graph
    multi_label: bool = False
    abstain_below: float | None = None  # the least probability of an answer; None: every image is answered
    architecture: dict[str, Any] = field(default_factory=dict)  # the fields of `ViTConfig`
    parameters: int = 0
    licence: str | None = None  # of the weights; None: not stated
    source: str | None = None  # where the weights came from before they were trained further
    # Which images were held out from training, and how, so that `eval` judges on those.
    metadata: dict[str, Any] = field(default_factory=dict)
    vitral: str = ""  # the version that exported it

    def to_json(self) -> str:
        """The text that is embedded, byte for byte, in each file."""
        fields = {**asdict(self), "preprocess": self.preprocess.record()}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False, sort_keys=True)


def about_from(values: Mapping[str, Any], described: str) -> About:
    """What `About.to_json` wrote, parsed and checked.

    Args:
        values: the parsed JSON.
        described: what messages call it.

    Raises:
        VitralError: if a field is missing, unknown or unfit.
    """
    if missing := [name for name in ("name", "preprocess", "labels") if name not in values]:
        raise VitralError(f"{described} cannot be used: it has no {missing[0]!r}")
    try:
        return build(About, {**values, "preprocess": build(Preprocess, values["preprocess"])})
    except (VitralError, ValueError, TypeError) as error:
        raise VitralError(f"{described} cannot be used: {error}") from error


def first_difference(one: About, other: About) -> str | None:
    """The name of the first field in which they differ, as JSON has them: a pair is a list there."""
    first, second = (json.loads(about.to_json()) for about in (one, other))
    return next((name for name in first if first[name] != second[name]), None)
