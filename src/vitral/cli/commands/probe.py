"""`vitral probe`: what a model's features are worth on labelled images."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from vitral.cli import options
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_table, progress_bar, say, warn
from vitral.runtime import limits
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from vitral.evaluation.probing.probe import ProbeResult


def probe(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    img_size: Annotated[
        int | None, options.number(limits.PIXELS, "Pixels; by default those the model was trained with.")
    ] = None,
    features: Annotated[
        str | None, options.choice(limits.FEATURES, "; by default what is usual for the model.")
    ] = None,
    layer: Annotated[
        list[int] | None,
        options.number(
            limits.LAYER, "Layer whose output is used, by default -1 (the last); of several, the best."
        ),
    ] = None,
    per_class: Annotated[
        int | None, options.number(limits.IMAGES, "Number of labelled images per class.")
    ] = None,
    limit: Annotated[
        int | None,
        options.number(
            limits.IMAGES, "Largest number of images of each split; with --per-class, of the test split."
        ),
    ] = None,
    seed: options.Seed = 0,
    max_damaged: options.MaxDamaged = 0.01,
    out: Annotated[Path | None, options.folder("New folder for the model with the probe as head.")] = None,
    cache: Annotated[
        Path | None, options.folder("Folder for features; by default in $VITRAL_CACHE or ~/.cache/vitral.")
    ] = None,
    workers: options.Workers = None,
    json_output: options.Json = False,
    column: options.Column = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Measure how good a model's features are on DATA, by a linear probe and nearest neighbours.

    \b
    vitral probe hf://facebook/dinov2-small photos/ --per-class 10
    vitral probe hf://facebook/dinov2-small photos/ --out runs/probe   # a model, for eval and predict
    """
    from vitral.evaluation.probing.probe import probe as run_probe

    asked: dict[str, Any] = {"features": features, "per_class": per_class, "limit": limit, "seed": seed}
    asked |= {"max_damaged": max_damaged, "workers": workers, "layers": tuple(layer or (-1,))}
    classifier = load_classifier(model, device, precision, img_size=img_size)
    with progress_bar("features") as bar:
        result = run_probe(
            classifier, options.opened(data, column), **asked, cache=cache, out=out, warn=warn, on_images=bar
        )
    if json_output:
        print(to_json(result.to_dict()))
        return
    height, width = classifier.preprocess.img_size
    title = f"{model} on {data}, split {result.split} ({height}x{width} pixels, {classifier.placement})"
    print_probe(result, title)
    if out is not None:
        print(f"model: {out}; try: vitral predict {shlex.quote(str(out))} IMAGE...")


def print_probe(result: "ProbeResult", title: str) -> None:
    """Print a row each for the linear probe and the neighbours: what was chosen, how well it did."""
    linear, near = result.linear, result.neighbours
    say(f"{title}: {linear.evaluation.n:,} images, after {result.labelled:,} labelled ones")
    rows = []
    for name, row, chosen, top1, ci95 in (
        ("linear", linear, f"L2 {linear.penalty:.1e}", linear.evaluation.top1, linear.evaluation.ci95),
        ("k-NN", near, f"k {near.k}", near.top1, near.ci95),
    ):
        held_out = "-" if row.held_out_top1 is None else f"{row.held_out_top1:.2%}"
        interval = f"{ci95[0]:.1%} to {ci95[1]:.1%}"
        rows.append((name, row.features, str(row.layer), chosen, held_out, f"{top1:.2%}", interval))
    headings = ("probe", "features", "layer", "chosen", "held out", "accuracy", "95 % interval")
    print_table("", headings, rows, {"layer", "held out", "accuracy"})
