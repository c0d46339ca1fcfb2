"""`vitral explain`: what a model looks at, as pictures and arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options, usage
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_table, warn
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.files import refuse_filled
from vitral.runtime.plainjson import to_json
from vitral.runtime.streams import shown

if TYPE_CHECKING:
    from vitral.explain.inside import Inside
    from vitral.explain.pictures import Asked, Drawing, Explained
    from vitral.explain.target import Target
    from vitral.inference.classifier import Classifier
    from vitral.model.config import ViTConfig

_PICTURES, _ATTENTION = "Maps of images", "Attention itself, rather than an attribution"
_MAPS, _LIST = "maps of images", "--list"
_USUAL = "ViT-B/16"  # whose costs are listed where no model is named
# The tasks that an option belongs to; one that is not named belongs to all.
_BELONGS = {
    "out": {_MAPS},
    "method": {_MAPS},
    "classes": {_MAPS},
    "against": {_MAPS},
    "look": {_MAPS},
    "layers": {_MAPS},
    "heads": {_MAPS},
    "batch_size": {_MAPS},
    "words": {_MAPS},
}

_Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="As for `vitral predict`; --list alone needs none.")
]
_Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="IMAGE...", callback=options.given, help="Files, folders or patterns."),
]
_Out = Annotated[Path | None, options.folder("New folder, for a .png and a .npy an image.", panel=_PICTURES)]
_Method = Annotated[
    list[str] | None,
    options.name(
        "METHOD", "One of --list, by default legrad; repeatable, below each other.", panel=_PICTURES
    ),
]
_Classes = Annotated[
    list[str] | None,
    options.name(
        "NAME",
        "What to explain; repeatable, side by side. By default the predicted class, or each label that a "
        "multi-label model says is there.",
        "--class",
        panel=_PICTURES,
    ),
]
_Against = Annotated[
    str | None,
    options.name(
        "NAME", "Why the class and not this one: explains their scores' difference.", panel=_PICTURES
    ),
]
_Look = Annotated[
    str | None,
    options.choice(
        limits.LOOKS, ", as maps are drawn; by default both of one map, else smooth.", panel=_PICTURES
    ),
]
_Layers = Annotated[
    str | None, options.name("LIST", "Such as -1 (the last, by default), 0,5,11 or all.", panel=_ATTENTION)
]
_Heads = Annotated[str | None, options.name("LIST", "Such as 0,3; by default all.", panel=_ATTENTION)]


def explain(  # noqa: PLR0913 - a command's options
    ctx: typer.Context,
    model: _Model = None,
    words: _Words = None,
    out: _Out = None,
    method: _Method = None,
    classes: _Classes = None,
    against: _Against = None,
    look: _Look = None,
    layers: _Layers = None,
    heads: _Heads = None,
    batch_size: Annotated[int, options.number(limits.BATCH, "Images at a time.", panel=_PICTURES)] = 8,
    list_methods: Annotated[
        bool, typer.Option("--list", help="Print the methods, what they show, need and cost.")
    ] = False,
    json_output: options.Json = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Which parts of an image a model's answer rests on, as pictures and arrays.

    \b
    vitral explain runs/photos new/*.jpg --out maps
    vitral explain runs/photos cat.jpg --class lynx --against cat --out why
    vitral explain runs/photos cat.jpg --layers -1 --heads 0,3 --out heads
    vitral explain --list
    """
    if _task(ctx, {_LIST: list_methods}) == _LIST:
        print_methods(model, as_json=json_output)
        return
    if model is None or not words:
        raise typer.BadParameter("name a model and images", param_hint="MODEL IMAGE...")
    if out is None:
        raise typer.BadParameter("name a new folder for the maps", param_hint="--out")
    layers_heads = _attention_of(layers, heads, others=bool(method or classes or against))
    refuse_filled(out)
    from vitral.explain.inside import Inside
    from vitral.explain.pictures import Attribution, Drawing, Heads

    classifier = load_classifier(model, device, precision)
    if layers_heads:
        asked: Asked = Heads(*layers_heads)
    else:
        targets = _targets(classifier, [*(classes or ()), *([against] if against else ())])
        methods = {"methods": tuple(method)} if method else {}
        asked = Attribution(
            **methods, classes=targets[: len(classes or ())], against=targets[-1] if against else None
        )
    drawing = Drawing(out, look, batch_size)  # type: ignore[arg-type]
    _explain_images(Inside(classifier), words, asked, drawing, as_json=json_output)


