"""A classifier as an engine: torch itself, as the exported forms are compared with and served beside."""

import numpy as np
import torch

from vitral.artifacts.engine import Answers
from vitral.artifacts.predictor import Predictor
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import VitralError


class ClassifierEngine:
    """Answers with the numbers of `Classifier.predict`, its test-time augmentation included."""

    batch_sizes: tuple[int, ...] = ()

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.name = f"torch {torch.__version__.partition('+')[0]}, {classifier.placement}"

    @torch.inference_mode()
    def __call__(self, pixels_BHWC: np.ndarray) -> Answers:
        classifier = self.classifier
        pixels = classifier.placement.put(torch.from_numpy(pixels_BHWC))
        images_BCHW = classifier.preprocess.normalize_pixels(pixels)
        logits_BL, log_probabilities_BL = classifier.answers(images_BCHW)
        return Answers(logits_BL.cpu().numpy(), log_probabilities_BL.exp().cpu().numpy())


def predictor_of(classifier: Classifier, source: str = "", abstain_below: float | None = None) -> Predictor:
    """A `Predictor` with torch as its engine.

    Raises:
        VitralError: if the model has no labels to predict, or is a regression.
    """
    if classifier.metadata.get("regression") or not classifier.labels:
        raise VitralError("this model has no labels to predict; train it on labelled images first")
    return Predictor(
        ClassifierEngine(classifier),
        classifier.preprocess,
        classifier.labels,
        classifier.multi_label,
        abstain_below,
        source,
    )
