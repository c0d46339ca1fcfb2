"""The command line: its commands, its exit status, and the one line that every failure ends in.

Results go to standard output, progress and messages to standard error. Exit status 0 is done, 1 a
failure with one line, 2 wrong usage. What is slow to import is imported inside the commands, so that
--help is instant.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from vitral.cli import usage
from vitral.cli.commands import (
    bench,
    check,
    convert,
    demo,
    doctor,
    eval,
    explain,
    export,
    info,
    optimize,
    predict,
    probe,
    push,
    rate,
    recipe,
    report,
    runs,
    serve,
    sweep,
    train,
    verify,
)
from vitral.cli.console import progress_bar, warn
from vitral.runtime.errors import ToldElsewhere, VitralError
from vitral.runtime.progress import shown_by
from vitral.runtime.stopping import Interrupted, ending_on_signals
from vitral.runtime.streams import OutputLost, command_streams
from vitral.runtime.threads import set_how_threads_wait
from vitral.runtime.version import vitral_version

app = typer.Typer(
    cls=usage.Commands,
    help="Vitral: the plain Vision Transformer, end to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vitral {vitral_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# In the order of --help.
for _command in (
    demo.demo, check.check, train.train, eval.eval, predict.predict, explain.explain, report.report,
    runs.runs, sweep.sweep, rate.rate, info.info, doctor.doctor, probe.probe, convert.convert, push.push,
    export.export, optimize.optimize, serve.serve, verify.verify,
):  # fmt: skip
    app.command()(_command)
app.add_typer(bench.app, name="bench")
app.add_typer(recipe.app, name="recipe")


def main() -> None:
    """The entry point: what a user can get wrong ends in one line."""
    set_how_threads_wait()
    with command_streams(), ending_on_signals(), shown_by(progress_bar):
        status = _status()
    sys.exit(status)


def _status() -> int | str | None:
    """Runs the command; 0 done, 1 failed with one line, 2 wrong usage, 128 + n ended by signal n."""
    try:
        status = _ending(lambda: app(prog_name="vitral", standalone_mode=False))
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
        _warn_if_any(usage.line_of(error))
        return 2
    except typer.Abort:
        return 1
    except Interrupted as signal:
        warn(str(signal))
        return signal.status
    except OutputLost as lost:
        if not lost.quietly:  # else the reader, such as `head`, has what it wanted
            warn(str(lost))
        return 1
    except Exception as error:
        if os.environ.get("VITRAL_DEBUG"):
            raise
        _warn_if_any(_told(error))
        return 1


def _warn_if_any(line: str) -> None:
    if line:
        warn(line)


def _told(error: Exception) -> str:
    if isinstance(error, ToldElsewhere):
        return ""
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
