"""`vitral eval`: how well a model does on labelled images, and which it gets wrong."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_table, progress_bar, say, warn
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.evaluation.evaluation import Evaluation
    from vitral.evaluation.mistakes import Mistakes

_SHOWN_CLASSES = 20
_WORD_COLUMNS = {"class", "most often mistaken for"}


def eval(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    split: options.Split = None,
    json_output: options.Json = False,
    wrong: Annotated[
        Path | None,
        options.file(
            "File for a list of the wrong images, the most confident first (.csv or .json).",
            limits.LIST_SUFFIXES,
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        options.file("File for a picture of the worst ones, such as wrong.png.", limits.SHEET_SUFFIXES),
    ] = None,
    max_damaged: options.MaxDamaged = 0.01,
    workers: options.Workers = None,
    tta: options.Tta = "none",
    decoding: options.Decoding = None,
    merge: options.Merge = None,
    column: options.Column = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    trust: options.Trust = False,
) -> None:
    """Evaluate MODEL on labelled images: accuracy with its interval, loss, calibration, and each class.

    For a multi-label model: mean average precision, F1, exact matches and loss.

    \b
    vitral eval runs/photos photos/ --wrong wrong.csv --sheet wrong.png
    """
    from vitral.evaluation.evaluate import evaluate_classifier
    from vitral.runtime.world import joined

    with joined() as world, progress_bar("evaluating") as bar:
        classifier = load_classifier(model, device, precision, tta, merge=merge, trusted=trust)
        if decoding is not None:
            how_to_see: Any = {"decoding": decoding}
            classifier = replace(classifier, preprocess=replace(classifier.preprocess, **how_to_see))
        how_to: dict[str, Any] = {"split": split, "max_damaged": max_damaged, "workers": workers}
        how_to |= {"mistakes": bool(wrong or sheet), "world": world}
        if world.is_first:
            how_to |= {"warn": warn, "on_images": bar}
        name, evaluation = evaluate_classifier(classifier, options.opened(data, column), **how_to)
    if not world.is_first:
        return
    how = classifier.computed_by + ("" if tta == "none" else f", test-time augmentation {tta}")
    how += "" if merge is None else f", merging {merge} patches a layer"
    how += "" if decoding is None else f", decoding {decoding}"
    title = f"{model} on {data}, split {name} ({how})"
    _write_mistakes(evaluation.mistakes, wrong, sheet, f"{model} on {data}")
    if json_output:
        print(to_json(evaluation.to_dict()))
    else:
        print_evaluation(evaluation, title)


def _write_mistakes(mistakes: "Mistakes | None", wrong: Path | None, sheet: Path | None, title: str) -> None:
    if mistakes is None:
        return
    count = f"{len(mistakes.rows):,} of {mistakes.judged:,} wrong"
    if wrong is not None:
        mistakes.write(wrong)
        warn(f"{count}: {wrong}")
    if sheet is not None:
        mistakes.draw(sheet, f"{title}: {count}")
        warn(f"{count}, the worst pictured: {sheet}")


def print_evaluation(evaluation: "Evaluation", title: str) -> None:
    """Print the numbers, and the classes from the worst to the best."""
    say(f"{title}: {evaluation.n:,} images")
    figures = evaluation.figures()
    width = max(len(name) for name, _ in figures)
    for name, value in figures:
        print(f"  {name:{width}}  {value}")
    rows, count = evaluation.class_rows(_SHOWN_CLASSES), len(evaluation.per_class)
    above = "by class" if count <= _SHOWN_CLASSES else f"the {_SHOWN_CLASSES} worst of {count:,} classes"
    cells = [tuple(row.values()) for row in rows]
    print_table(above, tuple(rows[0]), cells, rows[0].keys() - _WORD_COLUMNS)
