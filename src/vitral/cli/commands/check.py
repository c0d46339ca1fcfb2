"""`vitral check`: what is wrong with a data set, before a model is trained on it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_table, progress_bar, say, warn
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.checks.check import Check

_LEVELS = {"wrong": "wrong", "doubtful": "look at it", "note": "good to know"}
_EXAMPLES = 3  # of each kind
_STRICT_STATUS = 1


def check(  # noqa: PLR0913 - a command's options
    data: options.Data,
    model: Annotated[
        str | None,
        options.text("[MODEL]", "A model with good features, to look for wrong labels and more copies with."),
    ] = None,
    out: Annotated[
        Path | None, options.file("A page with the pictures, such as check.html.", limits.PAGE_SUFFIXES)
    ] = None,
    write: Annotated[
        Path | None,
        options.file(
            "The data without what was found, to train on: a table of the files (.csv), or the images "
            "themselves (.parquet).",
            limits.CLEANED_SUFFIXES,
        ),
    ] = None,
    column: options.Column = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with status 1 if anything is wrong or in doubt.")
    ] = False,
    json_output: options.Json = False,
    megabytes: Annotated[float, options.real((0.1, 100.0), "What the page may weigh, in MB.")] = 4.0,
    img_size: Annotated[
        int | None, options.number(limits.PIXELS, "Pixels that the model is given; by default its own.")
    ] = None,
    cache: Annotated[
        Path | None, options.folder("Folder for features; by default in $VITRAL_CACHE or ~/.cache/vitral.")
    ] = None,
    seed: options.Seed = 0,
    workers: options.Workers = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Look for what is wrong with DATA: broken files, copies, leaks between splits, wrong labels.

    \b
    vitral check photos/ --out check.html
    vitral check photos/ hf://facebook/dinov2-small --write clean.csv
    vitral check 'cifar10/{split}.parquet' --write clean.parquet
    """
    from vitral.checks.check import check as run_check

    classifier = None if model is None else load_classifier(model, device, precision, img_size=img_size)
    how: dict[str, Any] = {"seed": seed, "workers": workers, "cache": cache, "write": write}
    how["columns"] = options.columns_of(column)
    with progress_bar("checking") as bar:
        found = run_check(
            data, classifier, **how, warn=warn, on_progress=lambda _, done, total: bar(done, total)
        )
    if json_output:
        print(to_json(found.to_dict()))
    else:
        print_check(found)
    if out is not None:
        _write_page(found, out, megabytes)
    _tell_written(found)
    if strict and found.problems:
        warn(f"{len(found.problems)} kinds of problems were found in {data} (--strict)")
        raise typer.Exit(_STRICT_STATUS)


def _tell_written(found: "Check") -> None:
    """Say how to train on what was written, or raise VitralError if it could not be."""
    if (cleaned := found.written) is not None:
        warn(f"{cleaned.images:,} images, without {len(found.left_out):,}: {cleaned.file}")
        command = ["vitral", "train", str(cleaned.file), "--out", "RUN", *cleaned.settings]
        warn(f"try: {shlex.join(command)}")
    elif found.not_written:
        raise VitralError(found.not_written)


def _write_page(found: "Check", out: Path, megabytes: float) -> None:
    from vitral.checks.page import page_of
    from vitral.runtime.files import write_atomically

    write_atomically(out, page_of(found, megabytes).encode())
    warn(f"the pictures: {out}, {out.stat().st_size / 1e6:.1f} MB")


def print_check(found: "Check") -> None:
    """Print a row for each kind that was found, and a few examples of each."""
    data = found.subject.data
    splits = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    say(f"{data.source}: {len(found.subject):,} images in {len(data.classes)} classes ({splits})")
    rows = [
        (
            kind.title,
            _LEVELS[kind.level],
            f"{len(kind.findings):,}",
            f"{kind.images:,}",
            _example(found, kind),
        )
        for kind in found.kinds
        if kind.findings
    ]
    if rows:
        headings = ("what", "how bad", "found", "images", "for example")
        print_table("", headings, rows, {"found", "images"}, lines=True)
    for kind in found.kinds:
        if kind.missing:
            say(f"{kind.title}: not looked for; {kind.missing}")
    if not found.problems:
        say("nothing is wrong, as far as was looked")
    elif found.left_out and found.written is None:
        say(f"{found.advice}; --write keeps the others")


def _example(found: "Check", kind: Any) -> str:
    first = kind.findings[0]
    names = " and ".join(found.subject.split.names[row] for row in first.rows[:_EXAMPLES])
    return ": ".join(filter(None, (names, first.says)))
