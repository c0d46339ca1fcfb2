"""Pictures for people: images with what the model said of them."""

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_CAPTION, _GAP = 34, 10
_RIGHT, _WRONG, _PAPER, _INK = "#1b7f4b", "#c22f2f", "#faf8f3", "#33302a"


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
    sheet = Image.new("RGB", (columns * (tile + _GAP) + _GAP, rows * cell + header + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (_GAP, 12), title, _INK, 18, sheet.width - 2 * _GAP)
    for index, (image, (label, probability), truth) in enumerate(
        zip(images, predictions, truths, strict=True)
    ):
        left, top = _GAP + index % columns * (tile + _GAP), header + index // columns * cell
        colour = _RIGHT if label == truth else _WRONG
        sheet.paste(_fitted(image, tile), (left, top))
        draw.rectangle((left - 2, top - 2, left + tile + 1, top + tile + 1), outline=colour, width=2)
        _write(draw, (left, top + tile + 3), label, colour, 14, tile, f"   {probability:.0%}")
        if label != truth:
            _write(draw, (left, top + tile + 18), f"is {truth}", _INK, 12, tile)
    return sheet


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    """The whole image in a square; the pixels of a small one stay squares."""
    small = max(image.size) <= tile
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (tile, tile), how, color=_PAPER)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    colour: str,
    size: int,
    width: int,
    ending: str = "",
) -> None:
    """One line, cut in the middle until it fits: names often differ at their ends only."""
    font = ImageFont.load_default(size)
    # A newline would run into the next caption.
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    # A letter is a pixel wide at least.
    shortened, kept = shown, min(len(shown), width)
    while kept and font.getlength(shortened + ending) > width:
        kept -= 1
        shortened = f"{shown[: kept // 2]}...{shown[len(shown) - (kept + 1) // 2 :]}" if kept else ""
    draw.text(place, shortened + ending, colour, font)
