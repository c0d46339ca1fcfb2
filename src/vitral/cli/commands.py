"""The command line: each command parses, calls one library function and prints.

Results go to standard output, progress and messages to standard error. Exit status 0 is done, 1 a
failure with one line, 2 wrong usage. Imports stand inside the commands, so that --help is instant.
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options, usage
from vitral.runtime import limits
from vitral.runtime.errors import VitralError
from vitral.runtime.plainjson import to_json
from vitral.runtime.process import keep_freed_memory, set_threads
from vitral.runtime.stopping import Interrupted, ending_on_signals, exit_status
from vitral.runtime.streams import OutputLost, command_streams, shown

if TYPE_CHECKING:
    from vitral.checkpoints.folder import Checkpoint
    from vitral.evaluation.mistakes import Mistakes
    from vitral.inference.classifier import Classifier, Prediction
    from vitral.model.vit import ViTConfig
    from vitral.training.run import Summary

app = typer.Typer(
    cls=usage.Commands,
    help="Vitral: the plain Vision Transformer, end to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from vitral import __version__

        print(f"vitral {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, options.folder("Folder for the model.")] = Path("runs/demo"),
) -> None:
    """Train on scikit-learn's handwritten digits, evaluate, and say what to try next."""
    from vitral.cli import demo as demos
    from vitral.cli.console import TrainingConsole, print_evaluation

    keep_freed_memory()
    folder = _free_folder(out)
    result = demos.demo(folder, TrainingConsole())
    print_evaluation(result.evaluation, f"{folder} on the held-out fifth of the digits")
    print(f"\nSome of them, with what the model says: {result.picture}\n\nTry next:")
    name = shlex.quote(str(folder))
    print(f"  vitral predict {name} {name}/digit-1.png {name}/digit-2.png")
    print(f"  vitral eval {name} digits --split val --json")
    print("  vitral info ViT-B/16")


