"""`vitral explain`: what an answer rests on, how far to believe it, and the papers' figures."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options, usage
from vitral.cli.classifier import load_classifier
from vitral.cli.console import print_lines, print_table, progress_bar, say, warn
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.files import refuse_filled
from vitral.runtime.plainjson import to_json
from vitral.runtime.streams import shown

if TYPE_CHECKING:
    from vitral.data.image_data import DataSource
    from vitral.explain.faithfulness.record import Faithfulness
    from vitral.explain.faithfulness.statistics import Estimate
    from vitral.explain.pictures import Asked, Attribution, Explained, Heads
    from vitral.inference.classifier import Classifier
    from vitral.model.config import ViTConfig

_PICTURES, _ATTENTION = "Maps of images", "Attention itself, rather than an attribution"
_SCORES, _PAPER = "How far to believe each method, on DATA", "The papers' figures of MODEL, or of two"

# What the command can be asked for. An option that is not named here belongs to all.
_MAPS, _SCORE, _FIGURES, _LIST = "maps of images", "--score", "--figures", "--list"
_BELONGS = {
    **{name: {_MAPS} for name in ("out", "classes", "against", "look", "layers", "heads", "batch_size")},
    **{name: {_SCORE} for name in ("fill", "split", "workers", "cache")},
    "renormalise": {_FIGURES},
    **{name: {_SCORE, _FIGURES} for name in ("images", "seed", "column")},
    "method": {_MAPS, _SCORE},
    **{name: {_MAPS, _SCORE, _FIGURES} for name in ("words", "device", "precision")},
}
_FILLS = {"drop": "patches left out", "mean": "patches of the mean colour"}
_PROGRESS_SECONDS = 10.0  # between two lines
_USUAL = "ViT-B/16"  # whose costs are listed where no model is named

_Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="As for `vitral predict`; --list alone needs none.")
]
_Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE...|DATA",
        callback=options.given,
        help=f"Files, folders or patterns; for --score and --figures {limits.DATA}. For --figures a second "
        "MODEL may stand before it, and it may be left out.",
    ),
]
_Out = Annotated[Path | None, options.folder("New folder, for a .png and a .npy an image.", panel=_PICTURES)]
_Method = Annotated[
    list[str] | None,
    options.name(
        "METHOD", "Of --list, by default gradient_rollout; several: A,B, or repeat it.", panel=_PICTURES
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
_BatchSize = Annotated[int, options.number(limits.BATCH, "Images at a time.", panel=_PICTURES)]
_Score = Annotated[
    bool,
    typer.Option("--score", help="Deletion, insertion and more for each method.", rich_help_panel=_SCORES),
]
_Images = Annotated[
    int | None,
    options.number(limits.IMAGES, "Of DATA at most; by default 400, for --figures 128.", panel=_SCORES),
]
_Seed = Annotated[int, options.number(limits.SEED, "Of which images are drawn.", panel=_SCORES)]
_Workers = Annotated[
    int | None,
    options.number(limits.WORKERS, "Processes that load images; by default as suits.", panel=_SCORES),
]
_Figures = Annotated[
    Path | None,
    options.folder(
        "New folder, for a page with filters, positions, attention distance, entropy, norms and more, each "
        "as .png and .csv; most of them need DATA.",
        panel=_PAPER,
    ),
]
_Renormalise = Annotated[
    bool,
    typer.Option(
        "--renormalise",
        help="Attention distance over the patches alone, not as the paper's authors did.",
        rich_help_panel=_PAPER,
    ),
]
_List = Annotated[bool, typer.Option("--list", help="Print the methods, what they show, need and cost.")]
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
    batch_size: _BatchSize = 8,
    layers: _Layers = None,
    heads: _Heads = None,
    score: _Score = False,
    images: _Images = None,
    seed: _Seed = 0,
    fill: _Fill = None,
    split: _Split = None,
    cache: _Cache = None,
    workers: _Workers = None,
    figures: _Figures = None,
    renormalise: _Renormalise = False,
    list_methods: _List = False,
    column: options.Column = None,
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
    vitral explain runs/photos photos/ --figures figures
    vitral explain --list
    """
    task = _task(ctx, {_SCORE: score, _FIGURES: figures is not None, _LIST: list_methods})
    if task == _LIST:
        print_methods(model, as_json=json_output)
        return
    name, given = _required(task, model, words)
    method = [name for part in method or [] for name in part.split(",")] or None
    drawn: dict[str, Any] = {"seed": seed} | ({"images": images} if images else {})
    if figures is not None:
        wanted = {**drawn, "renormalise": renormalise}
        _figures([name, *given], figures, (device, precision), wanted, column, as_json=json_output)
    elif score:
        wanted = {**drawn, "methods": method, "split": split, "cache": cache, "workers": workers}
        wanted |= {"fill": tuple(fill)} if fill else {}
        data = options.opened(_one(given), column)
        title = f"{name} on {_one(given)}"
        _score(load_classifier(name, device, precision), data, title, wanted, as_json=json_output)
    else:
        attention = _attention_of(layers, heads, others=bool(method or classes or against))
        folder = _new(out)
        classifier = load_classifier(name, device, precision)
        asked = attention or _attribution(classifier, method, classes or [], against)
        _draw(classifier, given, asked, (folder, look, batch_size), as_json=json_output)


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


