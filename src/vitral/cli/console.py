"""What people see: progress and plain lines on standard error, tables on standard output."""

import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from vitral.bench.measure import Report, Row
from vitral.evaluation.doctor import Diagnosis
from vitral.evaluation.metrics import Evaluation
from vitral.evaluation.multilabel import MultiLabelEvaluation
from vitral.evaluation.probe import ProbeResult
from vitral.model.blocks import height_and_width
from vitral.model.cost import PatchCost, Stage
from vitral.model.vit import ViTConfig
from vitral.recipes.packaged import Difference, Setting
from vitral.recipes.schema import Resolved
from vitral.runtime.devices import Placement
from vitral.runtime.streams import shown, steady
from vitral.training.optimizers import Group
from vitral.training.run import Reporter, Run

# Between two updates of the numbers; reading a loss waits for the device.
_REFRESH_SECONDS = 0.5
_PLAIN_LINE_SECONDS = 30.0
# With more, a model from scratch has mostly enough to learn from.
_FEW_PHOTOGRAPHS = 10_000
_TUNING_ADVICE = "few images to begin from scratch with: model=auto minutes=30 may do better"


class TrainingConsole(Reporter):
    """A live bar with loss, accuracy, images per second and time left, and a line for each epoch."""

    def __init__(self) -> None:
        # Losing the terminal is not losing the run, in a program of the user's own too.
        stream = steady(sys.stderr)
        self.console = Console(file=stream, highlight=False, soft_wrap=True, markup=False, emoji=False)
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
        self.console.print(f"vitral: {shown(text)}")

    def preparing(self, what: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            self.progress.update(
                self.task, completed=done / total, description=what, numbers=f"{done:,} of {total:,} images"
            )
        elif time.monotonic() - self.shown_at >= _PLAIN_LINE_SECONDS / 3:
            self.shown_at = time.monotonic()
            self.console.print(f"{what}: {done:,} of {total:,} images")

    def begin(self, run: Run) -> None:
        self.console.print(run.data.describe())
        self.console.print(describe_recipe(run))
        if run.memory is not None:
            self.console.print(str(run.memory))
        if altered := _how_altered(run):
            self.console.print(f"train's numbers are of images {altered}, val's of images as they are")
        if _had_better_be_tuned(run):
            self.console.print(_TUNING_ADVICE)
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
            f"loss {run.recent.loss:.3f}  {run.recent.accuracy:.1%} right  "
            f"{self.pace.images_per_second(run):,.0f} images/s  {self.pace.left(run)} left"
        )
        if self.console.is_terminal:
            self.progress.update(self.task, completed=run.progress, description=_epoch(run), numbers=numbers)
        else:
            self.console.print(f"{_epoch(run)}  {run.progress:4.0%}  {numbers}")

    def epoch(self, run: Run, evaluation: Evaluation | MultiLabelEvaluation) -> None:
        best = "  best" if run.state.best_step == run.state.step else ""
        self.console.print(
            f"{_epoch(run)}  train loss {run.recent.loss:.3f} {run.recent.accuracy:.1%}  "
            f"val loss {evaluation.loss:.3f} {_score(evaluation)}  {clock(run.state.seconds)}{best}"
        )
        self.shown_at = time.monotonic()

    def end(self) -> None:
        self.progress.stop()


def _score(evaluation: Evaluation | MultiLabelEvaluation) -> str:
    name = "" if isinstance(evaluation, Evaluation) else f"{evaluation.score_name} "
    return f"{name}{evaluation.score:.1%}"


def _how_altered(run: Run) -> str:
    """What training does to images that evaluation does not, in a word or two."""
    recipe = run.recipe
    mixed = recipe.mixing.mixup > 0 or bool(recipe.mixing.cutmix)
    changed = (
        recipe.alteration.flip
        or not recipe.alteration.augmentation.only_moves
        or recipe.alteration.crop != "none"
    )
    return " and ".join(word for word, true in (("mixed", mixed), ("altered", changed)) if true)


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
    height, width = run.checkpoint.preprocess.img_size
    return (
        f"model: {recipe.start.model} at {height}x{width} pixels, {rows}x{columns} patches\n"
        f"       {parameters:,} parameters; {run.placement}\n"
        f"recipe: {recipe.limits}; batch_size {recipe.batches.batch_size}, seed {recipe.course.seed}\n"
        f"        {_peak_rate(recipe)}, weight_decay {recipe.optimization.weight_decay:g}\n"
        f"        crop {recipe.alteration.crop}, flip {str(recipe.alteration.flip).lower()}\n"
        f"all settings: {run.folder / 'recipe.toml'}"
    )


