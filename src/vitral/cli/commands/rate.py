"""`vitral rate`: at which learning rate the loss falls most steeply, found in a hundred steps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vitral.cli import options
from vitral.cli.console import print_lines, print_table, progress_bar, warn
from vitral.runtime.plainjson import to_json
from vitral.runtime.process import keep_freed_memory

if TYPE_CHECKING:
    from vitral.training.rate import RateTest

_ROWS = 16
_BAR = 24  # characters


def rate(
    data: options.Data,
    settings: options.Settings = None,
    recipe: Annotated[
        str | None, options.name("NAME_OR_FILE", "A recipe that comes with Vitral, or a file of settings.")
    ] = None,
    steps: Annotated[int, options.number((20, 1000), "Steps, at rates from 1e-6 to 10.")] = 100,
    out: Annotated[Path | None, options.file("Picture of the curve, a .png file.", (".png",))] = None,
    json_output: options.Json = False,
) -> None:
    """Look for a learning rate for a run on DATA: raise it with every step, and see where the loss falls.

    No model is kept or changed. The settings are those of `vitral train`.

    \b
    vitral rate photos/ minutes=30
    vitral rate photos/ model=runs/photos optimizer=adamw --out rate.png
    """
    from vitral.explain.figures.house import need_matplotlib
    from vitral.recipes.packaged import recipe_of
    from vitral.reports.rate import picture
    from vitral.runtime.files import write_atomically
    from vitral.training.rate import find_rate

    if out is not None:
        need_matplotlib()
    wanted = recipe_of(recipe).with_words(settings or [])
    keep_freed_memory()
    with progress_bar("steps", "steps") as bar:
        found = find_rate(data, wanted, steps, tell=warn, on_steps=bar)
    if out is not None:
        write_atomically(out, picture(found, f"range test on {data}"))
    if json_output:
        print(to_json(found.to_dict()))
        return
    _print_curve(found)
    print_lines(found.conclusion())
    if out is not None:
        print(f"picture: {out}")


def _print_curve(found: "RateTest") -> None:
    """Print some of the steps, and the one whose rate is suggested."""
    import numpy as np

    rates, means = found.rates, found.means
    shown = set(np.linspace(0, len(rates) - 1, min(_ROWS, len(rates))).round().astype(int).tolist())
    steepest = found.steepest
    if steepest is not None:
        near = min(shown, key=lambda step: abs(step - steepest))
        shown = shown - {near} | {steepest}
    low, high = means.min(), max(found.level, means[0])
    rows = []
    for step in sorted(shown):
        length = round(_BAR * min(float((means[step] - low) / max(high - low, 1e-9)), 1.0))
        mark = "  steepest fall" if step == steepest else ""
        rows.append((f"{rates[step]:.2g}", f"{means[step]:.3f}", "#" * length + mark))
    print_table("", ("learning rate", "mean loss", ""), rows, ("learning rate", "mean loss"))
