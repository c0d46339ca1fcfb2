"""`vitral eval`: how well a model does on labelled images, and which it gets wrong."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_table, progress_bar, say, warn
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.evaluation.metrics import Evaluation
    from vitral.evaluation.mistakes import Mistakes
    from vitral.evaluation.multilabel import MultiLabelEvaluation

_SHOWN_CLASSES = 20


def eval(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    split: options.Split = None,
    json_output: options.Json = False,
    wrong: Annotated[
        Path | None,
        options.file("List of the wrong images, the surest first, as .csv or .json.", limits.LIST_SUFFIXES),
    ] = None,
    sheet: Annotated[
        Path | None, options.file("Picture of the worst of them, such as wrong.png.", limits.SHEET_SUFFIXES)
    ] = None,
    max_damaged: options.MaxDamaged = 0.01,
    workers: options.Workers = None,
    tta: options.Tta = "none",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Accuracy with its interval, loss, calibration, per class and confusion, on labelled images.

    Of a multi-label model: mean average precision, F1, exact matches and loss.

    \b
    vitral eval runs/photos photos/ --wrong wrong.csv --sheet wrong.png
    """
    from vitral.evaluation.metrics import evaluate_classifier, evaluate_multi_label_classifier
    from vitral.evaluation.multilabel import MultiLabelEvaluation

    classifier = load_classifier(model, device, precision, tta)
    how = f"{classifier.placement}" + ("" if tta == "none" else f", test-time augmentation {tta}")
    with progress_bar("evaluating") as bar:
        how_to: dict[str, Any] = {"split": split, "max_damaged": max_damaged, "workers": workers}
        how_to |= {"mistakes": bool(wrong or sheet), "warn": warn, "on_images": bar}
        if classifier.multi_label:
            name, evaluation = evaluate_multi_label_classifier(classifier, data, **how_to)
        else:
            name, evaluation = evaluate_classifier(classifier, data, **how_to)
    title = f"{model} on {data}, split {name} ({how})"
    _write_mistakes(evaluation.mistakes, wrong, sheet, f"{model} on {data}")
    if json_output:
        print(to_json(evaluation.to_dict()))
    elif isinstance(evaluation, MultiLabelEvaluation):
        print_multi_label_evaluation(evaluation, title)
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
    low, high = evaluation.ci95
    say(f"{title}: {evaluation.n:,} images")
    print(f"  accuracy           {evaluation.top1:.2%} (95 % interval {low:.2%} to {high:.2%})")
    if len(evaluation.per_class) > 5:
        print(f"  top-5 accuracy     {evaluation.top5:.2%}")
    print(f"  loss               {evaluation.loss:.4f}")
    print(f"  calibration error  {evaluation.ece:.2%}")
    names = list(evaluation.per_class)
    taken_for = evaluation.taken_most_often_for()
    worst_first = sorted(range(len(names)), key=lambda place: evaluation.per_class[names[place]].accuracy)
    rows = []
    for place in worst_first[:_SHOWN_CLASSES]:
        result = evaluation.per_class[names[place]]
        other, count = taken_for.get(place, (place, 0))
        mistaken = f"{names[other]} ({count:,})" if count else ""
        rows.append(
            (names[place], f"{result.n:,}", f"{result.accuracy:.1%}", f"{result.precision:.1%}", mistaken)
        )
    headings = ("class", "images", "accuracy", "precision", "taken most often for")
    print_table(_classes_shown(len(names)), headings, rows, {"images", "accuracy", "precision"})


def print_multi_label_evaluation(evaluation: "MultiLabelEvaluation", title: str) -> None:
    """Print the numbers, and the classes from the worst to the best."""
    say(f"{title}: {evaluation.n:,} images")
    print(f"  mean average precision  {evaluation.mean_average_precision:.2%}")
    print(
        f"  F1 at 0.5               {evaluation.micro_f1:.2%} (mean over classes {evaluation.macro_f1:.2%})"
    )
    print(f"  exact match at 0.5      {evaluation.exact_match:.2%}")
    print(f"  loss                    {evaluation.loss:.4f}")
    classes = [(name, row.n, row.average_precision) for name, row in evaluation.per_class.items()]
    classes.sort(key=lambda row: math.inf if row[2] is None else row[2])
    rows = [
        (name, f"{n:,}", "-" if precision is None else f"{precision:.1%}")
        for name, n, precision in classes[:_SHOWN_CLASSES]
    ]
    headings = ("class", "images", "average precision")
    print_table(_classes_shown(len(classes)), headings, rows, headings[1:])


def _classes_shown(count: int) -> str:
    return "by class" if count <= _SHOWN_CLASSES else f"the {_SHOWN_CLASSES} worst of {count:,} classes"
