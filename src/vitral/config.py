"""Settings from TOML files and `key=value` words to a frozen dataclass; errors name the nearest key."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from vitral.errors import VitralError

Settings = TypeVar("Settings")


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """``["minutes=15", "img_size=[32, 48]"]`` -> values read as TOML where they are TOML, else text.

    Raises:
        VitralError: if a word has no ``=``.
    """
    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise VitralError(f"{word!r} is no setting; write key=value, for example epochs=20")
        values[key.strip()] = _toml_value(text.strip())
    return values


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"layer.layer_scale": 0.1}`` -> ``{"layer": {"layer_scale": 0.1}}``: groups within a config."""
    grouped: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        place = grouped
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return grouped


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_toml(path: Path) -> dict[str, Any]:
    """Raises VitralError if the file is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VitralError(f"there is no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise VitralError(f"{path} is not TOML: {error}") from error


def build(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """A dataclass from plain values, each checked against its field's type.

    Raises:
        VitralError: for the first unknown key or unfit value.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # pyrefly: ignore[bad-argument-type]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise VitralError(f"there is no setting {key!r}; did you mean {nearest!r}?")
    try:
        checked = TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # the dataclass itself refuses what it was given
            raise VitralError(first["msg"].removeprefix("Value error, ")) from error
        key = first["loc"][0]
        raise VitralError(f"{key}={values.get(str(key))!r}: {first['msg'].lower()}") from error
    return checked


def to_toml(settings: Any, header: str) -> str:
    """A flat dataclass as TOML; None is left out, for TOML has no word for it."""
    # For numbers, text, booleans and lists of them, JSON's notation is TOML's.
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is not None:
            lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