def _peak_rate(recipe: Resolved) -> str:
    """The rate that a run takes, and how it came to it if it is not the recipe's own."""
    peak = recipe.peak_learning_rate
    if peak == recipe.rate.learning_rate:
        return f"learning_rate {peak:g}"
    asked = f"{recipe.rate.learning_rate:g} for {recipe.rate.learning_rate_batch:,} images"
    return f"learning_rate {peak:g} ({asked})"


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every half minute elsewhere; gives a function of (done, total)."""
    console = Console(stderr=True)
    told_at = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)

        def tell(done: int, total: int) -> None:
            nonlocal told_at
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - told_at >= _PLAIN_LINE_SECONDS:
                told_at = time.monotonic()
                console.print(f"vitral: {description}: {done:,} of {total:,} images", highlight=False)

        yield tell


def clock(seconds: float) -> str:
    """``75`` seconds are "1:15", ``4000`` are "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _epoch(run: Run) -> str:
    epochs = run.recipe.limits.epochs
    of = f"/{epochs:g}" if math.isfinite(epochs) else ""
    return f"epoch {run.epoch:.1f}{of}"


class _ShareColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:4.0%}")


class _Pace:
    """Speed and time left, since the first step of this session of the run."""

    def __init__(self, run: Run) -> None:
        self.step, self.seconds, self.progress = run.state.step, run.state.seconds, run.progress

    def images_per_second(self, run: Run) -> float:
        steps, seconds = run.state.step - self.step, run.state.seconds - self.seconds
        return steps * run.recipe.batches.batch_size / max(seconds, 1e-9)

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
    _say(f"{title}: {evaluation.n:,} images")
    print(f"  accuracy           {evaluation.top1:.2%} (95 % interval {low:.2%} to {high:.2%})")
    if len(evaluation.per_class) > 5:
        print(f"  top-5 accuracy     {evaluation.top5:.2%}")
    print(f"  loss               {evaluation.loss:.4f}")
    print(f"  calibration error  {evaluation.ece:.2%}")
    names = list(evaluation.per_class)
    taken_for = evaluation.taken_most_often_for()
    worst_first = sorted(range(len(names)), key=lambda place: evaluation.per_class[names[place]].accuracy)
    rows = []
    for place in worst_first[:_SHOWN_CLASSES]:
        result = evaluation.per_class[names[place]]
        other, count = taken_for.get(place, (place, 0))
        mistaken = f"{names[other]} ({count:,})" if count else ""
        rows.append(
            (names[place], f"{result.n:,}", f"{result.accuracy:.1%}", f"{result.precision:.1%}", mistaken)
        )
    headings = ("class", "images", "accuracy", "precision", "taken most often for")
    _print_table(_classes_shown(len(names)), headings, rows, {"images", "accuracy", "precision"})


def _classes_shown(count: int) -> str:
    return "by class" if count <= _SHOWN_CLASSES else f"the {_SHOWN_CLASSES} worst of {count:,} classes"


def print_multi_label_evaluation(evaluation: MultiLabelEvaluation, title: str) -> None:
    """The numbers, and the classes from the worst to the best."""
    _say(f"{title}: {evaluation.n:,} images")
    print(f"  mean average precision  {evaluation.mean_average_precision:.2%}")
    print(
        f"  F1 at 0.5               {evaluation.micro_f1:.2%} (mean over classes {evaluation.macro_f1:.2%})"
    )
    print(f"  exact match at 0.5      {evaluation.exact_match:.2%}")
    print(f"  loss                    {evaluation.loss:.4f}")
    classes = [(name, row.n, row.average_precision) for name, row in evaluation.per_class.items()]
    classes.sort(key=lambda row: math.inf if row[2] is None else row[2])
    rows = [
        (name, f"{n:,}", "-" if precision is None else f"{precision:.1%}")
        for name, n, precision in classes[:_SHOWN_CLASSES]
    ]
    headings = ("class", "images", "average precision")
    _print_table(_classes_shown(len(classes)), headings, rows, headings[1:])


