"""`Recipe`: what a user asks of a run, and nothing else; `vitral.recipes.resolve` chooses the rest."""

from collections.abc import Iterable, Mapping
from typing import Any

from vitral.recipes import schema
from vitral.runtime.settings import build, deep_merge, nested, parse_overrides

# The word that takes a setting back, so that it is as if nobody had said anything: minutes=default.
DEFAULT = "default"


class Recipe:
    """Settings of a run by name, those alone that were given: ``Recipe(model="ViT-S/16", minutes=30)``.

    `vitral.recipes.schema` lists them all. None takes a setting back to its default, which matters where a
    recipe is laid over another one or over the run that is resumed.

    Raises:
        VitralError: for the first unknown name or unfit value.
    """

    def __init__(self, /, **settings: Any) -> None:
        named = {k: value for k, value in settings.items() if value is not None or k not in schema.FIELDS}
        checked = build(schema.given_settings(), named)
        self.settings: Mapping[str, Any] = {
            name: None if value is None else getattr(checked, name) for name, value in settings.items()
        }

    @property
    def given(self) -> dict[str, Any]:
        """The settings that have a value."""
        return {name: value for name, value in self.settings.items() if value is not None}

    def get(self, name: str) -> Any:
        """What was given, else the default; None if there is none, or the data decides."""
        value = self.settings.get(name)
        return schema.default(name) if value is None else value

    @property
    def opening(self) -> dict[str, Any]:
        """What `open_data` is told of the images."""
        return schema.opening(self.get)

    def changed(self, /, **settings: Any) -> "Recipe":
        """With other settings; None takes one back."""
        return Recipe(**{**self.settings, **settings})

    def with_words(self, words: Iterable[str]) -> "Recipe":
        """With what ``["minutes=15", "architecture.layer.layer_scale=0.1", "steps=default"]`` say."""
        values = {name: None if value == DEFAULT else value for name, value in parse_overrides(words).items()}
        return Recipe(**deep_merge(self.settings, nested(values)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.settings == other.settings

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"
