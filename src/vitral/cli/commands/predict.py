"""`vitral predict`: the likeliest labels of each image."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_lines, progress_bar, warn, warnings_as_messages
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.plainjson import to_json
from vitral.runtime.stopping import Interrupted
from vitral.runtime.streams import shown

if TYPE_CHECKING:
    from vitral.artifacts.prediction import Prediction
    from vitral.artifacts.predictor import Predictor
    from vitral.data.sources import Unlabelled
    from vitral.inference.classifier import Classifier
    from vitral.inference.scoring.score import Scored


def predict(  # noqa: PLR0913 - a command's options
    model: options.Model,
    images: Annotated[
        list[str], options.text("IMAGE...", "Files, folders or patterns; with --out also any DATA.")
    ],
    out: Annotated[
        Path | None, options.folder("Folder of parquet files for the answers, of any number of images.")
    ] = None,
    top: Annotated[int, options.number(limits.LABELS, "Labels for each image.")] = 3,
    json_output: options.Json = False,
    batch_size: Annotated[int, options.number(limits.BATCH, "Images at a time.")] = 32,
    tta: options.Tta = "none",
    merge: options.Merge = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    trust: options.Trust = False,
    column: options.Column = None,
    engine: Annotated[str, options.choice(limits.SCORING, ": what scores into --out.")] = "local",
    actors: Annotated[
        int | None,
        options.number(limits.ACTORS, "Processes of Ray; by default one a GPU, or else one a core."),
    ] = None,
) -> None:
    """Print the likeliest labels of each image, one line per image; or write them to --out.

    With --out, the same command goes on where it was stopped.

    \b
    vitral predict runs/photos new/
    vitral predict runs/photos new/ --out scores/
    """
    how: dict[str, Any] = {"top": top, "batch_size": batch_size, "tta": tta, "merge": merge}
    how |= {"device": device, "precision": precision, "trusted": trust}
    if out is not None:
        found = _found(images, column)
        _score(model, found, out, as_json=json_output, engine=engine, actors=actors, **how)
        return
    if engine != "local" or actors is not None or column:
        raise typer.BadParameter(
            "name the folder that --engine, --actors and --column are for", param_hint="--out"
        )
    _print_predictions(model, images, as_json=json_output, **how)


def _print_predictions(
    model: str, images: list[str], top: int, batch_size: int, *, as_json: bool, **how: Any
) -> None:
    from vitral.data.sources import find_images, kind_of

    for word in images:
        if kind_of(word) != "folder" and not os.path.isdir(word):
            raise VitralError(f"{word} is no image, but data that holds some; score it with --out FOLDER")
    found = find_images(images)
    predictor = _predictor(model, **how)
    for note in (*found.notes, *found.failures):
        warn(note)
    failed = 0
    for prediction in predictor.predictions(found.files, top=top, batch_size=batch_size):
        failed += prediction.error is not None
        _print_prediction(prediction, as_json=as_json)
    if failed or found.failures:
        raise VitralError(found.summary(failed))


def _predictor(
    model: str, device: str, precision: str, tta: str, merge: str | None, *, trusted: bool
) -> "Predictor | Classifier":
    from vitral.artifacts.manifest import is_artifact

    if is_artifact(model) and (tta, merge, device, precision) == ("none", None, "auto", "auto"):
        from vitral.artifacts.open import open_artifact

        return open_artifact(model, trusted=trusted)  # without torch
    return load_classifier(model, device, precision, tta, merge=merge, trusted=trusted)


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


def _found(words: list[str], column: list[str] | None) -> "Unlabelled":
    """The images that one word names, of whatever kind, or the files that several do."""
    from vitral.data.sources import Unlabelled, find_images, find_unlabelled

    if len(words) == 1:
        return find_unlabelled(words[0], options.columns_of(column))
    several = find_images(words)
    files = [Path(file) for file in several.files]
    return Unlabelled(files, several.files, (*several.notes, *several.failures))


def _score(model: str, found: "Unlabelled", out: Path, *, as_json: bool, **how: Any) -> None:
    from vitral.inference.scoring.score import score

    for note in found.notes:
        warn(note)
    with _going_on(out), warnings_as_messages(), progress_bar("scoring") as bar:
        scored = score(model, found, out, on_images=bar, **how)
    if as_json:
        print(to_json(asdict(scored)))
    else:
        print_lines(_told(scored))


@contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Say after a signal that nothing is lost."""
    try:
        yield
    except Interrupted:
        if out.is_dir():
            warn(f"{out} keeps what is scored; the same command goes on from there")
        raise


def _told(scored: "Scored") -> str:
    before = f", {scored.resumed:,} of them before" if scored.resumed else ""
    unread = f"; {scored.failed:,} could not be read, see the column error" if scored.failed else ""
    files = "file" if scored.parts == 1 else "files"
    return f"{scored.folder}: {scored.images:,} images in {scored.parts:,} {files}{before}{unread}"
