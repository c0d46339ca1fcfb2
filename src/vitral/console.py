"""What people see: progress and plain lines on standard error, tables on standard output."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from vitral.bench import Report, Row
from vitral.blocks import height_and_width
from vitral.devices import Placement
from vitral.doctor import Diagnosis
from vitral.evaluate import Evaluation
from vitral.info import PatchCost, Stage
from vitral.model import ViTConfig
from vitral.multilabel import MultiLabelEvaluation
from vitral.optim import Group
from vitral.probe import ProbeResult
from vitral.recipes import Difference, Setting
from vitral.train import Reporter, Run

# Between two updates of the numbers; reading a loss waits for the device.
_REFRESH_SECONDS = 0.5
_PLAIN_LINE_SECONDS = 30.0
# With more, a model from scratch has mostly enough to learn from.
_FEW_PHOTOGRAPHS = 10_000
_TUNING_ADVICE = "few images to begin from scratch with: model=auto minutes=30 may do better"


class TrainingConsole(Reporter):
    """A live bar with loss, accuracy, images per second and time left, and a line for each epoch."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _ShareColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=1.0, numbers="")
        self.shown_at = time.monotonic()
        self.pace: _Pace | None = None

    def message(self, text: str) -> None:
        self.console.print(f"vitral: {text}", markup=False)

    def preparing(self, what: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            self.progress.update(
                self.task, completed=done / total, description=what, numbers=f"{done:,} of {total:,} images"
            )
        elif time.monotonic() - self.shown_at >= _PLAIN_LINE_SECONDS / 3:
            self.shown_at = time.monotonic()
            self.console.print(f"{what}: {done:,} of {total:,} images")

    def begin(self, run: Run) -> None:
        self.console.print(run.data.describe(), markup=False)
        self.console.print(describe_recipe(run), markup=False)
        if run.memory is not None:
            self.console.print(str(run.memory), markup=False)
        if _had_better_be_tuned(run):
            self.console.print(_TUNING_ADVICE, markup=False)
        self.progress.start()

    def step(self, run: Run) -> None:
        if self.pace is None:  # what comes before the first step, and compiling in it, are not its pace
            self.pace = _Pace(run)
            return
        interval = _REFRESH_SECONDS if self.console.is_terminal else _PLAIN_LINE_SECONDS
        if time.monotonic() - self.shown_at < interval:
            return
        self.shown_at = time.monotonic()
        numbers = (
            f"loss {run.recent.loss:.3f}  accuracy {run.recent.accuracy:.1%}  "
            f"{self.pace.images_per_second(run):,.0f} images/s  {self.pace.left(run)} left"
        )
        if self.console.is_terminal:
            self.progress.update(self.task, completed=run.progress, description=_epoch(run), numbers=numbers)
        else:
            self.console.print(f"{_epoch(run)}  {run.progress:4.0%}  {numbers}")

    def epoch(self, run: Run, evaluation: Evaluation | MultiLabelEvaluation) -> None:
        best = "  best so far" if run.state.best_step == run.state.step else ""
        self.console.print(
            f"{_epoch(run)}  train loss {run.recent.loss:.3f} accuracy {run.recent.accuracy:.1%}  "
            f"val loss {evaluation.loss:.3f} {evaluation.score_name} {evaluation.score:.1%}  "
            f"{clock(run.state.seconds)}{best}"
        )
        self.shown_at = time.monotonic()

    def end(self) -> None:
        self.progress.stop()


def _had_better_be_tuned(run: Run) -> bool:
    """Whether a run begins from scratch on few photographs, which icons of a few pixels are not."""
    from_scratch = run.checkpoint.metadata.get("base") is None
    photographs = min(run.checkpoint.preprocess.img_size) >= 64
    return from_scratch and photographs and len(run.data.split("train")) < _FEW_PHOTOGRAPHS


def describe_recipe(run: Run) -> str:
    """The settings that were chosen, and what they come to, in lines for people."""
    recipe, model = run.recipe, run.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, columns = model.config.grid
    budget = ", ".join(
        f"{value:g} {name}" for name in ("epochs", "steps", "minutes") if (value := getattr(recipe, name))
    )
    height, width = run.checkpoint.preprocess.img_size
    return (
        f"model: {recipe.model} at {height}x{width} pixels, {rows}x{columns} patches, "
        f"{parameters:,} parameters; {run.placement}\n"
        f"recipe: {budget}; batch_size {recipe.batch_size}, learning_rate {recipe.learning_rate:g}, "
        f"weight_decay {recipe.weight_decay:g}, crop {recipe.crop}, flip {str(recipe.flip).lower()}, "
        f"seed {recipe.seed} (all settings: {run.folder / 'recipe.toml'})"
    )


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere; gives a function to call with (done, total)."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def clock(seconds: float) -> str:
    """``75`` seconds are "1:15", ``4000`` are "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _epoch(run: Run) -> str:
    of = f"/{run.recipe.epochs:g}" if run.recipe.epochs else ""
    return f"epoch {run.epoch:.1f}{of}"


class _ShareColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:4.0%}")


class _Pace:
    """Speed and time left, since the first step of this session of the run."""

    def __init__(self, run: Run) -> None:
        self.step, self.seconds, self.progress = run.state.step, run.state.seconds, run.progress

    def images_per_second(self, run: Run) -> float:
        assert run.recipe.batch_size is not None
        steps, seconds = run.state.step - self.step, run.state.seconds - self.seconds
        return steps * run.recipe.batch_size / max(seconds, 1e-9)

    def left(self, run: Run) -> str:
        gained = run.progress - self.progress
        if gained <= 0:
            return "?"
        return clock((1 - run.progress) * (run.state.seconds - self.seconds) / gained)


# --- Tables --------------------------------------------------------------------------------------

_SHOWN_CLASSES = 20


def print_evaluation(evaluation: Evaluation, title: str) -> None:
    """The numbers, and the classes from the worst to the best."""
    low, high = evaluation.ci95
    print(f"{title}: {evaluation.n:,} images")
    print(f"  accuracy           {evaluation.top1:.2%} (95 % interval {low:.2%} to {high:.2%})")
    if len(evaluation.per_class) > 5:
        print(f"  top-5 accuracy     {evaluation.top5:.2%}")
    print(f"  loss               {evaluation.loss:.4f}")
    print(f"  calibration error  {evaluation.ece:.2%}")
    names = list(evaluation.per_class)
    shown = "by class" if len(names) <= _SHOWN_CLASSES else f"the {_SHOWN_CLASSES} worst classes"
    table = Table("class", "images", "accuracy", "precision", "taken most often for", title=shown)
    worst_first = sorted(evaluation.per_class.items(), key=lambda item: item[1].accuracy)
    for name, result in worst_first[:_SHOWN_CLASSES]:
        mistakes = list(evaluation.confusion[names.index(name)])
        mistakes[names.index(name)] = 0
        count = max(mistakes)
        taken_for = f"{names[mistakes.index(count)]} ({count})" if count else ""
        accuracy, precision = f"{result.accuracy:.1%}", f"{result.precision:.1%}"
        table.add_row(name, f"{result.n:,}", accuracy, precision, taken_for)
    _print(table)


def print_multi_label_evaluation(evaluation: MultiLabelEvaluation, title: str) -> None:
    """The numbers, and the classes from the worst to the best."""
    print(f"{title}: {evaluation.n:,} images")
    print(f"  mean average precision  {evaluation.mean_average_precision:.2%}")
    print(
        f"  F1 at 0.5               {evaluation.micro_f1:.2%} (mean over classes {evaluation.macro_f1:.2%})"
    )
    print(f"  exact match at 0.5      {evaluation.exact_match:.2%}")
    print(f"  loss                    {evaluation.loss:.4f}")
    rows = [(name, row.n, row.average_precision) for name, row in evaluation.per_class.items()]
    rows.sort(key=lambda row: math.inf if row[2] is None else row[2])
    shown = "by class" if len(rows) <= _SHOWN_CLASSES else f"the {_SHOWN_CLASSES} worst classes"
    table = Table("class", "images", "average precision", title=shown)
    for name, n, precision in rows[:_SHOWN_CLASSES]:
        table.add_row(name, f"{n:,}", "-" if precision is None else f"{precision:.1%}")
    _print(table)


def print_probe(result: ProbeResult, title: str) -> None:
    """A row for the linear probe and one for the neighbours, with what was chosen and how well it did."""
    linear, near = result.linear, result.neighbours
    print(f"{title}: {linear.evaluation.n:,} images, after {result.labelled:,} labelled ones")
    table = Table("probe", "features", "layer", "chosen", "held out", "accuracy", "95 % interval")
    for name, row, chosen, top1, ci95 in (
        ("linear", linear, f"L2 {linear.penalty:.1e}", linear.evaluation.top1, linear.evaluation.ci95),
        ("k-NN", near, f"k {near.k}", near.top1, near.ci95),
    ):
        held_out = "-" if row.held_out_top1 is None else f"{row.held_out_top1:.2%}"
        interval = f"{ci95[0]:.1%} to {ci95[1]:.1%}"
        table.add_row(name, row.features, str(row.layer), chosen, held_out, f"{top1:.2%}", interval)
    _print(table)


def print_diagnosis(diagnosis: Diagnosis, title: str) -> None:
    """How the classifier does as it is, a row for each changed setting, and the conclusion."""
    low, high = diagnosis.ci95
    damaged = f", {diagnosis.damaged:,} damaged ones left out" if diagnosis.damaged else ""
    print(f"{title}: {diagnosis.n:,} images{damaged}")
    print(f"  accuracy  {diagnosis.top1:.2%} (95 % interval {low:.2%} to {high:.2%})")
    print(f"  loss      {diagnosis.loss:.4f}")
    table = Table(title="one setting changed at a time, on the same images")
    numbers = ("top-1", "points", "loss", "change")
    for heading in ("setting", "now", "tried", *numbers, "verdict"):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    setting = ""
    for finding, row in zip(diagnosis.findings, diagnosis.rows(), strict=True):
        if finding.verdict == "no effect":
            continue
        if setting and row[0] != setting:
            table.add_section()
        setting = row[0]
        table.add_row(*row[:-1], finding.verdict)
    _print(table)
    for reason, alike in groupby(
        (finding for finding in diagnosis.findings if finding.verdict == "no effect"),
        key=lambda finding: (finding.setting, finding.reason),
    ):
        values = ", ".join(finding.value for finding in alike if finding.value != "-")
        print(f"no effect: {' '.join(filter(None, (reason[0], values)))}: {reason[1]}")
    print(diagnosis.conclusion())


def print_stages(config: ViTConfig, stages: list[Stage]) -> None:
    """A row a stage; layers that are alike share one, with the numbers of each."""
    height, width = height_and_width(config.img_size)
    table = Table(title=f"one image of {height}x{width} pixels, stage by stage")
    for heading in ("stage", "output shape", "parameters", "GFLOPs"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for _, alike in groupby(stages, key=lambda stage: (stage.shape, stage.parameters, stage.flops)):
        group = list(alike)
        first, last = group[0], group[-1]
        name = first.name if first is last else f"{first.name} to {last.name}, {len(group)} alike, each"
        shape = " x ".join(map(str, first.shape))
        table.add_row(name, shape, f"{first.parameters:,}", _giga(first.flops))
    table.add_section()
    parameters = sum(stage.parameters for stage in stages)
    table.add_row("total", "", f"{parameters:,}", _giga(sum(stage.flops for stage in stages)))
    _print(table)


def print_patch_costs(config: ViTConfig, costs: list[PatchCost], placement: Placement) -> None:
    """A row a patch size, the model's own marked."""
    table = Table(title=f"smaller patches cost more: GFLOPs an image, and ms on {placement}")
    for heading in ("patch size", "patches N", "attention, O(N²·D)", "linear, O(N·D²)", "total", "ms"):
        table.add_column(heading, justify="right")
    for cost in costs:
        mark = "*" if cost.patch_size == config.patch_size else ""
        parts = cost.attention_flops, cost.linear_flops, cost.attention_flops + cost.linear_flops
        time_taken = "-" if cost.milliseconds is None else f"{cost.milliseconds:.1f}"
        table.add_row(f"{mark}{cost.patch_size}", f"{cost.patches:,}", *map(_giga, parts), time_taken)
    _print(table)


def print_groups(groups: list[Group], frozen: list[str]) -> None:
    """A row a group, from the head down, every parameter named; then what is not trained."""
    table = Table(title="what learns, at its peak rate", show_lines=True)
    for heading in ("level", "learning rate", "weight decay", "update", "parameters"):
        table.add_column(heading, justify="right")
    table.add_column("names", overflow="fold")
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        update = "orthogonal" if group["orthogonal"] else "by element"
        rate, decay = f"{group['lr']:.3g}", f"{group['weight_decay']:g}"
        names = ", ".join(group["names"])
        table.add_row(str(group["level"]), rate, decay, update, f"{count:,}", names)
    _print(table)
    if frozen:
        print(f"not trained: {', '.join(frozen)}")


def print_report(report: Report) -> None:
    """A table a task, then who is not in it and why."""
    machine = report.machine
    print(f"{report.benchmark}: {report.subject} ({report.placement})")
    print(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores")
    print(", ".join(f"{name} {number}" for name, number in machine["versions"].items()))
    measured = [row for row in report.rows if row.seconds]
    for task, rows in groupby(measured, key=lambda row: row.task):
        group = list(rows)
        columns = [(name, cell) for name, cell in _CELLS.items() if any(cell(row) for row in group)]
        peak = report.facts.get("gemm_flops_per_second", {}).get(task)
        title = task if peak is None else f"{task}; GEMM {_giga(peak)} GFLOP/s at best"
        table = Table(title=title, box=SIMPLE_HEAD, padding=0)
        for name, _ in columns:
            # The last column alone gives way on a narrow terminal.
            last = name == "agreement"
            table.add_column(
                name,
                justify="left" if name in _WORDS else "right",
                no_wrap=not last,
                min_width=12 if last else None,
            )
        for row in group:
            table.add_row(*(cell(row) for _, cell in columns))
        _print(table)
    if any(row.speed_ratio for row in measured):
        print(
            "ratio: speed over that of the fastest of the other libraries' defaults; median and spread over"
        )
        print(f"{len(measured[0].seconds)} rounds; agreement: relative difference from Vitral's in float32")
    details = {f"{row.contender}, {row.configuration}: {row.detail}": None for row in measured if row.detail}
    if details:
        print("\n".join(details))
    for row in report.rows:
        if row.reason:
            print(f"without numbers: {' '.join((row.contender, row.configuration)).strip()}: {row.reason}")


def _time(row: Row) -> str:
    if row.images:  # images/s says it
        return ""
    return f"{1e3 * row.median:.2f} ms" if row.median < 0.1 else f"{row.median:.2f} s"


def _agreement(row: Row) -> str:
    """Relative differences, and the share of equal likeliest classes."""
    if row.speed_ratio is not None and not row.agreement:
        return "other weights"
    numbers = {name: f"{value:.0e}" for name, value in row.agreement.items() if name != "top1"}
    shown = [f"{name} {text}" if len(numbers) > 1 else text for name, text in numbers.items()]
    if "top1" in row.agreement:
        shown.append(f"top-1 {row.agreement['top1']:.0%}")
    return ", ".join(shown)


_WORDS = {"contender", "configuration", "agreement"}
# A column is shown if a row has something in it.
_CELLS: dict[str, Callable[[Row], str]] = {
    "contender": lambda row: row.contender,
    "configuration": lambda row: row.configuration,
    "time": _time,
    "images/s": lambda row: f"{row.images_per_second:,.1f}" if row.images_per_second else "",
    "spread": lambda row: f"{row.spread:.0%}",
    "ratio": lambda row: f"{row.speed_ratio:.2f}" if row.speed_ratio else "",
    "of GEMM": lambda row: f"{row.peak_share:.0%}" if row.peak_share else "",
    **{
        f"{part} s": lambda row, part=part: f"{row.parts[part]:.2f}" if part in row.parts else ""
        for part in ("load", "predict")
    },
    "MiB": lambda row: f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes else "",
    "agreement": _agreement,
}


def print_recipe_diff(differences: list[Difference], a: str, b: str) -> None:
    """A row a setting, with the source that each recipe gives below its value."""
    if not differences:
        print(f"{a} and {b} have the same settings")
        return
    table = Table("setting", a, b, show_lines=True, title=f"where {a} and {b} differ")
    for difference in differences:
        table.add_row(difference.name, _setting(difference.a), _setting(difference.b))
    _print(table)


def _setting(setting: Setting) -> Text:
    value = "-" if setting.value is None else json.dumps(setting.value, ensure_ascii=False)
    text = Text(value.removeprefix('"').removesuffix('"'), style="bold")
    return text.append(f"\n{setting.source}", style="not bold dim") if setting.source else text


def _giga(flops: int) -> str:
    """Three digits, of a digits model or of ViT-g."""
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"


def _print(table: Table) -> None:
    Console(highlight=False).print(table)