def print_probe(result: ProbeResult, title: str) -> None:
    """A row for the linear probe and one for the neighbours, with what was chosen and how well it did."""
    linear, near = result.linear, result.neighbours
    _say(f"{title}: {linear.evaluation.n:,} images, after {result.labelled:,} labelled ones")
    rows = []
    for name, row, chosen, top1, ci95 in (
        ("linear", linear, f"L2 {linear.penalty:.1e}", linear.evaluation.top1, linear.evaluation.ci95),
        ("k-NN", near, f"k {near.k}", near.top1, near.ci95),
    ):
        held_out = "-" if row.held_out_top1 is None else f"{row.held_out_top1:.2%}"
        interval = f"{ci95[0]:.1%} to {ci95[1]:.1%}"
        rows.append((name, row.features, str(row.layer), chosen, held_out, f"{top1:.2%}", interval))
    headings = ("probe", "features", "layer", "chosen", "held out", "accuracy", "95 % interval")
    _print_table("", headings, rows, {"layer", "held out", "accuracy"})


def print_diagnosis(diagnosis: Diagnosis, title: str) -> None:
    """How the classifier does as it is, a row for each changed setting, and the conclusion."""
    low, high = diagnosis.ci95
    damaged = f", {diagnosis.damaged:,} damaged ones left out" if diagnosis.damaged else ""
    _say(f"{title}: {diagnosis.n:,} images{damaged}")
    print(f"  accuracy  {diagnosis.top1:.2%} (95 % interval {low:.2%} to {high:.2%})")
    print(f"  loss      {diagnosis.loss:.4f}")
    rows: list[Sequence[str]] = []
    setting = ""
    for finding, (name, now, value, *numbers, _) in zip(diagnosis.findings, diagnosis.rows(), strict=True):
        if finding.verdict == "no effect":
            continue
        first = f"{name} (now {now})" if name != setting else ""
        setting = name
        rows.append((first, value, *numbers, finding.verdict))
    numbers = ("top-1", "points", "loss", "change")
    headings = ("setting", "tried", *numbers, "verdict")
    _print_table("one setting changed at a time, on the same images", headings, rows, numbers)
    for reason, alike in groupby(
        (finding for finding in diagnosis.findings if finding.verdict == "no effect"),
        key=lambda finding: (finding.setting, finding.reason),
    ):
        values = ", ".join(finding.value for finding in alike if finding.value != "-")
        _say(f"no effect: {' '.join(filter(None, (reason[0], values)))}: {reason[1]}")
    _say(diagnosis.conclusion())


def print_stages(config: ViTConfig, stages: list[Stage]) -> None:
    """A row a stage; layers that are alike share one, with the numbers of each."""
    height, width = height_and_width(config.img_size)
    rows: list[Sequence[str]] = []
    for _, alike in groupby(stages, key=lambda stage: (stage.shape, stage.parameters, stage.flops)):
        group = list(alike)
        first, last = group[0], group[-1]
        name = first.name if first is last else f"{first.name} to {last.name}, {len(group)} alike, each"
        shape = " x ".join(map(str, first.shape))
        rows.append((name, shape, f"{first.parameters:,}", _giga(first.flops)))
    parameters = sum(stage.parameters for stage in stages)
    rows.append(("total", "", f"{parameters:,}", _giga(sum(stage.flops for stage in stages))))
    headings = ("stage", "output shape", "parameters", "GFLOPs")
    title = f"one image of {height}x{width} pixels, stage by stage"
    _print_table(title, headings, rows, headings[1:], total=True)


def print_patch_costs(config: ViTConfig, costs: list[PatchCost], placement: Placement) -> None:
    """A row a patch size, the model's own marked."""
    rows = []
    for cost in costs:
        mark = "*" if cost.patch_size == config.patch_size else ""
        parts = cost.attention_flops, cost.linear_flops, cost.attention_flops + cost.linear_flops
        time_taken = "-" if cost.milliseconds is None else f"{cost.milliseconds:.1f}"
        rows.append((f"{mark}{cost.patch_size}", f"{cost.patches:,}", *map(_giga, parts), time_taken))
    headings = ("patch size", "patches N", "attention, O(N²·D)", "linear, O(N·D²)", "total", "ms")
    title = f"what the patch size costs: GFLOPs an image, and ms on {placement}"
    _print_table(title, headings, rows, headings)


