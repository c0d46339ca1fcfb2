"""The picture of a learning-rate range test: the loss by the rate, the suggestion, the recipe's own rate."""

import io

from vitral.explain.figures.house import DPI, LOOKS, WIDTH, legend_above, style
from vitral.runtime.extras import need
from vitral.training.rate import RateTest

_HEIGHT = 3.2  # inches


def refuse_without_matplotlib() -> None:
    """Raise VitralError if no picture can be drawn."""
    need("a figure", "matplotlib", extra="explain")


def picture(found: RateTest, title: str) -> bytes:
    """Draw a range test as a PNG.

    Raises:
        VitralError: if matplotlib is not installed.
    """
    refuse_without_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look = LOOKS["light"]
    with mpl.rc_context({**style(look), "figure.facecolor": look.paper}):
        figure = Figure((WIDTH * 1.3, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        axes.plot(found.rates, found.losses, color=look.line, linewidth=1, label="loss of a batch")
        axes.plot(found.rates, found.means, color=look.first, label="mean loss")
        axes.axvline(found.recipes_own, color=look.muted, linewidth=1, linestyle=(0, (4, 3)), label="recipe")
        if found.suggestion is not None:
            axes.axvline(found.suggestion, color=look.second, linewidth=1.2, label="suggested")
        axes.set_xscale("log")
        # What the loss comes to once it is lost would flatten all before.
        axes.set_ylim(0.9 * float(found.losses.min()), 1.2 * max(found.level, float(found.means.min())))
        axes.set_xlabel(f"learning rate\n{title}")
        axes.set_ylabel("loss")
        legend_above(axes, 4)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
