"""The one look of all figures: sizes, fonts, colours, and how tiles and heat maps are set.

Wide as a telephone's page, so that ten-point letters are read there as they are; colours are perceptual
(viridis, cividis), and nothing is told by colour alone. Each figure is drawn for a light and for a dark page.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vitral.runtime.extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scheme = Literal["light", "dark"]
WIDTH = 4.8  # inches
DPI = 220
_TILE = 32  # pixels of a small tile's longer side, at least


@dataclass(frozen=True)
class Look:
    """Colours of one scheme; text on paper has a contrast of 4.5 and more."""

    paper: str
    ink: str
    muted: str
    line: str  # of axes and grids
    first: str  # of data
    second: str


LOOKS: dict[Scheme, Look] = {
    "light": Look("#ffffff", "#24221e", "#5f5b53", "#cfcabf", "#31688e", "#b3450d"),
    "dark": Look("#16181c", "#ecebe7", "#b2aea5", "#4a4c52", "#5ec9a0", "#f5a35c"),
}


def style(look: Look) -> dict[str, Any]:
    """Gives the settings of matplotlib."""
    return {
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10,
        "axes.titlelocation": "left", "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "text.color": look.ink, "axes.labelcolor": look.ink, "axes.titlecolor": look.ink,
        "xtick.color": look.muted, "ytick.color": look.muted, "axes.edgecolor": look.line,
        "figure.facecolor": "none", "axes.facecolor": "none",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "grid.color": look.line,
        "grid.linewidth": 0.5, "axes.axisbelow": True, "xtick.major.size": 3, "ytick.major.size": 3,
        "legend.frameon": False, "image.cmap": "viridis", "image.interpolation": "nearest",
        "lines.linewidth": 1.8, "axes.linewidth": 0.8,
    }  # fmt: skip


def need_matplotlib() -> None:
    """Raise VitralError if no figure can be drawn."""
    need("a figure", "matplotlib", extra="explain")


def chart(draw: "Callable[[Axes, Look], None]", width: float, height: float) -> bytes:
    """Draw one chart for a light page, as a PNG; sizes in inches.

    Raises:
        VitralError: if matplotlib is not installed.
    """
    need_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look = LOOKS["light"]
    with mpl.rc_context({**style(look), "figure.facecolor": look.paper}):
        figure = Figure((width, height), layout="constrained")
        draw(figure.subplots(), look)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def layers_axis(axes: "Axes", depth: int, label: str = "layer") -> None:
    """Sets the horizontal axis to layers, numbered as `--layers` takes them."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, depth - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set_xlabel(label)


def legend_above(axes: "Axes", ncols: int) -> None:
    """Puts the legend above the axes, where no data is."""
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=ncols,
        borderpad=0.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def colour_bar(canvas: "Figure", image: Any, axes: "Axes", label: str) -> None:
    """Puts a colour bar with its unit below a heat map, where it takes no width."""
    bar = canvas.colorbar(image, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=45)
    bar.outline.set_visible(False)  # pyrefly: ignore[not-callable]
    bar.set_label(label)


def bare(axes: "Axes") -> None:
    """Takes ticks and frame away, for pictures."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


@dataclass(frozen=True)
class Mosaic:
    """Tiles set side by side in one array, gaps between them, and where each tile's middle is."""

    pixels: np.ndarray  # (H, W) or (H, W, 4); NaN, or alpha 0, in the gaps
    row_middles: np.ndarray
    column_middles: np.ndarray

    def label(self, axes: "Axes", rows: Iterable[object], columns: Iterable[object]) -> None:
        """Writes a name beside each row of tiles and below each column."""
        axes.set_yticks(self.row_middles, [str(name) for name in rows])
        axes.set_xticks(self.column_middles, [str(name) for name in columns])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


def mosaic(tiles_RChw: np.ndarray) -> Mosaic:
    """Sets tiles (rows, columns, h, w), or (rows, columns, h, w, 3) in colour, side by side."""
    rows, columns, height, width = tiles_RChw.shape[:4]
    times = max(_TILE // max(height, width), 1)
    tiles = tiles_RChw.repeat(times, axis=2).repeat(times, axis=3)
    if tiles.ndim == 5:
        there = ~np.isnan(tiles[..., :1])
        tiles = np.concatenate([np.nan_to_num(tiles), there], axis=-1)
    height, width = height * times, width * times
    gap = max(round(0.1 * min(height, width)), 1)
    steps = height + gap, width + gap
    empty = 0.0 if tiles.ndim == 5 else np.nan
    pixels = np.full((rows * steps[0] - gap, columns * steps[1] - gap, *tiles.shape[4:]), empty)
    for row in range(rows):
        for column in range(columns):
            top, left = row * steps[0], column * steps[1]
            pixels[top : top + height, left : left + width] = tiles[row, column]
    middles = [
        np.arange(count) * step + (side - 1) / 2
        for count, step, side in ((rows, steps[0], height), (columns, steps[1], width))
    ]
    return Mosaic(pixels, *middles)


def mosaic_height(mosaic: Mosaic, beside: float = 0.65, below: float = 1.1) -> float:
    """Inches of a figure that shows tiles at the house's width, with room for bars and labels."""
    height, width = mosaic.pixels.shape[:2]
    return float(np.clip((WIDTH - beside) * height / width + below, 1.3, 9))
