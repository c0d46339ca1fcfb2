"""What the commands print alike: messages, wrapped lines, tables, bars; rich is imported when it is used."""

import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from vitral.runtime.streams import shown

if TYPE_CHECKING:
    from rich.text import Text

_NARROWEST = 40  # columns; what is for less is as for these
PLAIN_LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


def warn(message: str) -> None:
    """Print a message on standard error."""
    print(wrapped(f"vitral: {shown(message)}", sys.stderr), file=sys.stderr)


@contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Let a library call's warnings be messages."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: warn(str(message))  # pyrefly: ignore[bad-assignment]
        yield


def columns() -> int:
    """How wide the output is."""
    from rich.console import Console

    return max(Console().width, _NARROWEST)


def print_lines(text: str) -> None:
    """Print results that have no table, wrapped on a terminal."""
    print(wrapped(text, sys.stdout))


def wrapped(text: str, stream: IO[str]) -> str:
    """Break lines between words, a path staying whole, if they are for a terminal and wider than it."""
    if not stream.isatty():
        return text
    lines = text.split("\n")
    return "\n".join(_filled(line, f"{line[: len(line) - len(line.lstrip())]}  ") for line in lines)


def say(text: str, indent: str = "") -> None:
    """Print text of a report, as wide as its tables, which are so wide in files too."""
    print(_filled(f"{indent}{shown(text)}", indent))


def _filled(line: str, indent: str) -> str:
    """A line broken between words, with an indent before all parts but the first."""
    width = columns()
    options = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    return textwrap.fill(line, width, subsequent_indent=indent, **options)


def print_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence["Sequence[str | Text]"],
    numbers: Collection[str] = (),
    *,
    total: bool = False,
    lines: bool = False,
) -> None:
    """Print a table that fits the terminal: words are folded there, numbers never.

    Args:
        title: above it.
        headings: of the columns.
        rows: their cells.
        numbers: the headings of columns of numbers.
        total: whether a line sets the last row off.
        lines: whether lines set off every row.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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


def _plain(cell: "str | Text") -> "Text":
    """A cell as it is: brackets in a name are no markup, and what would move the cursor is made visible."""
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text(shown(cell))


@contextmanager
def progress_bar(description: str, things: str = "images") -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, a line every half minute elsewhere; gives a function of (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    told_at = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)

        def tell(done: int, total: int) -> None:
            nonlocal told_at
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - told_at >= PLAIN_LINE_SECONDS:
                told_at = time.monotonic()
                console.print(f"vitral: {description}: {done:,} of {total:,} {things}", highlight=False)

        yield tell


@contextmanager
def phases() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Show what is being done, in a bar on a terminal, a line each elsewhere.

    Gives a function of the words, and one of how many images of how many are done.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def tell(words: str) -> None:
            progress.reset(task, total=None, description=words)
            if not console.is_terminal:
                console.print(f"vitral: {words}", highlight=False, markup=False)

        yield tell, lambda done, total: progress.update(task, completed=done, total=total)


def clock(seconds: float) -> str:
    """Write ``75`` seconds as "1:15", ``4000`` as "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def giga(flops: int) -> str:
    """Write thousands of millions, in three digits, of a digits model or of ViT-g."""
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"