def print_groups(groups: list[Group], frozen: list[str]) -> None:
    """A paragraph a group, from the head down, every parameter named; then what is not trained."""
    print("what learns, at its peak rate, from the head down")
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        update = "orthogonal updates" if group["orthogonal"] else "updates by element"
        _say(
            f"level {group['level']}: learning rate {group['lr']:.3g}, "
            f"weight decay {group['weight_decay']:g}, {update}, {count:,} parameters"
        )
        _say(", ".join(group["names"]), indent="  ")
    if frozen:
        _say(f"not trained: {', '.join(frozen)}")


def print_report(report: Report) -> None:
    """A table a task, then who is not in it and why."""
    machine = report.machine
    _say(f"{report.benchmark}: {report.subject} ({report.placement})")
    _say(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores")
    _say(", ".join(f"{name} {number}" for name, number in machine["versions"].items()))
    measured = [row for row in report.rows if row.seconds]
    for task, rows in groupby(measured, key=lambda row: row.task):
        group = list(rows)
        columns = [(name, cell) for name, cell in _CELLS.items() if any(cell(row) for row in group)]
        peak = report.facts.get("gemm_flops_per_second", {}).get(task)
        title = task if peak is None else f"{task}; GEMM {_giga(peak)} GFLOP/s at best"
        cells = [[cell(row) for _, cell in columns] for row in group]
        _print_table(title, [name for name, _ in columns], cells, _CELLS.keys() - _WORDS)
    if any(row.speed_ratio for row in measured):
        _say(
            "ratio: speed over that of the fastest of the other libraries' defaults; median and spread over "
            f"{len(measured[0].seconds)} rounds; agreement: relative difference from Vitral's in float32"
        )
    details = {f"{row.contender}, {row.configuration}: {row.detail}": None for row in measured if row.detail}
    for detail in details:
        _say(detail)
    for row in report.rows:
        if row.reason:
            _say(f"without numbers: {' '.join((row.contender, row.configuration)).strip()}: {row.reason}")


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
    rows = [(item.name, _setting(item.a), _setting(item.b)) for item in differences]
    _print_table(f"where {a} and {b} differ", ("setting", a, b), rows, lines=True)


def _setting(setting: Setting) -> Text:
    value = "-" if setting.value is None else json.dumps(setting.value, ensure_ascii=False)
    text = Text(value.removeprefix('"').removesuffix('"'), style="bold")
    return text.append(f"\n{setting.source}", style="not bold dim") if setting.source else text


def _giga(flops: int) -> str:
    """Three digits, of a digits model or of ViT-g."""
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"


def _say(text: str, indent: str = "") -> None:
    """Wraps at words; a path stays whole."""
    width = max(Console().width, 40)
    options = {"break_long_words": False, "break_on_hyphens": False}
    print(textwrap.fill(shown(text), width, initial_indent=indent, subsequent_indent=indent, **options))


def _print_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    numbers: Collection[str] = (),
    *,
    total: bool = False,
    lines: bool = False,
) -> None:
    """A table that fits the terminal: words are folded there, numbers never.

    Args:
        title: above it.
        headings: of the columns.
        rows: their cells.
        numbers: the headings of columns of numbers.
        total: whether the last row stands apart.
        lines: whether every row does.
    """
    heading_above = _plain(title) if title else None
    table = Table(title=heading_above, title_justify="left", box=SIMPLE_HEAD, padding=0, show_lines=lines)
    for heading in headings:
        if heading in numbers:
            table.add_column(Text(heading.replace(" ", "\n")), justify="right", no_wrap=True)
        else:
            table.add_column(_plain(heading), overflow="fold")
    for place, row in enumerate(rows):
        table.add_row(*map(_plain, row), end_section=total and place == len(rows) - 2)
    Console(highlight=False).print(table)


def _plain(cell: str | Text) -> Text:
    """Brackets in a name are no markup, and what would move the cursor is made visible."""
    return cell if isinstance(cell, Text) else Text(shown(cell))
