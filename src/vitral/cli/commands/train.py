"""`vitral train`: what is asked of a run, and what came of it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitral.cli import options
from vitral.cli.console import clock, print_lines, say, warn
from vitral.runtime.process import keep_freed_memory
from vitral.runtime.stopping import exit_status

if TYPE_CHECKING:
    from vitral.evaluation.task import Task
    from vitral.recipes.recipe import Recipe
    from vitral.runtime.world import World
    from vitral.training.optimizers import Group
    from vitral.training.state import Summary


def train(
    data: options.Data,
    out: Annotated[Path | None, options.folder("Folder of the run.")] = None,
    settings: options.Settings = None,
    recipe: Annotated[
        str | None, options.name("NAME_OR_FILE", "A recipe that comes with Vitral, or a file of settings.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out; setting=default undoes a changed setting."),
    ] = False,
    show_groups: Annotated[
        bool, typer.Option("--show-groups", help="Print which weights learn at which rate; train nothing.")
    ] = False,
) -> None:
    """Train or fine-tune a model on DATA; settings that you leave out are chosen from the data and printed.

    \b
    vitral train photos/ --out runs/photos minutes=30
    vitral train photos/ --out runs/tuned model=runs/photos img_size=192
    vitral train photos/ --out runs/tuned model=runs/photos --show-groups
    vitral train imagenet/ --out runs/deit3 --recipe deit3 batch_size=512
    """
    from vitral.data.image_data import open_data
    from vitral.recipes.packaged import recipe_of
    from vitral.runtime.world import joined
    from vitral.training.begin import groups_of

    wanted = recipe_of(recipe).with_words(settings or [])
    if show_groups:
        images = open_data(data, **wanted.opening)
        print_groups(*groups_of(wanted, images))
        return
    if out is None:
        raise typer.BadParameter("name a folder for the run", param_hint="--out")
    keep_freed_memory()
    with joined() as world:
        summary, task = _train(data, out, wanted, world, resume=resume)
    if world.is_first:
        _tell_end(summary, task, data, out)
    if not summary.finished:
        raise typer.Exit(exit_status(summary.stopped_by) if summary.stopped_by else 1)


def _train(data: str, out: Path, wanted: "Recipe", world: "World", *, resume: bool) -> "tuple[Summary, Task]":
    from vitral.cli.training import TrainingConsole
    from vitral.data.image_data import open_data
    from vitral.evaluation.task import task_of
    from vitral.training.interface import Start
    from vitral.training.run_folder import RunFolder

    start = Start.of(RunFolder(out, world=world), wanted, resume=resume)
    for note in start.notes if world.is_first else ():
        warn(note)
    images = open_data(data, **start.opening)
    return start.train(images, [TrainingConsole()]), task_of(images)


def _tell_end(summary: "Summary", task: "Task", data: str, out: Path) -> None:
    if not summary.finished:
        command = shlex.join(["vitral", "train", data, "--out", str(out), "--resume"])
        print(f"stopped after step {summary.steps}; go on with: {command}")
        return
    _print_summary(summary, task)
    print(f"model: {out}; try: vitral predict {shlex.quote(str(out))} IMAGE...")
    if (curves := out / "tensorboard").is_dir():
        print(f"curves: tensorboard --logdir {shlex.quote(str(curves))}")
    _report(data, out)


def _report(data: str, out: Path) -> None:
    """Write the run's report if its recipe asks for it, or name the command that does."""
    from vitral.reports.train import write_if_asked

    written = write_if_asked(data, out, warn)
    command = shlex.join(["vitral", "report", str(out), data, "--out", "report.html"])
    print(f"report: {written or command}")


def _print_summary(summary: "Summary", task: "Task") -> None:
    score = task.headline({task.score_name: getattr(summary, f"val_{task.score_name}")})
    spent = f"trained {summary.epochs:.1f} epochs in {clock(summary.seconds)}"
    best = f"step {summary.best_step}" if summary.best_step else "the start, which no step beat"
    print_lines(f"{spent}; val {score} ({best})")
    if task.calibrates:
        print_lines(_calibration_line(summary))
    if summary.test:
        print_lines(f"test {task.headline(summary.test)}")


def _calibration_line(summary: "Summary") -> str:
    from vitral.evaluation.calibration import LEAST_IMAGES

    if summary.calibration is None:
        return f"probabilities not calibrated: that takes {LEAST_IMAGES} validation images"
    return "val calibration error {raw_ece:.2%}, {ece:.2%} at temperature {temperature:.3f}".format_map(
        summary.calibration
    )


def print_groups(groups: "list[Group]", frozen: list[str]) -> None:
    """Print a paragraph a group, from the head down, every parameter named; then what is not trained."""
    print("what learns, at its peak rate, from the head down")
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        update = "orthogonal updates" if group["orthogonal"] else "updates by element"
        say(
            f"level {group['level']}: learning rate {group['lr']:.3g}, "
            f"weight decay {group['weight_decay']:g}, {update}, {count:,} parameters"
        )
        say(", ".join(group["names"]), indent="  ")
    if frozen:
        say(f"not trained: {', '.join(frozen)}")
