"""The main job with nothing to download: a Vision Transformer learns scikit-learn's handwritten digits."""

from dataclasses import dataclass
from pathlib import Path

from vitral.data.image_data import open_data
from vitral.evaluation.metrics import Evaluation, evaluate_classifier
from vitral.images.preprocess import open_image
from vitral.images.sheet import prediction_sheet
from vitral.inference.classifier import load
from vitral.recipes.recipe import Recipe
from vitral.training.run import Reporter, train

_PICTURED = 40


@dataclass(frozen=True)
class Demo:
    folder: Path
    evaluation: Evaluation
    picture: Path


def demo(folder: Path, reporter: Reporter | None = None) -> Demo:
    """Trains on four fifths of the digits, evaluates on the held-out fifth and draws some of it."""
    data = open_data("digits")
    train(data, folder, Recipe(epochs=20), reporter=reporter)
    classifier = load(folder)
    _, evaluation = evaluate_classifier(classifier, "digits", split="val")
    held_out = data.split("val")
    images = [open_image(held_out.images[index]) for index in range(_PICTURED)]
    sheet = prediction_sheet(
        f"Held-out digits: {evaluation.top1:.1%} of {evaluation.n} right",
        images,
        [prediction.top[0] for prediction in classifier.predict(images)],
        [data.classes[label] for label in held_out.labels[:_PICTURED]],
    )
    sheet.save(folder / "predictions.png")
    for index in range(3):
        images[index].save(folder / f"digit-{index + 1}.png")
    return Demo(folder, evaluation, folder / "predictions.png")
