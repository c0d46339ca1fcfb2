"""Settings from TOML files and `key=value` words to a frozen dataclass; errors name the nearest key."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

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
    """``{"layer.layer_scale": 0.1}`` -> ``{"layer": {"layer_scale": 0.1}}``: groups within a config.

    Raises:
        VitralError: if a key is given a value and fields too.
    """
    grouped: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        place = grouped
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise VitralError(f"{key!r} names a field of {group!r}, which was given a value of its own")
        place[name] = value
    return grouped


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over them; groups that both have are merged in turn."""
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(change, Mapping)
        result[key] = merged(old, change) if both else change
    return result


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"layer": {"layer_scale": 0.1}}`` -> ``{"layer.layer_scale": 0.1}``, the opposite of `nested`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            result[key] = value
    return result


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
    _refuse_unknown(kind, values)
    try:
        checked = _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # the dataclass itself refuses what it was given
            raise VitralError(first["msg"].removeprefix("Value error, ")) from error
        key, value = _at(first["loc"], values)
        raise VitralError(f"{key}={value!r}: {first['msg'].lower()}") from error
    return checked


@cache
def _adapter(kind: type[Settings]) -> TypeAdapter[Settings]:
    """To make one of a recipe takes a twentieth of a second."""
    return TypeAdapter(kind)


def _refuse_unknown(kind: Any, values: Mapping[str, Any], group: str = "") -> None:
    types = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise VitralError(f"there is no setting {group + key!r}; did you mean {group + nearest!r}?")
        for part in (types[key], *get_args(types[key])):
            if dataclasses.is_dataclass(part) and isinstance(value, Mapping):
                _refuse_unknown(part, value, f"{group}{key}.")


def _at(place: Sequence[str | int], values: Mapping[str, Any]) -> tuple[str, Any]:
    """The key, dotted within groups, and the value that stand nearest to `place`."""
    key, value = str(place[0]), values.get(str(place[0]))
    for name in place[1:]:
        if not isinstance(value, Mapping) or name not in value:
            break
        key, value = f"{key}.{name}", value[name]
    return key, value


def to_toml(settings: Any, header: str) -> str:
    """A dataclass as TOML, its dictionaries as tables; None is left out, for TOML has no word for it."""
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    lines += _toml_table({name: value for name, value in values.items() if value is not None})
    return "\n".join(lines) + "\n"


def _toml_table(values: Mapping[str, Any], path: str = "") -> list[str]:
    # What follows a table's heading is its own, so the plain values come first.
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping) and value}
    lines = [f"{_toml_key(key)} = {_toml_text(key, values[key])}" for key in values if key not in tables]
    for key, value in tables.items():
        inner = f"{path}{_toml_key(key)}"
        lines += ["", f"[{inner}]", *_toml_table(value, f"{inner}.")]
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_text(key: str, value: Any) -> str:
    if value is None:
        raise VitralError(f"{key} is None, which a TOML file cannot say; leave it out")
    # For numbers, text, booleans, lists of them and an empty dictionary, JSON's notation is TOML's.
    return json.dumps(value, ensure_ascii=False)
