"""The picture of a learning-rate range test: the loss by the rate, the suggestion, the recipe's own rate."""

from typing import TYPE_CHECKING

from vitral.explain.figures.house import WIDTH, Look, chart, legend_above
from vitral.training.rate import RateTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 3.2  # inches


def picture(found: RateTest, title: str) -> bytes:
    """Draw a range test as a PNG.

    Raises:
        VitralError: if matplotlib is not installed.
    """
    return chart(lambda axes, look: _draw(axes, found, title, look), WIDTH * 1.3, _HEIGHT)


def _draw(axes: "Axes", found: RateTest, title: str, look: Look) -> None:
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
