"""The picture of a ledger: how fast each form is, and how accurate, with the intervals of both."""

from typing import TYPE_CHECKING

from vitral.explain.figures.house import WIDTH, Look, chart
from vitral.ship.optimize.ledger import Goal, Ledger, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 3.6  # inches
_MARKERS = {"eager": "s", "chosen": "*", "fits": "o", "too lossy": "X", "slower": "o"}


def frontier(ledger: Ledger) -> bytes:
    """Draw the forms that were judged as a PNG: images a second, and points lost beside the eager model.

    Raises:
        VitralError: if matplotlib is not installed.
    """
    return chart(lambda axes, look: _draw(axes, ledger, look), WIDTH * 1.4, _HEIGHT)


def _draw(axes: "Axes", ledger: Ledger, look: Look) -> None:
    judged = [row for row in ledger.rows if row.judgement is not None and row.speed is not None]
    axes.axhline(-ledger.max_drop, color=look.second, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"bound: {ledger.max_drop:g} points",
        (0.99, -ledger.max_drop),
        xycoords=("axes fraction", "data"),
        xytext=(0, -10),
        textcoords="offset points",
        color=look.second,
        fontsize=8,
        ha="right",
    )
    for row in judged:
        _mark(axes, row, look, ledger.goal)
    axes.set_xlabel(
        f"images a second, {judged[0].speed.batch if judged[0].speed else 1} at a time"
        if ledger.goal == "throughput"
        else "images a second, one at a time"
    )
    axes.set_ylabel("points of accuracy beside eager")
    axes.set_title(f"{ledger.model} on {ledger.images['judging']:,} held-out images", color=look.ink)
    axes.grid(visible=True)
    axes.margins(x=0.25, y=0.15)
    axes.set_xlim(left=0)


def _mark(axes: "Axes", row: Row, look: Look, goal: Goal) -> None:
    """A form with the 95 % interval of its loss and the least and most of its speed."""
    assert row.speed is not None
    assert row.judgement is not None
    of = row.speed.images_a_second(goal)
    x, low, high = of.median, of.low, of.high
    y, y_low, y_high = (
        -100 * loss for loss in (row.judgement.loss, row.judgement.loss_high, row.judgement.loss_low)
    )
    refused = row.verdict == "too lossy"
    colour = look.second if refused else look.first
    yerr = None if row.verdict == "eager" else [[y - y_low], [y_high - y]]
    axes.errorbar(
        x, y, xerr=[[x - low], [high - x]], yerr=yerr, fmt=_MARKERS.get(row.verdict, "o"), color=colour,
        markersize=11 if row.verdict == "chosen" else 6, elinewidth=1,
        markerfacecolor="none" if row.verdict == "slower" else colour,
    )  # fmt: skip
    words = row.name + (f" ({row.verdict})" if row.verdict in ("chosen", "too lossy") else "")
    axes.annotate(words, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color=look.ink)
