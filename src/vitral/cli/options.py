"""What commands' options and arguments may be; a function each makes one that refuses all else."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.spelling import meant

if TYPE_CHECKING:
    from vitral.data.columns import Columns
    from vitral.data.image_data import DataSource


def columns_of(words: list[str] | None) -> "Columns":
    """What ``["label=breed"]`` says of a table's columns."""
    from vitral.data.columns import Columns

    pairs = [word.partition("=") for word in words or []]
    for kind, equals, name in pairs:
        if not equals or not name:
            raise typer.BadParameter(f"{kind!r}: write KIND=NAME, such as label=breed", param_hint="--column")
    return Columns.of_words({kind.strip(): name for kind, _, name in pairs})


def opened(data: str, columns: list[str] | None) -> "DataSource":
    """DATA as it was typed; or, where columns are told, what it holds, none of it held out yet."""
    if not columns:
        return data
    from vitral.data.image_data import open_data

    return open_data(data, val_fraction=0, columns=columns_of(columns))


def text(metavar: str, about: str) -> Any:
    """An argument, or several, none of them empty."""
    return typer.Argument(metavar=metavar, callback=given, help=about)


def name(metavar: str, about: str, *names: str, panel: str | None = None) -> Any:
    """An option whose text is not empty; `panel` is the part of the help that it stands in."""
    return typer.Option(*names, metavar=metavar, callback=given, help=about, rich_help_panel=panel)


def given(value: Any) -> Any:
    if value is not None and "" in ([value] if isinstance(value, str) else value):
        raise typer.BadParameter("it is empty")
    return value


def choice(values: tuple[str, ...], about: str = "", *names: str, panel: str | None = None) -> Any:
    """An option that is one of some words."""
    listed = f"{', '.join(values[:-1])} or {values[-1]}"
    help = f"{listed}{about or '.'}"
    return typer.Option(*names, callback=one_of(values), help=help, rich_help_panel=panel)


def one_of(values: tuple[str, ...]) -> Callable[[Any], Any]:
    """What gives back one of the words, or several, and refuses others."""

    def checked(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one not in values:
                raise typer.BadParameter(f"{one!r} is not one of {', '.join(values)}{meant(one, values)}")
        return value

    return checked


def number(span: tuple[int, int], about: str, *, panel: str | None = None) -> Any:
    """An option that is a whole number, or several, from the first to the second."""

    def checked(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and not span[0] <= one <= span[1]:
                raise typer.BadParameter(f"{one} is not a whole number from {span[0]:,} to {span[1]:,}")
        return value

    return typer.Option(callback=checked, help=about, rich_help_panel=panel)


def real(span: tuple[float, float], about: str) -> Any:
    """An option that is a number, whole or not, from the first to the second."""

    def checked(value: float) -> float:
        if not span[0] <= value <= span[1]:  # as what is no number is not
            raise typer.BadParameter(f"{value:g} is not a number from {span[0]:g} to {span[1]:,g}")
        return value

    return typer.Option(callback=checked, help=about)


def share(about: str) -> Any:
    """An option from 0 to 1."""

    def checked(value: float) -> float:
        if not 0 <= value <= 1:  # as what is no number is not
            raise typer.BadParameter(f"{value:g} is not a share from 0 to 1")
        return value

    return typer.Option(callback=checked, help=about)


def folder(about: str, *, panel: str | None = None) -> Any:
    """An option that is a folder to write to, new or there already."""
    return typer.Option(parser=as_folder, metavar="FOLDER", help=about, rich_help_panel=panel)


def as_folder(value: str | Path) -> Path:
    if not str(value):
        raise typer.BadParameter("it is empty; name a folder")
    path = Path(value)
    try:
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise typer.BadParameter(f"{value}: {error.strerror}") from error
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file; name a new folder")
    return path


def file(about: str, suffixes: tuple[str, ...] = ()) -> Any:
    """An option that is a file to write, which its suffix says how to."""

    def checked(value: str | Path) -> Path:
        from vitral.evaluation.mistakes import refuse_unwritable

        if not str(value):
            raise typer.BadParameter("it is empty; name a file")
        try:
            refuse_unwritable(Path(value), suffixes)
        except VitralError as error:
            raise typer.BadParameter(str(error)) from error
        return Path(value)

    return typer.Option(parser=checked, metavar="FILE", help=about)


# --- Shared by commands ----------------------------------------------------------------------------

Data = Annotated[str, text("DATA", f"{limits.DATA[:1].upper()}{limits.DATA[1:]}.")]
Model = Annotated[
    str,
    text(
        "MODEL",
        "A model or run folder, a hub folder of timm or transformers, a .npz, .safetensors or .pth file, "
        "an artifact of export, or hf://org/name\\[@revision].",  # rich would take brackets for its own
    ),
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that you want to change.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, choice(limits.DEVICES)]
Precision = Annotated[str, choice(limits.PRECISIONS)]
Tta = Annotated[str, choice(limits.TTA, " (mean of the probabilities of each image and its mirror image).")]
Decoding = Annotated[
    str | None,
    choice(
        limits.DECODINGS,
        ": how finely JPEGs are decoded; by default as the model's file says, else in full. `vitral doctor` "
        "says what it changes.",
    ),
]
Merge = Annotated[
    str | None,
    name(
        "R",
        "Patches that merge in each layer, for speed: 8, 16..0 (falling), or a number a layer: 8,8,4.",
        "--merge",
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Open an artifact's .pt2 file, which can execute code, if you trust it."),
]
Split = Annotated[str | None, choice(limits.SPLITS, "; by default test, or val if there is no test split.")]
Seed = Annotated[int, number(limits.SEED, "Seed of all random choices.")]
Column = Annotated[
    list[str] | None,
    name(
        "KIND=NAME",
        "Of a table, which column holds what, where its own names do not say: label=breed. KIND is image, "
        "label, split, group, label_delimiter or image_root; repeatable.",
        "--column",
    ),
]
MaxDamaged = Annotated[float, share("Largest share of damaged images that is accepted.")]
Workers = Annotated[
    int | None,
    number(limits.WORKERS, "Processes that load images; by default as many as suit the machine."),
]