def _task(ctx: Any, wanted: dict[str, bool]) -> str:
    """The one thing that is asked for; refuses a second, and options of another."""
    tasks = [task for task, asked in wanted.items() if asked] or [_MAPS]
    if len(tasks) > 1:
        raise typer.BadParameter(f"goes without {tasks[1]}; ask for one at a time", param_hint=tasks[0])
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name).name == "COMMANDLINE"
        if given and tasks[0] not in _BELONGS.get(param.name, tasks):
            listed = " and ".join(sorted(_BELONGS[param.name]))
            text = f"is for {listed}, and {tasks[0]} goes without it"
            raise typer.BadParameter(text, param_hint=usage.name_of(param))
    return tasks[0]


_Numbers = tuple[int, ...] | None


def _attention_of(layers: str | None, heads: str | None, *, others: bool) -> tuple[_Numbers, _Numbers] | None:
    """Which layers and heads attention is shown of; None if an attribution is asked for."""
    if not (layers or heads):
        return None
    if others:
        text = "shows attention itself, and goes without --method, --class and --against"
        raise typer.BadParameter(text, param_hint="--layers" if layers else "--heads")
    return _numbers(layers or "-1", "--layers"), _numbers(heads or "all", "--heads")


def _numbers(text: str, option: str) -> _Numbers:
    """Whole numbers between commas; None for all."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        problem = f"{text!r} is no list of whole numbers such as 0,3, and not all"
        raise typer.BadParameter(problem, param_hint=option) from None


def _targets(classifier: "Classifier", names: list[str]) -> "tuple[Target, ...]":
    """Classes by name, or by number where the model has no names."""
    return tuple(int(name) if name.isdecimal() and not classifier.labels else name for name in names)


def _explain_images(
    inside: "Inside", words: Sequence[str], asked: "Asked", drawing: "Drawing", *, as_json: bool
) -> None:
    from vitral.data.sources import find_images
    from vitral.explain.pictures import explain_images

    found = find_images(words)
    for note in (*found.notes, *found.failures):
        warn(note)
    failed = 0
    for explained in explain_images(inside, found.files, asked, drawing):
        failed += explained.error is not None
        _print_explained(explained, as_json=as_json)
    if failed or found.failures:
        raise VitralError(found.summary(failed))


def _print_explained(explained: "Explained", *, as_json: bool) -> None:
    if as_json:
        print(to_json(explained.to_dict()))
    elif explained.error is None:
        label = "".join(f"{label} {probability:.1%}, " for label, probability in explained.top[:1])
        print(shown(f"{explained.image}: {label}{explained.picture}"))
    if explained.error is not None:
        warn(f"{explained.image}: {explained.error}")


def print_methods(model: str | None, *, as_json: bool) -> None:
    """Print the table of methods, with what an image costs this model, or ViT-B/16 at 224 pixels."""
    from vitral.explain.attribution.method import Settings
    from vitral.explain.attribution.methods import DEFAULT, METHODS

    config = _config_of(model or _USUAL)
    methods = [
        {
            "method": method.name,
            "default": method.name == DEFAULT,
            "shows": method.says,
            "of_class": method.of_class,
            "needs": method.needs,
            "forwards": method.cost(config, Settings()),
            "limits": method.limits,
            "reference": method.reference,
        }
        for method in METHODS.values()
    ]
    if as_json:
        print(to_json(methods))
        return
    rows = [
        (
            f"{row['method']}{' (default)' if row['default'] else ''}",
            "yes" if row["of_class"] else "no",
            f"{row['forwards']:,.3g}",
            row["needs"],
            "; ".join(part for part in (row["shows"], row["limits"], row["reference"]) if part),
        )
        for row in methods
    ]
    headings = ("method", "of a class", "forward passes", "needs", "what it shows; limits; reference")
    title = f"methods of attribution, and the forward passes that an image of {model or _USUAL} takes"
    print_table(title, headings, rows, {"forward passes"}, lines=True)


def _config_of(model: str) -> "ViTConfig":
    from vitral.checkpoints.folder import is_checkpoint, load_checkpoint
    from vitral.model.variants import configure

    return load_checkpoint(model).model.config if is_checkpoint(model) else configure(model, {})
