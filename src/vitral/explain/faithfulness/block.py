"""Some images that are scored together: their maps by each method, and what these do. Axes as in `curves`."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitral.explain.attribution.attribute import attribute
from vitral.explain.attribution.method import Method, Settings
from vitral.explain.faithfulness.curves import most_first
from vitral.explain.faithfulness.perturb import Curves, Ends, ends, saco, take_away
from vitral.explain.faithfulness.redrawn import redrawn
from vitral.explain.faithfulness.removal import Fill, Removal
from vitral.explain.faithfulness.store import Store
from vitral.explain.target import Question
from vitral.inference.classifier import Classifier

_MAPPED = 8  # images a backward pass


class Block:
    """Images of one batch: what was computed of them is read from the store, else kept there.

    Args:
        classifier: in evaluation mode.
        images_BCHW: preprocessed, on the model's device.
        digests: of the images' bytes, by which they are known.
        store: of the model.
        steps: of a curve.
        seed: of methods that draw, of the order of equal values, and of what is redrawn.
    """

    def __init__(
        self,
        classifier: Classifier,
        images_BCHW: Tensor,
        digests: Sequence[bytes],
        store: Store,
        *,
        steps: int,
        seed: int,
    ) -> None:
        self.classifier, self.images_BCHW, self.store = classifier, images_BCHW, store
        self.steps, self.seed = steps, seed
        self.grid = classifier.model.embedding.grid_of(images_BCHW)
        self.key = hashlib.sha256(b"".join(digests)).hexdigest()
        self.seeds = [_seed(digest, seed) for digest in digests]
        self._ends: dict[Fill, Ends] = {}

    def __len__(self) -> int:
        return len(self.images_BCHW)

    @cached_property
    def question(self) -> Question:
        """The class that the model predicts, of each image."""
        with torch.inference_mode(), self.classifier.placement.autocast():
            target_B = self.classifier.model(self.images_BCHW).float().argmax(dim=1)
        return Question(target_B.clone())

    @cached_property
    def removal(self) -> Removal:
        return Removal(self.classifier, self.images_BCHW, self.question)

    def maps(self, method: Method) -> Tensor:
        """The maps of a method, (B, N)."""
        return self._maps(["map", self.seed], method, lambda: self.classifier)

    def redrawn_maps(self, method: Method, other: "Redrawn") -> Tensor:
        """The maps of the same classes with weights redrawn, (B, N)."""
        return self._maps(["redrawn map", other.stage, self.seed], method, lambda: other.classifier)

    def curves(self, method: Method, fill: Fill) -> tuple[Curves, float]:
        """What the maps of a method do to the scores, and the seconds that it took to see."""

        def compute() -> dict[str, Tensor]:
            order_BN, shared = self._order(method), self._shared(fill)
            started_at = monotonic()
            found = take_away(self.removal, fill, order_BN, shared, self.steps)
            seconds = torch.tensor(monotonic() - started_at, dtype=torch.float64)
            return {name: torch.from_numpy(of) for name, of in vars(found).items()} | {"seconds": seconds}

        found = self.store.get(["curves", fill, self.steps, self.seed, method.name, self.key], compute)
        seconds = float(found.pop("seconds"))
        return Curves(**{name: of.numpy() for name, of in found.items()}), seconds

    def saco(self, method: Method, fill: Fill) -> np.ndarray:
        """SaCo of the maps of a method, (B,)."""

        def compute() -> dict[str, Tensor]:
            order_BN, shared = self._order(method), self._shared(fill)
            return {"saco": torch.from_numpy(saco(self.removal, fill, self.maps(method), order_BN, shared))}

        return self.store.get(["saco", fill, self.seed, method.name, self.key], compute)["saco"].numpy()

    def _order(self, method: Method) -> Tensor:
        return most_first(self.maps(method), self.seeds)

    def _shared(self, fill: Fill) -> Ends:
        if fill not in self._ends:
            self._ends[fill] = ends(self.removal, fill)
        return self._ends[fill]

    def _maps(self, about: list[Any], method: Method, classifier: Callable[[], Classifier]) -> Tensor:
        def compute() -> dict[str, Tensor]:
            return {"maps": self._mapped(classifier(), method)}

        return self.store.get([*about, method.name, self.key], compute)["maps"]

    def _mapped(self, classifier: Classifier, method: Method) -> Tensor:
        """Maps in parts of one size, so that a method that follows gradients fits the memory: (B, N)."""
        settings = Settings(seed=self.seed)

        def maps(part_B: Tensor) -> Tensor:
            question = self.question.take(part_B)
            return attribute(
                classifier, self.images_BCHW[part_B], method, lambda _: question, settings
            ).values

        places_B = torch.arange(len(self), device=self.images_BCHW.device)
        return torch.cat([maps(part_B).flatten(1).float().cpu() for part_B in places_B.split(_MAPPED)])


class Redrawn:
    """A classifier whose weights are redrawn when it is first asked for."""

    def __init__(self, original: Classifier, stage: str, seed: int) -> None:
        self.original, self.stage, self.seed = original, stage, seed

    @cached_property
    def classifier(self) -> Classifier:
        return replace(self.original, model=redrawn(self.original.model, self.stage, self.seed))


def _seed(digest: bytes, seed: int) -> int:
    mixed = hashlib.blake2b(digest + seed.to_bytes(8), digest_size=7).digest()
    return int.from_bytes(mixed)
