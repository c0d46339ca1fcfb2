"""From a drawing to pixels: a PNG for a folder, and for each scheme a WebP for a page."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vitral.explain.figures.drawing import Drawing, Reach
from vitral.explain.figures.house import DPI, LOOKS, WIDTH, Look, need_matplotlib, style


@dataclass(frozen=True)
class Painted:
    """A figure, drawn: as a file, and for the two schemes of a page."""

    png: bytes
    light: bytes  # WebP, on no ground of its own
    dark: bytes


def painted(drawing: Drawing, reach: Reach) -> Painted:
    """Draws a figure, the same bytes for the same numbers.

    Args:
        drawing: what to draw.
        reach: ranges of its axes, as `shared_reach` gives them.

    Raises:
        VitralError: if matplotlib is not installed.
    """
    need_matplotlib()
    pixels = _pixels(drawing, reach, LOOKS["light"])
    light = _webp(pixels, lossy=drawing.photographs)
    if drawing.photographs:
        return Painted(_png(pixels), light, light)
    return Painted(_png(pixels), light, _webp(_pixels(drawing, reach, LOOKS["dark"]), lossy=False))


def _pixels(drawing: Drawing, reach: Reach, look: Look) -> Image.Image:
    """RGBA, the ground transparent."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(style(look)):
        canvas = Figure(figsize=(WIDTH, drawing.height), dpi=DPI, layout="constrained")
        agg = FigureCanvasAgg(canvas)
        drawing.draw(canvas, look, reach)
        agg.draw()
    return Image.fromarray(np.asarray(agg.buffer_rgba()).copy())


def _png(pixels: Image.Image) -> bytes:
    """On white paper."""
    content = io.BytesIO()
    paper = Image.new("RGBA", pixels.size, LOOKS["light"].paper)
    Image.alpha_composite(paper, pixels).convert("RGB").save(content, "PNG", dpi=(DPI, DPI))
    return content.getvalue()


def _webp(pixels: Image.Image, *, lossy: bool) -> bytes:
    content = io.BytesIO()
    pixels.save(content, "WEBP", lossless=not lossy, quality=82 if lossy else 60, method=4)
    return content.getvalue()
