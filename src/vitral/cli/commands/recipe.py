"""`vitral recipe`: the papers' recipes, listed, shown and compared."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from vitral.cli import options, usage
from vitral.cli.console import print_table
from vitral.runtime.plainjson import to_json

if TYPE_CHECKING:
    from rich.text import Text

    from vitral.recipes.packaged import Difference, Setting

app = typer.Typer(
    cls=usage.Commands, help="Recipes of the papers: list, show and compare them.", no_args_is_help=True
)

_Recipe = options.text(
    "NAME_OR_FILE", "A recipe that comes with Vitral, a file of settings, or a run's folder."
)


@app.command("list")
def recipe_list() -> None:
    """The recipes that come with Vitral."""
    from vitral.recipes import packaged

    for name in packaged.names():
        print(f"{name:<14} {packaged.title(name)}")


@app.command("show")
def recipe_show(recipe: Annotated[str, _Recipe]) -> None:
    """A recipe's file: command, expected accuracy, and each number with its source."""
    from vitral.recipes import packaged

    packaged.settings(recipe)  # says what is wrong with a file that no run would take
    print(packaged.find(recipe).read_text(encoding="utf-8"), end="")


@app.command("diff")
def recipe_diff(
    a: Annotated[str, _Recipe], b: Annotated[str, _Recipe], json_output: options.Json = False
) -> None:
    """The settings in which two recipes differ, and where each has its number from.

    \b
    vitral recipe diff deit deit3
    vitral recipe diff deit3 runs/mine
    """
    from vitral.recipes import packaged

    differences = packaged.diff(a, b)
    if json_output:
        print(to_json({"a": a, "b": b, "differences": [asdict(item) for item in differences]}))
    else:
        print_recipe_diff(differences, a, b)


def print_recipe_diff(differences: "list[Difference]", a: str, b: str) -> None:
    """Print a row a setting, with the source that each recipe gives below its value."""
    if not differences:
        print(f"{a} and {b} have the same settings")
        return
    rows = [(item.name, _setting(item.a), _setting(item.b)) for item in differences]
    print_table(f"where {a} and {b} differ", ("setting", a, b), rows, lines=True)


def _setting(setting: "Setting") -> "Text":
    from rich.text import Text

    value = "-" if setting.value is None else json.dumps(setting.value, ensure_ascii=False)
    text = Text(value.removeprefix('"').removesuffix('"'), style="bold")
    return text.append(f"\n{setting.source}", style="not bold dim") if setting.source else text
