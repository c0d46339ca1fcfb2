"""The page that explains the figures: one HTML file that asks nothing of any network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Self

from vitral.explain.figures.drawing import Drawing, in_words
from vitral.explain.figures.paint import Painted
from vitral.inference.classifier import Classifier

_TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Shot:
    """A figure of one model, drawn."""

    model: str
    file: str  # without its ending, within the folder
    finding: str
    painted: Painted
    table: str  # CSV

    @property
    def light_uri(self) -> str:
        return _data_uri(self.painted.light)

    @property
    def dark_uri(self) -> str:
        return _data_uri(self.painted.dark)


@dataclass(frozen=True)
class Entry:
    """One figure, of each model that has it."""

    name: str
    title: str
    see: str
    recipe: str
    shots: tuple[Shot, ...]

    @classmethod
    def of(cls, drawing: Drawing, shots: Sequence[Shot]) -> Self:
        return cls(drawing.name, drawing.title, drawing.see, drawing.recipe, tuple(shots))


@dataclass(frozen=True)
class Page:
    """All figures with their words."""

    models: tuple[str, ...]
    facts: tuple[tuple[tuple[str, str], ...], ...]
    source: str  # of the images
    count: int  # of images
    entries: tuple[Entry, ...]
    not_drawn: list[tuple[str, str]]

    @property
    def title(self) -> str:
        return f"Inside {in_words(self.models)}"

    def html(self) -> str:
        import jinja2

        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        source = (files("vitral.explain.figures") / _TEMPLATE).read_text(encoding="utf-8")
        return environment.from_string(source).render(page=self)


def facts_of(classifier: Classifier) -> tuple[tuple[str, str], ...]:
    """Says what a model is, where figures of two may differ for it."""
    config = classifier.model.config
    height, width = classifier.preprocess.img_size
    rows, columns = height // config.patch_size, width // config.patch_size
    parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    return (
        ("parameters", f"{parameters:,}"),
        ("layers, heads, width", f"{config.num_layers}, {config.num_heads}, {config.embed_dim}"),
        ("images", f"{height}x{width} pixels, {config.in_channels} channels"),
        (
            "patches",
            f"{rows}x{columns} of {config.patch_size} pixels" + (" after a stem" * bool(config.stem)),
        ),
        ("tokens before the patches", str(config.num_prefix_tokens)),
        ("pooling", config.pooling.replace("_", " and ")),
    )


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
