"""`vitral bench serve`: a running server under load."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitral.cli import options
from vitral.cli.bench_report import command_line, give
from vitral.cli.console import print_table, say, warn
from vitral.cli.tokens import read_tokens
from vitral.runtime import limits
from vitral.runtime.stopping import exit_status

if TYPE_CHECKING:
    from vitral.bench.serving.load import Phase
    from vitral.bench.serving.measure import ServingReport

_Seconds = Annotated[float, typer.Option(help="How long each load lasts.")]
_Rate = Annotated[
    str | None,
    options.name(
        "RATES",
        "Requests a second that come whether the server keeps up or not, such as 100, or multiples of what "
        "it was found able to do, such as 0.5x,1x,3x.",
        "--rate",
    ),
]
_Timeout = Annotated[float, typer.Option(help="Seconds after which a request without an answer is lost.")]
_Pid = Annotated[int | None, typer.Option(help="The server's process on this machine, to see its memory.")]
_Elsewhere = Annotated[
    bool, typer.Option("--elsewhere", help="The server is on another machine, and yours to load.")
]


def serve(  # noqa: PLR0913 - a command's options
    url: Annotated[str, options.text("URL", "Of a running server, such as http://127.0.0.1:8000.")],
    images: Annotated[list[str], options.text("IMAGES...", "Files, folders or patterns of what is sent.")],
    clients: Annotated[int, options.number(limits.CLIENTS, "Of the closed loop, at a time.")] = 16,
    seconds: _Seconds = 20.0,
    rate: _Rate = None,
    timeout: _Timeout = 30.0,
    pid: _Pid = None,
    token_file: Annotated[Path | None, typer.Option(help="A file with the token that is asked for.")] = None,
    elsewhere: _Elsewhere = False,
    seed: options.Seed = 0,
    out: Annotated[Path | None, options.file("A JSON file for the report.")] = None,
    json_output: options.Json = False,
) -> None:
    """A running server under load: how fast it answers, what it refuses, what is lost.

    In a closed loop, the default, each client waits for its answer before it asks again. With --rate
    requests come by a Poisson process, and each is timed from when it was due. Ctrl-C ends the load and
    prints what was measured.

    \b
    vitral bench serve http://127.0.0.1:8000 photos --clients 16 --seconds 20
    vitral bench serve http://127.0.0.1:8000 photos --rate 0.5x,1x,3x --seconds 60 --pid 4242 --out load.json
    """
    from vitral.bench.serving.load import rates_of
    from vitral.bench.serving.measure import Load, measure
    from vitral.data.sources import find_images

    rates = rates_of(rate) if rate is not None else ()
    found = find_images(images)
    for note in (*found.notes, *found.failures):
        warn(note)
    load = Load(
        clients, seconds, rates, timeout, pid,
        token=read_tokens(token_file)[0] if token_file else None,
        elsewhere=elsewhere, seed=seed, command=command_line(), say=warn,
    )  # fmt: skip
    report = measure(url, [Path(file) for file in found.files], load)
    if not give(report.to_dict(), out, as_json=json_output):
        print_serving(report)
    if report.stopped_by:
        raise typer.Exit(exit_status(report.stopped_by))


def print_serving(report: "ServingReport") -> None:
    """Print a row a load, then each answer's times, and what should not have been."""
    machine = report.machine
    say(f"serve: {report.url}, {report.pictures} pictures of {report.bytes_a_picture / 1e3:.0f} kB")
    say(f"{machine['cpu']}, {machine['cores']} cores, shared by the server and this generator")
    if report.idle:
        say(
            f"idle: {report.idle['server_cores']:.1%} of a core, "
            f"{report.idle['server_bytes_after'] / 2**20:,.0f} MiB"
        )
    for cells in (_answered, _taken):
        rows = [cells(phase) for phase in report.phases]
        names = [name for name in rows[0] if any(row[name] for row in rows)]
        print_table("", names, [[row[name] for name in names] for row in rows], set(names) - {"load"})
    answers = [cells for phase in report.phases for cells in _answers(phase)]
    headings = ("load", "answer", "requests", "share", "p50 ms", "p95 ms", "p99 ms", "max ms", "p99 ms sent")
    print_table("", headings, answers, set(headings[2:]))
    say("ms: from when a request was due; sent: from when it was sent")
    for note in (note for phase in report.phases for note in _notes(phase)):
        say(note)


def _answered(phase: "Phase") -> dict[str, str]:
    from vitral.bench.serving.tally import OK, REFUSALS

    tally = phase.tally
    begun = max(tally.begun, 1)
    return {
        "load": phase.title,
        "requests": f"{tally.begun:,}",
        "accepted /s": f"{phase.throughput:,.1f}",
        "accepted": f"{tally.count(OK) / begun:.1%}",
        "refused": f"{tally.count(*REFUSALS) / begun:.1%}",
        "lost": f"{sum(tally.lost.values()):,}",
    }


def _taken(phase: "Phase") -> dict[str, str]:
    machine = phase.machine
    mib = [machine.get(f"server_bytes_{when}") for when in ("before", "peak", "after")]
    return {
        "load": phase.title,
        "generator cores": f"{machine['generator_cores']:.2f}",
        "server cores": f"{machine['server_cores']:.2f}" if "server_cores" in machine else "",
        "machine cores": f"{machine['machine_cores']:.2f}",
        "server MiB": " > ".join(f"{size / 2**20:,.0f}" for size in mib if size),
    }


def _answers(phase: "Phase") -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for status, answer in phase.to_dict()["answers"].items():
        times: dict[str, Any] = answer["ms"]
        shown = [f"{times[name]:,.1f}" for name in ("p50", "p95", "p99", "max")]
        sent = f"{answer['ms_from_sending']['p99']:,.1f}"
        rows.append([phase.title, status, f"{answer['requests']:,}", f"{answer['share']:.1%}", *shown, sent])
    return rows


# Beyond this the generator is what was measured.
_LATE_MS = 20.0


def _notes(phase: "Phase") -> list[str]:
    tally, notes = phase.tally, []
    if tally.lost:
        notes.append("lost: " + ", ".join(f"{count:,} {reason}" for reason, count in tally.lost.items()))
    if tally.unfinished:
        notes.append(f"{tally.unfinished:,} were under way when the load was stopped")
    if tally.otherwise:
        notes.append(f"{tally.otherwise:,} were answered otherwise than the first time")
    if tally.without_retry_after:
        notes.append(f"{tally.without_retry_after:,} were refused without Retry-After")
    late = phase.to_dict()["generator_late_ms"]
    if late and late["p99"] > _LATE_MS:
        notes.append(
            f"the generator was late itself: by {late['p99']:,.0f} ms at p99; take another machine for it"
        )
    return [f"{phase.title}: {note}" for note in notes]
