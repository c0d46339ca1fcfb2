"""What reaches the terminal: standard output and error that survive their readers, and text made visible."""

import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from vitral.runtime.errors import VitralError

# Control characters, halves of surrogate pairs, line and paragraph separators; and what turns text round.
_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}
_TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class OutputLost(VitralError):
    """Results could not be written to standard output; `quietly` if the reader had what it wanted."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written: {error.strerror}")
        self.quietly = isinstance(error, BrokenPipeError)


def shown(text: object) -> str:
    """Make text fit for a line of a terminal: what moves the cursor or changes colours becomes an escape."""
    return "".join(_escaped(character) for character in str(text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) in _UNSHOWN or character in _TURNING:
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character


class _Descriptor(io.RawIOBase):
    """A stream of the process; what cannot be written is dropped, or said once if it is results."""

    def __init__(self, number: int, *, results: bool) -> None:
        self._number, self._results, self._lost = number, results, False

    def write(self, data: Any, /) -> int:
        if not self._lost:
            try:
                return os.write(self._number, data)
            except OSError as error:
                # Progress may find room on the disk again; results with a gap are worth nothing.
                if self._results:
                    self._lost = True
                    raise OutputLost(error) from error
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def fileno(self) -> int:
        return self._number


def steady(stream: TextIO) -> TextIO:
    """Give the process's standard error in a form that never fails; any other stream as it is."""
    if stream is None or stream is not sys.__stderr__:
        return stream
    return io.TextIOWrapper(
        # Without a buffer nothing is left to write when the process ends.
        cast("io.BufferedWriter", _Descriptor(2, results=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        write_through=True,
    )


@contextmanager
def standard_error_hidden() -> Iterator[None]:
    """Let what a library's own code writes to the descriptor 2 inside be lost; exceptions are not."""
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _results(stream: TextIO) -> TextIO:
    """The process's standard output in a form that tells when it is lost; any other stream as it is."""
    if stream is None or stream is not sys.__stdout__:
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(1, results=True)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.isatty(),
    )


@contextmanager
def command_streams() -> Iterator[None]:
    """Prepare the streams for a whole command: nothing is refused for its characters, and none is closed.

    A descriptor that is closed (``>&-``) would be given to the next file that is opened, and what is printed
    written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    before = sys.stdout, sys.stderr
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            stream = os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            setattr(sys, name, stream)
    sys.stdout, sys.stderr = _results(sys.stdout), steady(sys.stderr)
    try:
        yield
    finally:
        if before[0] is not None:
            sys.stdout, sys.stderr = before
