"""Maps drawn over the pictures that they explain, with the scale in numbers beside them.

The picture is the one that the model saw, resized and cropped (`Preprocess.fit`), so that patch (row, column)
of a map lies on the pixels that the patch was made of. The same maps give the same bytes: colours are of
matplotlib's tables, letters of the font that it brings, and no file tells the machine or the hour.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitral.images.sheet import INK, PAPER, write_line
from vitral.runtime.extras import need

# Tables in which equal steps look equal. In the second red is for the score and blue against it.
_AMOUNTS, _SIGNED = "inferno", "coolwarm"
# Of the colours over the grey picture, from the least value to the most: what counts for nothing leaves the
# picture plain.
_OPACITY, _SIGNED_OPACITY = (0.5, 0.8), (0.15, 0.8)
_SPANNED = 0.99  # of the values
_LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue (Rec. ITU-R BT.709)

_GAP, _BAR, _NUMBERS, _FAINT = 16, 14, 86, "#7a756b"
_WORDS, _BELOW = 76, 44  # above and below the maps of a strip, and below alone
_WIDEST, _HIGHEST, _LARGEST_SIDE, _SMALLEST_SIDE, _CAPTION = 1600, 2400, 384, 184, 150  # pixels
_FEW_PIXELS = 64  # pictures up to this side keep their pixels as squares


@dataclass(frozen=True)
class Scale:
    """Which value has which colour; maps side by side share one.

    Values of both signs have their zero in the middle, whatever the ends.
    """

    low: float
    high: float
    clipped: bool = False  # whether there are values beyond the ends, in the colours of the ends

    @classmethod
    def of(cls, maps: Iterable[np.ndarray]) -> "Scale":
        """Spans the values of some maps but the topmost hundredth.

        Attention, and what is made of it, may put fifty times as much on a patch or two as on the rest, which
        would then be all of one colour (registers, arXiv:2309.16588).
        """
        values = np.concatenate([np.ravel(one) for one in maps]).astype(float)
        signed = values.min() < 0 < values.max()
        low, highest = (0.0, abs(values).max()) if signed else (values.min(), values.max())
        high = float(np.quantile(abs(values) if signed else values, _SPANNED, method="higher"))
        high = high if high > low else float(highest)  # of a map that is the same nearly everywhere
        return cls(-high if signed else float(low), high, clipped=bool(highest > high))

    @property
    def signed(self) -> bool:
        return self.low < 0 < self.high

    def shares(self, values: np.ndarray) -> np.ndarray:
        """Where values lie between the ends, 0 to 1; all 0 where both ends are one."""
        span = self.high - self.low
        return np.clip((values - self.low) / span, 0, 1) if span > 0 else np.zeros_like(values)

    def laid_over(self, grey: np.ndarray, values: np.ndarray) -> Image.Image:
        """The colours of values (H, W) over grey (H, W) from 0 to 1."""
        shares_HW = self.shares(values)
        table, strength_HW = (_SIGNED, abs(2 * shares_HW - 1)) if self.signed else (_AMOUNTS, shares_HW)
        opacity_HW = np.interp(strength_HW, (0, 1), _SIGNED_OPACITY if self.signed else _OPACITY)
        colours_HW3 = matplotlib_tables().colormaps[table](shares_HW)[..., :3]
        mixed_HW3 = opacity_HW[..., None] * colours_HW3 + ((1 - opacity_HW) * grey)[..., None]
        return Image.fromarray(np.rint(mixed_HW3 * 255).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Panel:
    """One map with the words under it."""

    values: np.ndarray  # (rows, columns)
    title: str
    detail: str = ""
    smooth: bool = True  # or each patch a square of its own


@dataclass(frozen=True)
class Strip:
    """Maps of one kind, side by side, on one scale."""

    panels: Sequence[Panel]
    heading: str
    detail: str = ""

    @property
    def scale(self) -> Scale:
        return Scale.of(panel.values for panel in self.panels)


def overlay(picture: Image.Image, values: np.ndarray, scale: Scale, *, smooth: bool = True) -> Image.Image:
    """Lays a map over a picture in grey, patch on patch; the picture keeps its size.

    Args:
        picture: as the model saw it.
        values: (rows, columns), one for each patch.
        scale: from values to colours.
        smooth: between patches (bicubic); else each patch is one colour, exactly as far as it reaches.

    Raises:
        VitralError: if matplotlib is not installed.
    """
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    # What lies beyond the ends would make rings around itself.
    ended = np.clip(values, scale.low, scale.high).astype(np.float32)
    spread = Image.fromarray(ended).resize(picture.size, how)
    return scale.laid_over(np.asarray(picture.convert("RGB")) / 255 @ _LUMINANCE, np.asarray(spread))


def sheet(
    picture: Image.Image, title: str, lines: Sequence[str], strips: Sequence[Strip], notes: Sequence[str] = ()
) -> Image.Image:
    """Draws a picture and its maps: a strip each, with captions and a colour bar.

    Args:
        picture: as the model saw it; it stands at the head of each strip.
        title: over all, such as the file's name.
        lines: under the title.
        strips: from top to bottom.
        notes: at the foot.

    Raises:
        VitralError: if matplotlib is not installed.
    """
    most = max(len(strip.panels) for strip in strips) + 1
    room = min(_WIDEST // most - _GAP, _HIGHEST // len(strips) - _WORDS)
    side = min(max(room, _SMALLEST_SIDE), _LARGEST_SIDE)
    shown = enlarged(picture, strips[0].panels[0].values.shape, side)
    rows = math.ceil(most * _step(shown) / _WIDEST)
    in_row = math.ceil(most / rows)
    width = in_row * _step(shown) + _GAP + _BAR + _NUMBERS
    pieces = [_heading(title, lines, width)]
    pieces += [_strip(shown, strip, in_row, width) for strip in strips]
    pieces += [_notes(notes, width)] if notes else []
    canvas = Image.new("RGB", (width, sum(piece.height for piece in pieces) + _GAP), PAPER)
    top = 0
    for piece in pieces:
        canvas.paste(piece, (0, top))
        top += piece.height
    return canvas


def png(image: Image.Image) -> bytes:
    """Encodes a picture; the same one always gives the same bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def enlarged(picture: Image.Image, grid: tuple[int, ...], side: int) -> Image.Image:
    """The picture with a longer side of at most `side`, each patch having the same whole number of pixels.

    Args:
        picture: as the model saw it.
        grid: rows and columns of patches.
        side: pixels.
    """
    rows, columns = grid
    pixels = max(side // max(rows, columns), 1)
    how = Image.Resampling.NEAREST if max(picture.size) <= _FEW_PIXELS else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((columns * pixels, rows * pixels), how)


# --- The parts of a sheet --------------------------------------------------------------------------


def _heading(title: str, lines: Sequence[str], width: int) -> Image.Image:
    piece = Image.new("RGB", (width, 48 + 20 * len(lines)), PAPER)
    draw = ImageDraw.Draw(piece)
    write_line(draw, (_GAP, 14), title, INK, _font(19, bold=True), width - 2 * _GAP)
    for place, line in enumerate(lines):
        write_line(draw, (_GAP, 44 + 20 * place), line, INK, _font(14), width - 2 * _GAP)
    return piece


def _notes(notes: Sequence[str], width: int) -> Image.Image:
    lines = [line for note in notes for line in _wrapped(note, _font(12), width - 2 * _GAP)]
    piece = Image.new("RGB", (width, 8 + 17 * len(lines)), PAPER)
    draw = ImageDraw.Draw(piece)
    for place, line in enumerate(lines):
        write_line(draw, (_GAP, 8 + 17 * place), line, _FAINT, _font(12), width - 2 * _GAP)
    return piece


def _strip(picture: Image.Image, strip: Strip, in_row: int, width: int) -> Image.Image:
    """A heading, and the picture and the maps in as many rows as they need, each with the bar."""
    step, head, caption = _step(picture), _WORDS - _BELOW, _BELOW
    rows = math.ceil((len(strip.panels) + 1) / in_row)
    piece = Image.new("RGB", (width, head + rows * (picture.height + caption)), PAPER)
    draw = ImageDraw.Draw(piece)
    taken = write_line(draw, (_GAP, 8), strip.heading, INK, _font(15, bold=True), width // 2)
    write_line(draw, (_GAP + taken + 10, 9), strip.detail, _FAINT, _font(13), width - taken - 3 * _GAP)
    cells = [(picture, "as the model saw it", "")]
    cells += [
        (overlay(picture, panel.values, strip.scale, smooth=panel.smooth), panel.title, panel.detail)
        for panel in strip.panels
    ]
    for place, (image, title, detail) in enumerate(cells):
        left, top = _GAP + place % in_row * step, head + place // in_row * (picture.height + caption)
        piece.paste(image, (left, top))
        below = top + picture.height
        write_line(draw, (left, below + 4), title, INK, _font(13, bold=True), step - _GAP)
        write_line(draw, (left, below + 21), detail, _FAINT, _font(12), step - _GAP)
    for row in range(rows):
        top = head + row * (picture.height + caption)
        beside = min(len(cells) - row * in_row, in_row)
        _draw_bar(piece, (_GAP + beside * step, top), picture.height, strip.scale)
    return piece


def _step(picture: Image.Image) -> int:
    """From one map to the next; a narrow one leaves room for its caption."""
    return max(picture.width, _CAPTION) + _GAP


def _draw_bar(piece: Image.Image, place: tuple[int, int], height: int, scale: Scale) -> None:
    """The colours as they lie over a middle grey, the highest value above, with numbers."""
    left, top = place
    draw = ImageDraw.Draw(piece)
    values_H1 = np.linspace(scale.high, scale.low, height)[:, None]
    piece.paste(scale.laid_over(np.full_like(values_H1, 0.5), values_H1).resize((_BAR, height)), place)
    marks = np.linspace(scale.high, scale.low, 5 if height > 80 else 3)
    marks = marks if scale.high > scale.low else marks[:1]
    for value in marks:
        share = (scale.high - value) / (scale.high - scale.low) if scale.high > scale.low else 0
        y = top + round(share * (height - 1))
        draw.line((left + _BAR, y, left + _BAR + 4, y), fill=_FAINT)
        draw.text((left + _BAR + 8, y), _number(value, scale), INK, _font(12), anchor="lm")


def _number(value: float, scale: Scale) -> str:
    """Three digits, none for the crumbs that rounding leaves of zero; at an end, also for what is beyond."""
    size = max(abs(scale.low), abs(scale.high))
    number = "0" if abs(value) < 1e-6 * size else f"{value:#.3g}".rstrip(".")
    if scale.clipped and value in (scale.high, -scale.high):
        return f"{'≥' if value > 0 else '≤'} {number}"
    return number


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which knows most alphabets; laid out by Pillow alone, so that it is alike everywhere."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = Path(matplotlib_tables().get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def matplotlib_tables() -> Any:
    """Imports matplotlib. Raises VitralError with the command that installs it."""
    need("the picture of a map", "matplotlib", extra="explain")
    import matplotlib

    return matplotlib