def _required(task: str, model: str | None, words: list[str] | None) -> tuple[str, list[str]]:
    """The model and the words after it, which figures alone can do without."""
    if model is None or not (words or task == _FIGURES):
        what, hint = {_SCORE: ("a model and data", "MODEL DATA"), _FIGURES: ("a model", "MODEL")}.get(
            task, ("a model and images", "MODEL IMAGE...")
        )
        raise typer.BadParameter(f"name {what}", param_hint=hint)
    return model, words or []


# --- Maps of images --------------------------------------------------------------------------------


def _new(out: Path | None) -> Path:
    if out is None:
        raise typer.BadParameter("name a new folder for the maps", param_hint="--out")
    refuse_filled(out)
    return out


def _attention_of(layers: str | None, heads: str | None, *, others: bool) -> "Heads | None":
    """Which layers and heads attention is shown of; None if an attribution is asked for."""
    if not (layers or heads):
        return None
    if others:
        text = "shows attention itself, and goes without --method, --class and --against"
        raise typer.BadParameter(text, param_hint="--layers" if layers else "--heads")
    chosen = _numbers(layers or "-1", "--layers"), _numbers(heads or "all", "--heads")
    from vitral.explain.pictures import Heads

    return Heads(*chosen)


def _numbers(text: str, option: str) -> tuple[int, ...] | None:
    """Whole numbers between commas; None for all."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        problem = f"{text!r} is no list of whole numbers such as 0,3, and not all"
        raise typer.BadParameter(problem, param_hint=option) from None


def _attribution(
    classifier: "Classifier", methods: list[str] | None, classes: list[str], against: str | None
) -> "Attribution":
    """What is asked of the methods; classes by name, or by number where the model has no names."""
    from vitral.explain.pictures import Attribution

    def target(name: str) -> str | int:
        return int(name) if name.isdecimal() and not classifier.labels else name

    return Attribution(
        **({"methods": tuple(methods)} if methods else {}),
        classes=tuple(map(target, classes)),
        against=None if against is None else target(against),
    )


def _draw(
    classifier: "Classifier",
    words: list[str],
    asked: "Asked",
    drawing: tuple[Path, str | None, int],
    *,
    as_json: bool,
) -> None:
    from vitral.data.sources import find_images
    from vitral.explain.inside import Inside
    from vitral.explain.pictures import Drawing, explain_images

    found = find_images(words)
    for note in (*found.notes, *found.failures):
        warn(note)
    failed = 0
    how = Drawing(*drawing, on_images=_slow_progress())  # type: ignore[arg-type]
    for explained in explain_images(Inside(classifier), found.files, asked, how):
        failed += explained.error is not None
        _print_explained(explained, as_json=as_json)
    if failed or found.failures:
        raise VitralError(found.summary(failed))


def _slow_progress() -> Callable[[float, int], None]:
    """Tells how far slow methods are; no bar, which would take what is printed on standard output."""
    told_at = time.monotonic()

    def tell(done: float, total: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= _PROGRESS_SECONDS:
            told_at = time.monotonic()
            warn(f"explaining: {done:.1f} of {total:,} images")

    return tell


def _print_explained(explained: "Explained", *, as_json: bool) -> None:
    if as_json:
        print(to_json(explained.to_dict()))
    elif explained.error is None:
        label = "".join(f"{label} {probability:.1%}, " for label, probability in explained.top[:1])
        print(shown(f"{explained.image}: {label}{explained.picture}"))
    if explained.error is not None:
        warn(f"{explained.image}: {explained.error}")


# --- Scores, figures and the list ------------------------------------------------------------------


def _one(words: list[str]) -> str:
    if len(words) > 1:
        raise typer.BadParameter(f"{words[1]!r} is one too many; --score takes one", param_hint="DATA")
    return words[0]


def _score(
    classifier: "Classifier", data: "DataSource", title: str, wanted: dict[str, Any], *, as_json: bool
) -> None:
    from vitral.explain.inside import Inside

    with progress_bar("scoring") as bar:
        found = Inside(classifier).faithfulness(data, warn=warn, on_images=bar, **wanted)
    if as_json:
        print(to_json(found.to_dict()))
    else:
        print_scores(found, f"{title}, split {found.split} ({classifier.placement})")


def print_scores(found: "Faithfulness", title: str) -> None:
    """Print the methods, the most faithful first, a table for each fill; then what can be said of them.

    Intervals are of 95 %.
    """
    from vitral.explain.faithfulness.redrawn import HALF

    say(f"{title}: {found.n:,} images")
    headings = ("method", "SRG", "interval", "group", "deletion", "insertion")
    for fill in found.fills:
        rows = []
        for scored in found.methods:
            of = scored.fills[fill]
            areas = (f"{area.mean:.2f}" for area in (of.deletion, of.insertion))
            rows.append((scored.method, *_with_interval(of.srg), of.group, *areas))
        print_table(_FILLS[fill], headings, rows, set(headings[1:]))
    headings = ("method", "SaCo", "interval", "redrawn")
    rows = []
    for scored in found.methods:
        redrawn = f"{scored.redrawn[HALF].mean:+.2f}" if HALF in scored.redrawn else "-"
        rows.append((scored.method, *_with_interval(scored.saco), redrawn))
    print_table(
        f"other checks: SaCo ({_FILLS[found.saco_fill]}), redrawn weights",
        headings,
        rows,
        set(headings[1:]),
    )
    for sentence in found.conclusions():
        say(sentence)


def _with_interval(of: "Estimate") -> tuple[str, str]:
    return f"{of.mean:+.2f}", f"{of.low:+.2f} to {of.high:+.2f}"


def _figures(
    words: list[str],
    folder: Path,
    where: tuple[str, str],
    wanted: dict[str, Any],
    column: list[str] | None,
    *,
    as_json: bool,
) -> None:
    from vitral.explain.figures.draw import (
        PAGE,
        measure_figures,
        refuse_undrawable,
        save_figures,
        split_words,
    )

    refuse_undrawable(folder)
    names, data = split_words(words)
    models = [load_classifier(name, *where) for name in names]
    if isinstance(data, str):
        data = options.opened(data, column)
    with progress_bar("measuring") as bar:
        found = measure_figures(models, data, names=names, warn=warn, on_images=bar, **wanted)
    with progress_bar("drawing", "figures") as bar:
        save_figures(found, folder, bar)
    missing = found.not_drawn()
    if as_json:
        kinds = [next(iter(kind.values())).name for kind in found.kinds()]
        print(to_json({"page": str(folder / PAGE), "figures": kinds, "not_drawn": dict(missing)}))
        return
    for title, reason in missing:
        say(f"not drawn: {title}: {reason}")
    print_lines(shown(f"page: {folder / PAGE}"))


def print_methods(model: str | None, *, as_json: bool) -> None:
    """Print the methods, with what an image costs this model or ViT-B/16, then what they show."""
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
            f"{row['method']}{' *' if row['default'] else ''}",
            "yes" if row["of_class"] else "no",
            f"{row['forwards']:,.3g}",
            row["needs"],
        )
        for row in methods
    ]
    title = f"methods of attribution (* the default), and forward passes for an image of {model or _USUAL}"
    print_table(title, ("method", "of a class", "passes", "needs"), rows, {"passes"})
    for row in methods:
        limits = f"; {row['limits']}" if row["limits"] else ""
        say(f"{row['method']}: {row['shows']}{limits} ({row['reference']})")


def _config_of(model: str) -> "ViTConfig":
    from vitral.checkpoints.folder import is_checkpoint, load_checkpoint
    from vitral.model.variants import configure

    return load_checkpoint(model).model.config if is_checkpoint(model) else configure(model, {})
