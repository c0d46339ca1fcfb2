"""Pictures for people: images with what the model said of them."""

import math
from bisect import bisect
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_CAPTION, _GAP = 34, 10
_RIGHT, _WRONG = "#1b7f4b", "#c22f2f"
PAPER, INK = "#faf8f3", "#33302a"


def prediction_sheet(
    title: str,
    images: Iterable[Image.Image],
    predictions: Sequence[tuple[str, float]],
    truths: Sequence[str],
    columns: int = 10,
    tile: int = 84,
) -> Image.Image:
    """A grid of images, each with the label it was given, its probability and, if wrong, the true one.

    Args:
        title: over the grid.
        images: taken one at a time; each is drawn whole.
        predictions: label and probability of each.
        truths: the label of each.
        columns: images in a row.
        tile: pixels of an image's longer side.
    """
    rows = -(-len(predictions) // columns)
    cell, header = tile + _CAPTION + _GAP, 44
    sheet = Image.new("RGB", (columns * (tile + _GAP) + _GAP, rows * cell + header + _GAP), PAPER)
    draw, load = ImageDraw.Draw(sheet), ImageFont.load_default
    write_line(draw, (_GAP, 12), title, INK, load(18), sheet.width - 2 * _GAP)
    for index, (image, (label, probability), truth) in enumerate(
        zip(images, predictions, truths, strict=True)
    ):
        left, top = _GAP + index % columns * (tile + _GAP), header + index // columns * cell
        colour = _RIGHT if label == truth else _WRONG
        sheet.paste(_fitted(image, tile), (left, top))
        draw.rectangle((left - 2, top - 2, left + tile + 1, top + tile + 1), outline=colour, width=2)
        write_line(draw, (left, top + tile + 3), label, colour, load(14), tile, f"   {probability:.0%}")
        if label != truth:
            write_line(draw, (left, top + tile + 18), f"is {truth}", INK, load(12), tile)
    return sheet


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    """The whole image in a square; the pixels of a small one stay squares."""
    small = max(image.size) <= tile
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (tile, tile), how, color=PAPER)


def write_line(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
    ending: str = "",
) -> int:
    """Write one line, cut in the middle until it fits: names often differ at their ends only.

    Returns the pixels that it takes.
    """
    # A newline would run into the next caption.
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)

    def cut(kept: int) -> str:
        if kept == len(shown):
            return shown
        return f"{shown[: kept // 2]}...{shown[len(shown) - (kept + 1) // 2 :]}" if kept else ""

    def too_long(kept: int) -> bool:
        return font.getlength(cut(kept) + ending) > width

    letters = range(1, min(len(shown), width) + 1)  # a letter is a pixel wide at least
    shortened = cut(len(shown) if not too_long(len(shown)) else bisect(letters, 0, key=too_long))
    draw.text(place, shortened + ending, colour, font)
    return math.ceil(font.getlength(shortened + ending))
