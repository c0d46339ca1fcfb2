"""Recipes as files: those that come with Vitral, what each says of its numbers, and how two differ.

A recipe file is TOML with the names of `vitral.recipes.schema`. A comment at a line's end, which lines
that begin with spaces and `#` continue, says where the number comes from; `diff` shows it beside it.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitral.recipes.recipe import Recipe
from vitral.recipes.schema import FIELDS, RECIPES
from vitral.runtime import settings as config
from vitral.runtime.errors import VitralError

FOLDER = RECIPES
RUN_FILE = "recipe.toml"  # in a run's folder


@dataclass(frozen=True)
class Setting:
    """A value, and what the file says of its source; `value` is None where the data decides."""

    value: Any
    source: str


@dataclass(frozen=True)
class Difference:
    """A setting that two recipes do not share."""

    name: str
    a: Setting
    b: Setting


def names() -> tuple[str, ...]:
    """The recipes that come with Vitral."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.toml")))


def title(name: str) -> str:
    """The first line of a recipe's header."""
    return find(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()


def find(name_or_file: str) -> Path:
    """The file of a recipe: one that comes with Vitral by its name, any other by its path or its run.

    A name goes before a path; `./deit` is the folder or file called deit.

    Raises:
        VitralError: if there is no such recipe; it names the nearest ones.
    """
    if name_or_file in names():
        return FOLDER / f"{name_or_file}.toml"
    path = Path(name_or_file)
    if path.is_dir():
        return path / RUN_FILE
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    near = difflib.get_close_matches(name_or_file, names(), n=2, cutoff=0.4) or names()
    raise VitralError(
        f"there is no recipe {name_or_file!r}; did you mean {' or '.join(map(repr, near))}? "
        "`vitral recipe list` lists them, and a path to a file is taken too"
    )


def read(name_or_file: str) -> dict[str, Any]:
    """The values of a recipe, as its file has them.

    Raises:
        VitralError: if there is no such recipe, or its file is not TOML.
    """
    return config.read_toml(find(name_or_file))


def recipe_of(name_or_file: str | None) -> Recipe:
    """The recipe of that name or file; without one, a recipe that says nothing.

    Raises:
        VitralError: as `read`, or if a setting cannot be used.
    """
    return Recipe(**read(name_or_file) if name_or_file else {})


def settings(name_or_file: str) -> dict[str, Setting]:
    """Every setting of a recipe by name, what its file leaves out too; groups have dotted names.

    Raises:
        VitralError: if there is no such recipe, or it has a setting that no recipe has.
    """
    path = find(name_or_file)
    values = config.read_toml(path)
    recipe = Recipe(**values)
    known = config.flat({name: recipe.get(name) for name in FIELDS})
    sources = comments(path.read_text(encoding="utf-8"))
    written = config.flat(values)
    found = {}
    for name, value in known.items():
        default = "the default" if value is not None else "chosen from the data"
        found[name] = Setting(value, sources.get(name, "") if name in written else default)
    return found


def diff(a: str, b: str) -> list[Difference]:
    """The settings in which two recipes differ, in the order of the schema.

    Args:
        a: a recipe's name, a file or a run's folder.
        b: the other.

    Raises:
        VitralError: if one of them cannot be read.
    """
    ours, theirs = settings(a), settings(b)
    absent = Setting(None, "as the model has it")  # of the architecture's fields alone
    pairs = {name: (ours.get(name, absent), theirs.get(name, absent)) for name in ours | theirs}
    # An architecture without fields is no field of one.
    pairs.pop("architecture", None)
    return [Difference(name, x, y) for name, (x, y) in pairs.items() if x.value != y.value]


# --- Comments --------------------------------------------------------------------------------------


def comments(text: str) -> dict[str, str]:
    r"""What a TOML file's comments say of each key: dotted key -> the comment at its line's end.

    >>> comments("[layer]\nscale = 1e-4  # the paper, table 1;\n              # so in the code")
    {'layer.scale': 'the paper, table 1; so in the code'}
    """
    found: dict[str, str] = {}
    table, key = "", ""
    for line in text.splitlines():
        statement, comment = _parts(line)
        heading = re.fullmatch(r"\[([\w.-]+)\]", statement)
        if heading:
            table, key = f"{heading[1]}.", ""
        elif "=" in statement:
            key = table + statement.partition("=")[0].strip()
            found[key] = comment
        elif comment and key and line[0].isspace():
            found[key] = f"{found[key]} {comment}".strip()
        else:
            key = ""
    return found


def _parts(line: str) -> tuple[str, str]:
    """A line's statement and comment; a # within quotes begins none."""
    for mark in re.finditer("#", line):
        statement = line[: mark.start()].strip()
        try:
            tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        return statement, line[mark.end() :].strip()
    return line.strip(), ""
