"""`vitral doctor`: what wrong settings cost, and which one is the likely mismatch."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_table, progress_bar, say, warn
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.evaluation.diagnosis.report import Diagnosis


def doctor(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    split: options.Split = None,
    limit: Annotated[
        int, options.number(limits.IMAGES, "Largest number of images, the same for each class.")
    ] = 400,
    seed: options.Seed = 0,
    workers: options.Workers = None,
    json_output: options.Json = False,
    column: options.Column = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    trust: options.Trust = False,
) -> None:
    """Evaluate MODEL with other settings (mean, crop and so on), and say whether one of them is better."""
    from vitral.evaluation.diagnosis.doctor import diagnose

    classifier = load_classifier(model, device, precision, trusted=trust)
    with progress_bar("examining") as bar:
        how: dict[str, Any] = {"split": split, "limit": limit, "seed": seed, "workers": workers}
        diagnosis = diagnose(classifier, options.opened(data, column), **how, warn=warn, on_images=bar)
    if json_output:
        print(to_json(diagnosis.to_dict()))
    else:
        title = f"{model} on {data}, split {diagnosis.split} ({classifier.computed_by})"
        print_diagnosis(diagnosis, title)


def print_diagnosis(diagnosis: "Diagnosis", title: str) -> None:
    """Print how the classifier does as it is, a row for each changed setting, and the conclusion."""
    low, high = diagnosis.ci95
    damaged = f", {diagnosis.damaged:,} damaged ones left out" if diagnosis.damaged else ""
    say(f"{title}: {diagnosis.n:,} images{damaged}")
    print(f"  accuracy  {diagnosis.top1:.2%} (95 % interval {low:.2%} to {high:.2%})")
    print(f"  loss      {diagnosis.loss:.4f}")
    rows: list[Sequence[str]] = []
    setting = ""
    for finding, (name, now, value, *numbers, _) in zip(diagnosis.findings, diagnosis.rows(), strict=True):
        if finding.verdict == "no effect":
            continue
        first = f"{name} (now {now})" if name != setting else ""
        setting = name
        rows.append((first, value, *numbers, finding.verdict))
    numbers = ("top-1", "points", "loss", "change")
    headings = ("setting", "tried", *numbers, "verdict")
    print_table("one setting changed at a time, on the same images", headings, rows, numbers)
    for reason, alike in groupby(
        (finding for finding in diagnosis.findings if finding.verdict == "no effect"),
        key=lambda finding: (finding.setting, finding.reason),
    ):
        values = ", ".join(finding.value for finding in alike if finding.value != "-")
        say(f"no effect: {' '.join(filter(None, (reason[0], values)))}: {reason[1]}")
    for cost in diagnosis.decodings:
        say(str(cost))
    say(diagnosis.conclusion())
