"""Settings from TOML files and `key=value` words to a frozen dataclass; errors name the nearest key."""

import dataclasses
import functools
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import BaseModel, TypeAdapter, ValidationError, create_model

from vitral.runtime.errors import VitralError
from vitral.runtime.spelling import meant

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
            raise VitralError(f"{word!r} is not a setting; write key=value, for example epochs=20")
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


def deep_merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lays mappings over each other: later values win, key by key within groups that both have."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            result[key] = deep_merge(old, value) if both else value
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
    _refuse_unfit(kind, values)
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise VitralError(_explained(error, kind, values)) from error


@functools.cache
def _adapter(kind: type[Settings]) -> TypeAdapter[Settings]:
    """To make one of a recipe takes a twentieth of a second."""
    return TypeAdapter(kind)


def check(settings: Any) -> None:
    """Refuses fields of a dataclass that do not fit their types, as `build` does; for its `__post_init__`.

    Raises:
        VitralError: for the first unfit value.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    _refuse_unfit(type(settings), values)
    try:
        _checker(type(settings)).model_validate(values)
    except ValidationError as error:
        raise VitralError(_explained(error, type(settings), values)) from error


@functools.lru_cache
def _checker(kind: Any) -> type[BaseModel]:
    """Of a dataclass's fields alone: building it would check it again."""
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in _hints(kind).items()}
    return create_model(kind.__name__, **fields)


@functools.lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _refuse_unfit(kind: Any, values: Mapping[str, Any], group: str = "") -> None:
    """Refuses unknown keys, and what pydantic would make fit: a truth value for a number, and no number."""
    hints = _hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            names = [f"{group}{name}" for name in (*known, *_inner_names(known.values()))]
            raise VitralError(f"there is no setting {group + key!r}{meant(key, names)}")
        types = list(_leaves(hints[key]))
        for single in _singles(value):
            if isinstance(single, bool) and bool not in types and Any not in types:
                wanted = _expected(hints[key]) or "this takes no true or false"
                raise VitralError(f"{group}{key}={_shown(value)}: {wanted}")
            if isinstance(single, float) and not math.isfinite(single):
                wanted = _expected(hints[key]) or "it must be a finite number"
                raise VitralError(f"{group}{key}={_shown(value)}: {wanted}")
        for part in types:
            if dataclasses.is_dataclass(part) and isinstance(value, Mapping):
                _refuse_unfit(part, value, f"{group}{key}.")


def _inner_names(fields: Iterable[dataclasses.Field]) -> Iterator[str]:
    """The dotted names below a field that holds those of another dataclass, which its metadata names."""
    for field in fields:
        if inner := field.metadata.get("fields_of"):
            yield from (f"{field.name}.{part.name}" for part in dataclasses.fields(inner))


def _leaves(hint: Any) -> Iterator[Any]:
    """The plain types that a field may have, those within unions and tuples too."""
    if get_origin(hint) is Annotated:
        yield from _leaves(get_args(hint)[0])
    elif get_args(hint):
        for part in get_args(hint):
            yield from _leaves(part)
    else:
        yield hint


def _singles(value: Any) -> Iterator[Any]:
    """The values within lists; groups' fields are looked at by their names."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _singles(item)
    elif isinstance(value, Mapping):
        # A truth value may well fit one of its fields.
        yield from (item for item in _singles(list(value.values())) if not isinstance(item, bool))
    else:
        yield value


_BEYOND_RANGE = {
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number",
    "int_parsing_size",
}  # fmt: skip


def _explained(error: ValidationError, kind: Any, values: Mapping[str, Any]) -> str:
    """The first thing that is wrong, in a line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # the dataclass itself refuses what it was given
        return message
    key, value = _at(first["loc"], values)
    if first["type"] in _BEYOND_RANGE and (wanted := _expected(_hints(kind).get(key))):
        return f"{key}={_shown(value)}: {wanted}"
    return f"{key}={_shown(value)}: {message[0].lower()}{message[1:]}"


def _expected(hint: Any) -> str | None:
    """``"it must be a whole number from 1 to 100"``; None where the type has no range."""
    if get_origin(hint) is not Annotated:
        return next(filter(None, map(_expected, get_args(hint))), None)
    bounds: dict[str, Any] = {}
    for field in hint.__metadata__:
        for bound in getattr(field, "metadata", ()):
            bounds |= {
                name: getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)
            }
    if not bounds:
        return None
    low = f"from {bounds['ge']:,}" if "ge" in bounds else f"above {bounds.get('gt', 0):,}"
    high = (
        f"to {bounds['le']:,}" if "le" in bounds else f"to below {bounds['lt']:,}" if "lt" in bounds else "on"
    )
    what = "a whole number" if get_args(hint)[0] is int else "a number"
    return f"it must be {what} {low} {high}"


def _shown(value: Any) -> str:
    """As it was typed, nearly."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _at(place: Sequence[str | int], values: Mapping[str, Any]) -> tuple[str, Any]:
    """The key, dotted within groups, and the value that stand nearest to `place`."""
    key, value = str(place[0]), values.get(str(place[0]))
    for name in place[1:]:
        if not isinstance(value, Mapping) or name not in value:
            break
        key, value = f"{key}.{name}", value[name]
    return key, value


def to_toml(settings: Mapping[str, Any], header: str) -> str:
    """Settings as TOML, groups as tables, below a comment.

    Raises:
        VitralError: if one is None, for which TOML has no word.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    for name, value in flat(settings).items():
        if value is None:
            raise VitralError(f"{name} is None, which a TOML file cannot say; leave it out")
    return "\n".join([*lines, tomli_w.dumps(settings)])
