"""`vitral bench`: speed beside the other libraries."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitral.cli import options, usage
from vitral.cli.bench_report import command_line, give
from vitral.cli.commands.bench_serve import serve
from vitral.cli.console import giga, print_table, say, warn
from vitral.runtime import limits
from vitral.runtime.process import keep_freed_memory

if TYPE_CHECKING:
    from vitral.bench.report import Report, Row

app = typer.Typer(
    cls=usage.Commands,
    help="Speed beside other libraries, and a server under load.",
    no_args_is_help=True,
)

_Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] [KEY=VALUE...]",
        help="A variant's name or a checkpoint; batch_size, also a list, and fields of ViTConfig. Of data: a "
        "folder of images; img_size, batch_size, images, workers, interpolation and photo_size.",
    ),
]
_Isolated = Annotated[
    bool,
    typer.Option(
        "--isolated",
        "--apart",
        help="train and infer: each contender in a process of its own, set up as its users have it, "
        "rather than all in one.",
    ),
]
_Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Also measure with torch.compile.")]
_Peers = Annotated[list[str] | None, typer.Option(help="Compete with this library only; repeatable.")]


# In the order of --help; what is said of each there.
_COMPARED = {
    "train": "Training steps beside timm, transformers, torchvision and vit-pytorch, if they are installed.",
    "infer": "Forward passes beside the other libraries.",
    "start": "A fresh process to its first prediction, beside the other libraries.",
    "data": "From files to batches beside torchvision, timm and transformers; takes a folder of images.",
    "kernels": "Our two routes of patches and of attention; takes no MODEL.",
}


def _comparison(what: str) -> Callable[..., None]:
    def command(  # noqa: PLR0913 - a command's options
        words: _Words = None,
        rounds: Annotated[
            int, options.number(limits.ROUNDS, "Number of measurements of each library, taken in turns.")
        ] = 7,
        out: Annotated[Path | None, options.file("A JSON file for the report.")] = None,
        json_output: options.Json = False,
        compiled: _Compiled = True,
        isolated: _Isolated = False,
        peer: _Peers = None,
        device: options.Device = "auto",
        precision: options.Precision = "auto",
    ) -> None:
        from vitral.bench.rounds import Settings
        from vitral.bench.run import run
        from vitral.runtime.devices import Placement

        placement = Placement.choose(device, precision)  # type: ignore[arg-type]
        if what == "data" or (what == "train" and not isolated):
            keep_freed_memory()  # as in a run; here for all alike
        settings = Settings(placement, rounds, compiled, isolated, tuple(peer or ()), command_line(), warn)
        report = run(what, words or [], settings)
        if not give(report.to_dict(), out, as_json=json_output):
            print_report(report)

    return command


for _what in limits.BENCHMARKS:
    app.command(_what, help=_COMPARED[_what])(_comparison(_what))
app.command("serve")(serve)


def print_report(report: "Report") -> None:
    """Print a table a task, then who is not in it and why."""
    machine = report.machine
    say(f"{report.benchmark}: {report.title} ({report.placement})")
    say(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores")
    say(", ".join(f"{name} {number}" for name, number in machine["versions"].items()))
    measured = [row for row in report.rows if row.seconds]
    for task, rows in groupby(measured, key=lambda row: row.task):
        group = list(rows)
        columns = [(name, cell) for name, cell in _CELLS.items() if any(cell(row) for row in group)]
        peak = report.facts.get("gemm_flops_per_second", {}).get(task)
        title = task if peak is None else f"{task}; GEMM {giga(peak)} GFLOP/s at best"
        cells = [[cell(row) for _, cell in columns] for row in group]
        print_table(title, [name for name, _ in columns], cells, _CELLS.keys() - _WORDS)
    if legend := report.facts.get("legend"):
        say(legend)
    elif any(row.speed_ratio for row in measured):
        say(
            "ratio: speed over that of the fastest of the other libraries' defaults; median and spread over "
            f"{len(measured[0].seconds)} rounds; agreement: relative difference from Vitral's in float32"
        )
    details = {f"{row.contender}, {row.configuration}: {row.detail}": None for row in measured if row.detail}
    for detail in details:
        say(detail)
    for row in report.rows:
        if row.reason:
            say(f"without numbers: {' '.join((row.contender, row.configuration)).strip()}: {row.reason}")


def _time(row: "Row") -> str:
    if row.images:  # images/s says it
        return ""
    return f"{1e3 * row.median:.2f} ms" if row.median < 0.1 else f"{row.median:.2f} s"


def _agreement(row: "Row") -> str:
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
_CELLS: "dict[str, Callable[[Row], str]]" = {
    "contender": lambda row: row.contender,
    "configuration": lambda row: row.configuration,
    "time": _time,
    "images/s": lambda row: f"{row.images_per_second:,.1f}" if row.images_per_second else "",
    "spread": lambda row: f"{row.spread:.0%}",
    "ratio": lambda row: f"{ratio:.2f}" if (ratio := row.speed_ratio or row.folder_ratio) else "",
    "levels": lambda row: "" if row.levels is None else f"{row.levels:.2f}",
    "of GEMM": lambda row: f"{row.peak_share:.0%}" if row.peak_share else "",
    **{
        f"{part} s": lambda row, part=part: f"{row.parts[part]:.2f}" if part in row.parts else ""
        for part in ("load", "predict")
    },
    "MiB": lambda row: f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes else "",
    "agreement": _agreement,
}
