"""`vitral explain`: what a model looks at, as pictures and arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options, usage
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_table, progress_bar, say, warn
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.files import refuse_filled
from vitral.runtime.plainjson import to_json
from vitral.runtime.streams import shown

if TYPE_CHECKING:
    from vitral.explain.faithfulness.record import Faithfulness
    from vitral.explain.inside import Inside
    from vitral.explain.pictures import Asked, Drawing, Explained
    from vitral.explain.target import Target
    from vitral.inference.classifier import Classifier
    from vitral.model.config import ViTConfig

_PICTURES, _ATTENTION = "Maps of images", "Attention itself, rather than an attribution"
_SCORES = "How far to believe each method, on DATA"

# What the command can be asked for. An option that is not named here belongs to all.
_MAPS, _SCORE, _LIST = "maps of images", "--score", "--list"
_BELONGS = {
    **{name: {_MAPS} for name in ("out", "classes", "against", "look", "layers", "heads", "batch_size")},
    **{name: {_SCORE} for name in ("images", "fill", "split", "seed", "workers", "cache")},
    **{name: {_MAPS, _SCORE} for name in ("words", "method", "device", "precision")},
}
_FILLS = {"drop": "patches left out", "mean": "patches of the mean colour"}
_USUAL = "ViT-B/16"  # whose costs are listed where no model is named

_Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="As for `vitral predict`; --list alone needs none.")
]
_Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE...|DATA",
        callback=options.given,
        help=f"Files, folders or patterns; for --score {limits.DATA}.",
    ),
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
_Fill = Annotated[
    list[str] | None,
    options.choice(
        limits.FILLS,
        ": patches are left out, or in their place is the mean colour. By default both, sorted by the first.",
        panel=_SCORES,
    ),
]
_Split = Annotated[str | None, options.choice(limits.SPLITS, "; by default test, else val.", panel=_SCORES)]
_Cache = Annotated[
    Path | None,
    options.folder(
        "Folder for what is computed, by which a stopped run goes on; by default in $VITRAL_CACHE or "
        "~/.cache/vitral.",
        panel=_SCORES,
    ),
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
    score: Annotated[
        bool,
        typer.Option(
            "--score", help="Deletion, insertion and more for each method.", rich_help_panel=_SCORES
        ),
    ] = False,
    images: Annotated[int, options.number(limits.IMAGES, "Images of DATA at most.", panel=_SCORES)] = 400,
    fill: _Fill = None,
    split: _Split = None,
    seed: Annotated[int, options.number(limits.SEED, "Of which images are drawn.", panel=_SCORES)] = 0,
    cache: _Cache = None,
    workers: Annotated[
        int | None,
        options.number(limits.WORKERS, "Processes that load images; by default as suits.", panel=_SCORES),
    ] = None,
    list_methods: Annotated[
        bool, typer.Option("--list", help="Print the methods, what they show, need and cost.")
    ] = False,
    json_output: options.Json = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Which parts of an image a model's answer rests on, and how far to believe it.

    \b
    vitral explain runs/photos new/*.jpg --out maps
    vitral explain runs/photos cat.jpg --class lynx --against cat --out why
    vitral explain runs/photos cat.jpg --layers -1 --heads 0,3 --out heads
    vitral explain runs/photos photos/ --score
    vitral explain --list
    """
    task = _task(ctx, {_SCORE: score, _LIST: list_methods})
    if task == _LIST:
        print_methods(model, as_json=json_output)
        return
    if model is None or not words:
        needs = (
            ("name a model and data", "MODEL DATA")
            if task == _SCORE
            else ("name a model and images", "MODEL IMAGE...")
        )
        raise typer.BadParameter(needs[0], param_hint=needs[1])
    if task == _SCORE:
        wanted: dict[str, Any] = {"methods": method, "images": images, "split": split, "seed": seed}
        wanted |= {"cache": cache, "workers": workers} | ({"fill": tuple(fill)} if fill else {})
        _score(load_classifier(model, device, precision), _one(words), model, wanted, as_json=json_output)
        return
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


def _one(words: list[str]) -> str:
    if len(words) > 1:
        raise typer.BadParameter(f"{words[1]!r} is one too many; --score takes one", param_hint="DATA")
    return words[0]


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


def _score(classifier: "Classifier", data: str, model: str, wanted: dict[str, Any], *, as_json: bool) -> None:
    from vitral.explain.inside import Inside

    with progress_bar("scoring") as bar:
        found = Inside(classifier).faithfulness(data, warn=warn, on_images=bar, **wanted)
    if as_json:
        print(to_json(found.to_dict()))
    else:
        print_scores(found, f"{model} on {data}, split {found.split} ({classifier.placement})")


def print_scores(found: "Faithfulness", title: str) -> None:
    """Print the methods, the most faithful first, a table for each fill; then what can be said of them.

    Intervals are of 95 %.
    """
    from vitral.explain.faithfulness.redrawn import HALF

    say(f"{title}: {found.n:,} images")
    headings = ("method", "SRG", "interval", "group", "deletion", "insertion", "SaCo", "redrawn")
    for fill in found.fills:
        rows = []
        for scored in found.methods:
            of = scored.fills[fill]
            interval = f"{of.srg.low:+.2f} to {of.srg.high:+.2f}"
            areas = (f"{area.mean:.2f}" for area in (of.deletion, of.insertion))
            redrawn = f"{scored.redrawn[HALF].mean:+.2f}" if HALF in scored.redrawn else "-"
            saco = f"{scored.saco.mean:+.2f}"
            rows.append((scored.method, f"{of.srg.mean:+.2f}", interval, of.group, *areas, saco, redrawn))
        print_table(_FILLS[fill], headings, rows, set(headings[1:]))
    for sentence in found.conclusions():
        say(sentence)


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
