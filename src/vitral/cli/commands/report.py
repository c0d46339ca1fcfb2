"""`vitral report`: one file about a run, to hand over."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.console import print_lines, progress_bar, warn
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json


def report(  # noqa: PLR0913 - a command's options
    models: Annotated[
        list[str],
        options.text("RUN... [DATA]", "A run or any model, or several to compare; then the labelled images."),
    ],
    out: Annotated[Path | None, options.file("The page, such as report.html.", limits.PAGE_SUFFIXES)] = None,
    json_output: options.Json = False,
    split: options.Split = None,
    limit: Annotated[int | None, options.number(limits.IMAGES, "Images to judge at most.")] = None,
    maps: Annotated[int, options.number((0, 100), "Images whose maps are shown.")] = 12,
    score: Annotated[
        int | None,
        options.number(
            (0, limits.IMAGES[1]), "Images to score the maps on; by default as many as take a minute."
        ),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Whether the papers' figures are drawn.")
    ] = True,
    pictures: Annotated[
        bool, typer.Option("--images/--no-images", help="Whether images of the data may be in the page.")
    ] = True,
    megabytes: Annotated[float, typer.Option("--max-mb", help="What the page may weigh, in MB.")] = 2.0,
    max_damaged: options.MaxDamaged = 0.01,
    workers: options.Workers = None,
    column: options.Column = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """One HTML file about a run: how good it is, where it fails, and how far to believe it.

    It loads nothing and sends nothing, and can be read without JavaScript.

    \b
    vitral report runs/photos photos/ --out report.html
    vitral report runs/photos runs/tuned photos/ --out comparison.html
    """
    from vitral.reports.report import report as make_report
    from vitral.reports.subject import names_model

    if out is None and not json_output:
        raise typer.BadParameter(
            "name the page to write, such as report.html, or ask for --json", param_hint="--out"
        )
    *first, last = models
    names, data = (models, None) if names_model(last) or not first else (first, last)
    wanted: dict[str, Any] = {"split": split, "limit": limit, "pictures": pictures, "megabytes": megabytes}
    wanted |= {"maps": maps, "score": score, "figures": figures}
    wanted |= {"max_damaged": max_damaged, "workers": workers, "device": device, "precision": precision}
    with progress_bar("reporting") as bar:
        wanted |= {"on_progress": lambda _, done, total: bar(done, total), "warn": warn}
        made = make_report(names, data and options.opened(data, column), **wanted)
    if out is not None:
        made.write(out)
        said = f"{out}, {out.stat().st_size / 1e6:.1f} MB: {made.lead}"
        warn(said) if json_output else print_lines(said)
    if json_output:
        print(to_json(made.to_dict()))
