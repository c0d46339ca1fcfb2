"""Pictures for people: images with what the model said of them."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_TILE, _CAPTION, _GAP = 84, 34, 10
_RIGHT, _WRONG, _PAPER, _INK = "#1b7f4b", "#c22f2f", "#faf8f3", "#33302a"


def prediction_sheet(
    title: str,
    images: Sequence[Image.Image],
    predictions: Sequence[tuple[str, float]],
    truths: Sequence[str],
    columns: int = 10,
) -> Image.Image:
    """A grid of images, each with the label it was given, its probability and, if wrong, the true one."""
    rows = -(-len(images) // columns)
    cell_h, header = _TILE + _CAPTION + _GAP, 44
    sheet = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, rows * cell_h + header + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 12), title, _INK, font=ImageFont.load_default(18))
    for index, (image, (label, probability), truth) in enumerate(
        zip(images, predictions, truths, strict=True)
    ):
        left = _GAP + index % columns * (_TILE + _GAP)
        top = header + index // columns * cell_h
        colour = _RIGHT if label == truth else _WRONG
        sheet.paste(image.convert("RGB").resize((_TILE, _TILE), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left - 2, top - 2, left + _TILE + 1, top + _TILE + 1), outline=colour, width=2)
        draw.text(
            (left, top + _TILE + 3),
            f"{label}   {probability:.0%}",
            colour,
            ImageFont.load_default(14),
        )
        if label != truth:
            draw.text((left, top + _TILE + 18), f"is {truth}", _INK, ImageFont.load_default(12))
    return sheet
