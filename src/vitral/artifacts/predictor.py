"""`Predictor`: an engine with preprocessing and labels; what `predict` has of an artifact, `serve` always."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from vitral.artifacts.engine import Answers, Engine
from vitral.artifacts.prediction import Prediction, likeliest, predicted
from vitral.images.picture import ImageSource
from vitral.images.preprocess import Preprocess
from vitral.images.reading import as_sequence
from vitral.runtime.limits import BATCH, LABELS
from vitral.runtime.ranges import refuse_beyond


@dataclass(frozen=True)
class Predictor:
    """A model that takes images of any kind, by any engine; torch is imported only if the engine needs it."""

    engine: Engine
    preprocess: Preprocess
    labels: tuple[str, ...]
    multi_label: bool = False  # an image shows any number of the labels
    abstain_below: float | None = None  # the least probability of an answer; None: every image is answered
    source: str = ""  # what the model is called

    def __repr__(self) -> str:
        height, width = self.preprocess.img_size
        return (
            f"<Predictor {self.source}: {self.engine.name}, {height}x{width} px, {len(self.labels)} labels>"
        )

    def predict(
        self, images: ImageSource | Iterable[ImageSource], *, top: int = 5, batch_size: int = 32
    ) -> list[Prediction]:
        """The likeliest labels of each image, in order; an unreadable image gives its error instead."""
        return list(self.predictions(as_sequence(images), top=top, batch_size=batch_size))

    def predictions(
        self, images: Iterable[ImageSource], *, top: int = 5, batch_size: int = 32
    ) -> Iterator[Prediction]:
        """As `predict`, one at a time while later images are still being read."""
        refuse_beyond("top", top, LABELS)
        refuse_beyond("batch_size", batch_size, BATCH)
        yield from predicted(
            images,
            self.pixels,
            batch_size,
            lambda pixels: self.engine(np.stack(pixels)).probabilities,
            lambda name, probabilities_L: self.prediction(name, probabilities_L, top),
        )

    def pixels(self, image: ImageSource) -> np.ndarray:
        """What the model sees of an image: uint8 (H, W, 3). Raises ImageError if it cannot be read."""
        return self.preprocess.pixels(image)

    def answers(self, pixels_BHWC: np.ndarray) -> Answers:
        """The engine's answers for images that were read by `pixels`."""
        return self.engine(pixels_BHWC)

    def prediction(self, name: str, probabilities_L: np.ndarray, top: int = 5) -> Prediction:
        """What is said of an image with these probabilities."""
        abstained = self.abstain_below is not None and float(probabilities_L.max()) < self.abstain_below
        return Prediction(name, likeliest(probabilities_L, self.labels, top), abstained=abstained)