@app.command()
def train(
    data: options.Data,
    out: Annotated[Path | None, options.folder("Folder for the run.")] = None,
    settings: options.Settings = None,
    recipe: Annotated[
        str | None, options.name("NAME_OR_FILE", "A recipe that comes with Vitral, or a file of settings.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    show_groups: Annotated[
        bool, typer.Option("--show-groups", help="Print what learns at which rate, and train nothing.")
    ] = False,
) -> None:
    """Train or fine-tune on DATA; settings that you leave out are chosen from the data and printed.

    \b
    vitral train photos/ --out runs/photos minutes=30
    vitral train photos/ --out runs/tuned model=runs/photos img_size=192
    vitral train photos/ --out runs/tuned model=runs/photos --show-groups
    vitral train imagenet/ --out runs/deit3 --recipe deit3 batch_size=512
    """
    from vitral.cli.console import TrainingConsole, print_groups
    from vitral.data.dataset import open_data
    from vitral.recipes import packaged as recipes
    from vitral.recipes.recipe import Recipe
    from vitral.training.choose import train as run_training
    from vitral.training.run import groups_of
    from vitral.training.run_folder import RunFolder, changed

    wanted = Recipe(**recipes.read(recipe) if recipe else {}).with_words(settings or [])
    if out is None and not show_groups:
        raise typer.BadParameter("name a folder for the run", param_hint="--out")
    if resume and out is not None:
        settled = changed(RunFolder(out).recipe(), wanted).settings()
    else:
        settled = {name: wanted.get(name) for name in ("val_fraction", "seed")}
    images = open_data(data, val_fraction=settled["val_fraction"], seed=settled["seed"])
    if show_groups:
        print_groups(*groups_of(wanted, images))
        return
    assert out is not None
    keep_freed_memory()
    summary = run_training(images, out, wanted, resume=resume, reporter=TrainingConsole())
    if not summary.finished:
        command = shlex.join(["vitral", "train", data, "--out", str(out), "--resume"])
        print(f"stopped after step {summary.steps}; go on with: {command}")
        raise typer.Exit(exit_status(summary.stopped_by) if summary.stopped_by else 1)
    _print_summary(summary)
    print(f"model: {out}; try: vitral predict {shlex.quote(str(out))} IMAGE...")


@app.command("eval")
def evaluate(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    split: options.Split = None,
    json_output: options.Json = False,
    wrong: Annotated[
        Path | None,
        options.file("List of the wrong images, the surest first, as .csv or .json.", limits.LIST_SUFFIXES),
    ] = None,
    sheet: Annotated[
        Path | None, options.file("Picture of the worst of them, such as wrong.png.", limits.SHEET_SUFFIXES)
    ] = None,
    max_damaged: options.MaxDamaged = 0.01,
    workers: options.Workers = None,
    tta: options.Tta = "none",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Accuracy with its interval, loss, calibration, per class and confusion, on labelled images.

    Of a multi-label model: mean average precision, F1, exact matches and loss.

    \b
    vitral eval runs/photos photos/ --wrong wrong.csv --sheet wrong.png
    """
    from vitral.cli import console
    from vitral.evaluation.metrics import evaluate_classifier, evaluate_multi_label_classifier
    from vitral.evaluation.multilabel import MultiLabelEvaluation

    classifier = _load(model, device, precision, tta)
    how = f"{classifier.placement}" + ("" if tta == "none" else f", test-time augmentation {tta}")
    with console.progress_bar("evaluating") as bar:
        how_to: dict[str, Any] = {"split": split, "max_damaged": max_damaged, "workers": workers}
        how_to |= {"mistakes": bool(wrong or sheet), "warn": _warn, "on_images": bar}
        if classifier.multi_label:
            name, evaluation = evaluate_multi_label_classifier(classifier, data, **how_to)
        else:
            name, evaluation = evaluate_classifier(classifier, data, **how_to)
    title = f"{model} on {data}, split {name} ({how})"
    _write_mistakes(evaluation.mistakes, wrong, sheet, f"{model} on {data}")
    if json_output:
        print(to_json(evaluation.to_dict()))
    elif isinstance(evaluation, MultiLabelEvaluation):
        console.print_multi_label_evaluation(evaluation, title)
    else:
        console.print_evaluation(evaluation, title)


@app.command()
def predict(
    model: options.Model,
    images: Annotated[list[str], options.text("IMAGE...", "Files, folders or patterns.")],
    top: Annotated[int, options.number(limits.LABELS, "Labels for each image.")] = 3,
    json_output: options.Json = False,
    batch_size: Annotated[int, options.number(limits.BATCH, "Images at a time.")] = 32,
    tta: options.Tta = "none",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """The likeliest labels of each image, a line an image."""
    from vitral.data.sources import find_images

    found = find_images(images)
    classifier = _load(model, device, precision, tta)
    for note in (*found.notes, *found.failures):
        _warn(note)
    failed = 0
    for prediction in classifier.predictions(found.files, top=top, batch_size=batch_size):
        failed += prediction.error is not None
        _print_prediction(prediction, as_json=json_output)
    if failed or found.failures:
        raise VitralError(found.summary(failed))


@app.command()
def info(
    model: Annotated[str, options.text("MODEL", "A variant's name, such as ViT-B/16, or any checkpoint.")],
    settings: options.Settings = None,
    measure: Annotated[bool, typer.Option(help="Time one image for each patch size.")] = True,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Every stage with its shape, parameters and FLOPs, and what the patch size costs."""
    from vitral.cli.console import print_patch_costs, print_stages
    from vitral.model.cost import patch_costs, stages
    from vitral.runtime.devices import Placement

    config, about = _describe_model(model, settings or [])
    placement = Placement.choose(device, precision)  # type: ignore[arg-type]
    print(about)
    print_stages(config, stages(config))
    print_patch_costs(config, patch_costs(config, placement if measure else None), placement)


@app.command()
def doctor(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    split: options.Split = None,
    limit: Annotated[int, options.number(limits.IMAGES, "Images at most, even over the classes.")] = 400,
    seed: options.Seed = 0,
    workers: options.Workers = None,
    json_output: options.Json = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Measure what wrong settings cost on labelled images, and name the likely mismatch."""
    from vitral.cli.console import print_diagnosis, progress_bar
    from vitral.evaluation.doctor import diagnose

    classifier = _load(model, device, precision)
    with progress_bar("examining") as bar:
        how: dict[str, Any] = {"split": split, "limit": limit, "seed": seed, "workers": workers}
        diagnosis = diagnose(classifier, data, **how, warn=_warn, on_images=bar)
    if json_output:
        print(to_json(diagnosis.to_dict()))
    else:
        title = f"{model} on {data}, split {diagnosis.split} ({classifier.placement})"
        print_diagnosis(diagnosis, title)


@app.command()
def probe(  # noqa: PLR0913 - a command's options
    model: options.Model,
    data: options.Data,
    img_size: Annotated[
        int | None, options.number(limits.PIXELS, "Pixels; by default those the model was trained with.")
    ] = None,
    features: Annotated[
        str | None, options.choice(limits.FEATURES, "; by default what is usual for the model.")
    ] = None,
    layer: Annotated[
        list[int] | None,
        options.number(limits.LAYER, "Whose output to take, by default -1; the best of several."),
    ] = None,
    per_class: Annotated[int | None, options.number(limits.IMAGES, "Labelled images of each class.")] = None,
    limit: Annotated[
        int | None,
        options.number(limits.IMAGES, "Images of any split at most; with --per-class, of the test split."),
    ] = None,
    seed: options.Seed = 0,
    max_damaged: options.MaxDamaged = 0.01,
    out: Annotated[Path | None, options.folder("New folder for the model with the probe as head.")] = None,
    cache: Annotated[
        Path | None, options.folder("Folder for features; by default in $VITRAL_CACHE or ~/.cache/vitral.")
    ] = None,
    workers: options.Workers = None,
    json_output: options.Json = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """What a model's features are worth on DATA: a linear probe and nearest neighbours, nothing trained.

    \b
    vitral probe hf://facebook/dinov2-small photos/ --per-class 10
    vitral probe hf://facebook/dinov2-small photos/ --out runs/probe   # a model, for eval and predict
    """
    from vitral.cli.console import print_probe, progress_bar
    from vitral.evaluation.probe import ProbeOptions
    from vitral.evaluation.probe import probe as run_probe
    from vitral.runtime.settings import build

    asked = {"features": features, "per_class": per_class, "limit": limit, "seed": seed}
    asked |= {"max_damaged": max_damaged, "workers": workers, "layers": tuple(layer or (-1,))}
    probed = build(ProbeOptions, asked)
    classifier = _load(model, device, precision, img_size=img_size)
    with progress_bar("features") as bar:
        result = run_probe(classifier, data, probed, cache=cache, out=out, warn=_warn, on_images=bar)
    if json_output:
        print(to_json(result.to_dict()))
        return
    height, width = classifier.preprocess.img_size
    title = f"{model} on {data}, split {result.split} ({height}x{width} pixels, {classifier.placement})"
    print_probe(result, title)
    if out is not None:
        print(f"model: {out}; try: vitral predict {shlex.quote(str(out))} IMAGE...")


@app.command()
def convert(
    model: options.Model,
    out: Annotated[Path, typer.Argument(parser=options.as_folder, metavar="OUT", help="A new folder.")],
    settings: options.Settings = None,
    to: Annotated[str, options.choice(limits.LAYOUTS)] = "vitral",
    dtype: Annotated[
        str | None, options.choice(limits.DTYPES, ", to store weights in; else as MODEL has them.")
    ] = None,
) -> None:
    """Write MODEL in another library's layout, with a certificate that the answers are the same.

    \b
    vitral convert hf://facebook/dinov2-small dino --to timm
    vitral convert clip.pth clip --to vitral layer.feed_forward.activation=quick_gelu
    """
    from vitral.checkpoints.convert import CERTIFICATE_FILE
    from vitral.checkpoints.convert import convert as run_conversion
    from vitral.runtime.settings import nested, parse_overrides

    certificate = run_conversion(model, out, to, dtype, **nested(parse_overrides(settings or [])))
    for note in certificate.assumed:
        _warn(note)
    for rounded in certificate.rounded:
        _warn(f"{to} has another {rounded}")
    print(
        f"{out}: {to}'s layout; features and logits differ from those of {certificate.compared_with} by at "
        f"most {certificate.worst:.1e} of the largest"
    )
    licence = certificate.licence or "not stated"
    print(f"certificate: {out / CERTIFICATE_FILE}; licence of the weights: {licence}")


@app.command()
def push(
    model: options.Model,
    reference: Annotated[str, options.text("hf://ORG/NAME", "The repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Visible to you alone.")] = False,
) -> None:
    """Upload a model folder to the hub, with a model card."""
    from vitral.checkpoints.push import push as upload

    print(upload(Path(model), reference, private=private))


@app.command()
def bench(  # noqa: PLR0913 - a command's options
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            callback=options.one_of(limits.BENCHMARKS),
            help="train: steps; infer: forward passes; start: a fresh process to its first prediction; "
            "kernels: our two routes of patches and of attention.",
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [KEY=VALUE...]",
            help="A variant's name or a checkpoint; batch_size, also a list, and fields of ViTConfig.",
        ),
    ] = None,
    rounds: Annotated[int, options.number(limits.ROUNDS, "Interleaved readings of each contender.")] = 7,
    out: Annotated[Path | None, options.file("A JSON file for the report.")] = None,
    json_output: options.Json = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="With the contenders that need torch.compile.")
    ] = True,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart",
            help="train and infer: each contender in a process of its own, set up as its users have it, "
            "rather than all in one.",
        ),
    ] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="Compete with this library only; repeatable.")
    ] = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
) -> None:
    """Speed beside timm, transformers, torchvision and vit-pytorch, whichever are installed.

    \b
    vitral bench train ViT-Ti/4 img_size=32 batch_size=256 --apart --out bench.json
    vitral bench infer ViT-B/16 "batch_size=[1, 32]" --no-compile
    """
    from vitral.bench.measure import Settings
    from vitral.bench.run import run
    from vitral.checkpoints.folder import write_atomically
    from vitral.cli.console import print_report
    from vitral.runtime.devices import Placement

    placement = Placement.choose(device, precision)  # type: ignore[arg-type]
    command = shlex.join(["vitral", *sys.argv[1:]])
    settings = Settings(placement, rounds, compiled, apart, tuple(peer or ()), command, _warn)
    report = run(what, words or [], settings)
    content = to_json(report.to_dict(), indent=1)
    if out is not None:
        write_atomically(out, f"{content}\n".encode())
    if json_output:
        print(content)
    else:
        print_report(report)


# --- Recipes ---------------------------------------------------------------------------------------

recipe_app = typer.Typer(
    cls=usage.Commands, help="Recipes of the papers: list, show and compare them.", no_args_is_help=True
)
app.add_typer(recipe_app, name="recipe")

RecipeArgument = options.text(
    "NAME_OR_FILE", "A recipe that comes with Vitral, a file of settings, or a run's folder."
)


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that come with Vitral."""
    from vitral.recipes import packaged as recipes

    for name in recipes.names():
        print(f"{name:<14} {recipes.title(name)}")


@recipe_app.command("show")
def recipe_show(recipe: Annotated[str, RecipeArgument]) -> None:
    """A recipe's file: command, expected accuracy, and each number with its source."""
    from vitral.recipes import packaged as recipes

    recipes.settings(recipe)  # says what is wrong with a file that no run would take
    print(recipes.find(recipe).read_text(encoding="utf-8"), end="")


@recipe_app.command("diff")
def recipe_diff(
    a: Annotated[str, RecipeArgument], b: Annotated[str, RecipeArgument], json_output: options.Json = False
) -> None:
    """The settings in which two recipes differ, and where each has its number from.

    \b
    vitral recipe diff deit deit3
    vitral recipe diff deit3 runs/mine
    """
    from dataclasses import asdict

    from vitral.cli.console import print_recipe_diff
    from vitral.recipes import packaged as recipes

    differences = recipes.diff(a, b)
    if json_output:
        print(to_json({"a": a, "b": b, "differences": [asdict(item) for item in differences]}))
    else:
        print_recipe_diff(differences, a, b)


# --- Helpers of the commands -----------------------------------------------------------------------


def _load(
    model: str, device: str, precision: str, tta: str = "none", img_size: int | None = None
) -> "Classifier":
    from vitral.checkpoints.folder import load_checkpoint
    from vitral.inference.classifier import as_classifier
    from vitral.runtime.devices import Placement

    checkpoint = load_checkpoint(model, **({} if img_size is None else {"img_size": img_size}))
    for note in checkpoint.notes:
        _warn(note)
    return as_classifier(checkpoint, Placement.choose(device, precision), tta)  # type: ignore[arg-type]


def _print_summary(summary: "Summary") -> None:
    from vitral.cli.console import clock

    if summary.val_top1 is None:
        score = f"mAP {summary.val_mean_average_precision:.2%}"
    else:
        score = f"accuracy {summary.val_top1:.2%}"
    spent = f"trained {summary.epochs:.1f} epochs in {clock(summary.seconds)}"
    print(f"{spent}; val {score} (step {summary.best_step})")
    if summary.calibration:
        print(
            "val calibration error {raw_ece:.2%}, {ece:.2%} at temperature {temperature:.3f}".format_map(
                summary.calibration
            )
        )
    if summary.test and "top1" in summary.test:
        low, high = summary.test["ci95"]
        print(f"test accuracy {summary.test['top1']:.2%} (95 % interval {low:.2%} to {high:.2%})")
    elif summary.test:
        print(f"test mAP {summary.test['mean_average_precision']:.2%}")


def _write_mistakes(mistakes: "Mistakes | None", wrong: Path | None, sheet: Path | None, title: str) -> None:
    if mistakes is None:
        return
    count = f"{len(mistakes.rows):,} of {mistakes.judged:,} wrong"
    if wrong is not None:
        mistakes.write(wrong)
        _warn(f"{count}: {wrong}")
    if sheet is not None:
        mistakes.draw(sheet, f"{title}: {count}")
        _warn(f"{count}, the worst pictured: {sheet}")


def _warn(message: str) -> None:
    print(f"vitral: {shown(message)}", file=sys.stderr)


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that holds no run yet."""
    folder, number = wanted, 1
    while (folder / "recipe.toml").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _print_prediction(prediction: "Prediction", *, as_json: bool) -> None:
    if as_json:
        top = [{"label": label, "probability": value} for label, value in prediction.top]
        print(to_json({"image": prediction.image, "top": top, "error": prediction.error}))
    elif prediction.error is None:
        labels = "  ".join(f"{shown(label)} {value:.1%}" for label, value in prediction.top)
        print(f"{shown(prediction.image)}: {labels}")
    if prediction.error is not None:
        _warn(f"{prediction.image}: {prediction.error}")


def _describe_model(model: str, settings: list[str]) -> "tuple[ViTConfig, str]":
    """The architecture of a name or a folder, and a line or more about it."""
    from vitral.checkpoints.folder import is_checkpoint, load_checkpoint
    from vitral.model.variants import configure
    from vitral.runtime.settings import nested, parse_overrides

    overrides = nested(parse_overrides(settings))
    if is_checkpoint(model):
        checkpoint = load_checkpoint(model, **overrides)
        return checkpoint.model.config, _about(model, checkpoint)
    return configure(model, overrides), model


def _about(model: str, checkpoint: "Checkpoint") -> str:
    """Labels, preprocessing, where the weights come from and under which licence."""
    metadata, labels = checkpoint.metadata, checkpoint.labels
    lines = [
        shown(f"{model}: {len(labels)} labels ({', '.join(labels[:5])}, ...)")
        if labels
        else f"{model}: no labels"
    ]
    lines.append(f"images: {checkpoint.preprocess}")
    lines += checkpoint.notes
    options = checkpoint.model.config.embedding
    lines.append(f"at another size: positions {options.resize}")
    if checkpoint.multi_label:
        lines.append("probabilities: sigmoid(logits), each label for itself (multi-label)")
    if checkpoint.temperature != 1:
        lines.append(f"probabilities: softmax(logits / {checkpoint.temperature:.3f})")
    if "source" in metadata:
        how = f"read as {metadata['layout']}'s layout" if "layout" in metadata else "trained further"
        lines.append(f"weights: from {metadata['source']}, {how}")
        lines.append(f"licence of the weights: {metadata.get('licence') or 'not stated'}")
    return "\n".join(lines)


def main() -> None:
    """The entry point: what a user can get wrong ends in one line."""
    set_threads()
    with command_streams(), ending_on_signals():
        status = _status()
    sys.exit(status)


def _status() -> int | str | None:
    """Runs the command; 0 done, 1 failed with one line, 2 wrong usage, 128 + n ended by signal n."""
    try:
        status = _ending(lambda: app(standalone_mode=False))
        flushed = _ending(sys.stdout.flush)
        return status or flushed
    except Interrupted as signal:  # it may come while the last line is printed
        return signal.status


def _ending(call: Callable[[], int | None]) -> int | str | None:
    """The exit status of what is called, its error said in one line."""
    try:
        return call() or 0
    except SystemExit as exit:
        return exit.code
    except usage.ParserError as error:
        if line := usage.line_of(error):
            _warn(line)
        return 2
    except typer.Abort:
        return 1
    except Interrupted as signal:
        _warn(str(signal))
        return signal.status
    except OutputLost as lost:
        if not lost.quietly:  # else the reader, such as `head`, has what it wanted
            _warn(str(lost))
        return 1
    except Exception as error:
        if os.environ.get("VITRAL_DEBUG"):
            raise
        _warn(_told(error))
        return 1


def _told(error: Exception) -> str:
    if isinstance(error, VitralError | OSError):
        return str(error)
    from vitral.training.memory import is_out_of_memory

    if is_out_of_memory(error):
        return "there is not enough memory for this; take a smaller model, img_size or batch"
    text = " ".join(str(error).split())
    return (
        f"unexpected {type(error).__name__}: {text}; this is a defect, please report it with "
        "the output of the same command under VITRAL_DEBUG=1"
    )
