"""`vitral predict`: the likeliest labels of each image."""

from typing import TYPE_CHECKING, Annotated

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import warn
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.plainjson import to_json
from vitral.runtime.streams import shown

if TYPE_CHECKING:
    from vitral.artifacts.prediction import Prediction
    from vitral.artifacts.predictor import Predictor
    from vitral.inference.classifier import Classifier


def predict(  # noqa: PLR0913 - a command's options
    model: options.Model,
    images: Annotated[list[str], options.text("IMAGE...", "Files, folders or patterns.")],
    top: Annotated[int, options.number(limits.LABELS, "Labels for each image.")] = 3,
    json_output: options.Json = False,
    batch_size: Annotated[int, options.number(limits.BATCH, "Images at a time.")] = 32,
    tta: options.Tta = "none",
    merge: options.Merge = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    trust: options.Trust = False,
) -> None:
    """Print the likeliest labels of each image, one line per image."""
    from vitral.artifacts.manifest import is_artifact
    from vitral.data.sources import find_images

    found = find_images(images)
    if is_artifact(model) and (tta, merge, device, precision) == ("none", None, "auto", "auto"):
        from vitral.artifacts.open import open_artifact

        predictor: Predictor | Classifier = open_artifact(model, trusted=trust)  # without torch
    else:
        predictor = load_classifier(model, device, precision, tta, merge=merge, trusted=trust)
    for note in (*found.notes, *found.failures):
        warn(note)
    failed = 0
    for prediction in predictor.predictions(found.files, top=top, batch_size=batch_size):
        failed += prediction.error is not None
        _print_prediction(prediction, as_json=json_output)
    if failed or found.failures:
        raise VitralError(found.summary(failed))


def _print_prediction(prediction: "Prediction", *, as_json: bool) -> None:
    if as_json:
        top = [{"label": label, "probability": value} for label, value in prediction.top]
        unsure = {"abstained": True} if prediction.abstained else {}
        print(to_json({"image": prediction.image, "top": top, "error": prediction.error, **unsure}))
    elif prediction.error is None:
        labels = "  ".join(f"{shown(label)} {value:.1%}" for label, value in prediction.top)
        unsure = "not sure: " if prediction.abstained else ""
        print(f"{shown(prediction.image)}: {unsure}{labels}")
    if prediction.error is not None:
        warn(f"{prediction.image}: {prediction.error}")
