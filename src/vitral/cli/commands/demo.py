"""`vitral demo`: the main job with nothing to download, on scikit-learn's handwritten digits."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vitral.cli import options
from vitral.cli.commands.eval import print_evaluation
from vitral.runtime.process import keep_freed_memory

if TYPE_CHECKING:
    from vitral.evaluation.evaluation import Evaluation
    from vitral.training.events import Listener

_PICTURED = 40


def demo(
    out: Annotated[Path, options.folder("Folder for the model.")] = Path("runs/demo"),
) -> None:
    """Train a small model on handwritten digits (scikit-learn's), evaluate it, and say what to try next."""
    from vitral.cli.training import TrainingConsole

    keep_freed_memory()
    folder = _free_folder(out)
    result = learn_digits(folder, [TrainingConsole()])
    print_evaluation(result.evaluation, f"{folder} on the held-out fifth of the digits")
    print(f"\nSome of them, with what the model says: {result.picture}\n\nTry next:")
    name = shlex.quote(str(folder))
    print(f"  vitral predict {name} {name}/digit-1.png {name}/digit-2.png")
    print(f"  vitral eval {name} digits --split val --json")
    print(f"  vitral report {name} digits --out report.html")
    print("  vitral info ViT-B/16")


@dataclass(frozen=True)
class Demo:
    folder: Path
    evaluation: "Evaluation"
    picture: Path


def learn_digits(folder: Path, listeners: "Sequence[Listener]" = ()) -> Demo:
    """Train on four fifths of the digits, evaluate on the held-out fifth and draw some of it."""
    from vitral.data.image_data import open_data
    from vitral.evaluation.evaluate import evaluate_classifier
    from vitral.images.picture import open_image
    from vitral.images.sheet import prediction_sheet
    from vitral.inference.classifier import load
    from vitral.recipes.recipe import Recipe
    from vitral.training.loop import train

    data = open_data("digits")
    train(data, folder, Recipe(epochs=20), listeners=listeners)
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


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... where no run is yet."""
    folder, number = wanted, 1
    while (folder / "recipe.toml").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
