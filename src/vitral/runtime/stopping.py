"""How a person or a system asks Vitral to stop, and how long work heeds it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

# Ctrl-C; what `kill`, `timeout` and schedulers send; what a terminal sends when it is closed.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# For what was done to be kept. What still runs then waits for something that does not come.
_SECONDS_TO_END = 10.0


class Stopped(BaseException):
    """Raised inside long work after a stop was asked for; whoever catches it keeps what was done before.

    No `Exception`: it may come while an image is decoded, and would pass for damage.
    """


class Interrupted(BaseException):
    """A signal that ends a command; no `Exception`, so that nobody takes it for an error and goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = exit_status(number)

    def __str__(self) -> str:
        name = signal.Signals(self.args[0]).name
        return "interrupted" if name == "SIGINT" else f"ended by {name}"


def exit_status(number: int) -> int:
    """Give the status of a command that a signal ended, as shells have it: 130 for Ctrl-C."""
    return 128 + number


@dataclass
class StopSignal:
    """Whether a stop was asked for; long work looks at it every second or so."""

    requested: bool = False
    number: int | None = None  # of the signal that asked
    _raising: bool = False

    def check(self) -> None:
        """Raise Stopped if a stop was asked for."""
        if self.requested:
            raise Stopped

    @contextmanager
    def raises(self) -> Iterator[None]:
        """Make a stop raise Stopped inside, wherever the main thread is, in a library's work too."""
        self.check()
        before, self._raising = self._raising, True
        try:
            yield
        finally:
            self._raising = before

    def request(self, number: int | None = None) -> None:
        self.requested, self.number = True, number
        if self._raising:
            self.check()


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Let Ctrl-C, SIGTERM and a closed terminal ask to stop; a second Ctrl-C does what it did before.

    What the caller ignores, as `nohup` ignores a closed terminal, stays ignored.
    """
    stop = StopSignal()

    def request(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and stop.requested:
            before = previous.get(number)
            return before(number, None) if callable(before) else signal.default_int_handler(number, None)
        return stop.request(number)

    with _handled_by(request) as previous:
        yield stop


class _Ender:
    """Handles signals for a whole command: the first raises Interrupted, a second Ctrl-C ends it at once.

    SIGTERM and SIGHUP come twice without a second will: `timeout` sends to the process and to its group.
    """

    def __init__(self) -> None:
        self.timer: threading.Timer | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self.timer is not None:
            if number == signal.SIGINT:
                _end_at_once(number)
            return
        # An exception from a signal is lost where it meets a destructor or somebody's bare `except`.
        self.timer = threading.Timer(_SECONDS_TO_END, _end_at_once, [number])
        self.timer.daemon = True
        self.timer.start()
        raise Interrupted(number)


def end_on_signals() -> None:
    """Let signals end the process as a command ends, from here on to its end."""
    _set_handlers(dict.fromkeys(_heeded(), _Ender()))


def leave_signals_to_the_system() -> None:
    """Leave the rest to the system when all is done: Python's own end would print a traceback at a signal."""
    _set_handlers(dict.fromkeys(_heeded(), signal.SIG_DFL))


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Do as `end_on_signals`, for a command that is a part of the process."""
    if any(isinstance(handler, _Ender) for handler in _heeded().values()):
        yield
        return
    ender = _Ender()
    with _handled_by(ender):
        try:
            yield
        finally:
            if ender.timer is not None:
                ender.timer.cancel()


@contextmanager
def signals_kept() -> Iterator[None]:
    """Keep what signals do, whatever a library that begins inside makes of them."""
    before = _heeded()
    try:
        yield
    finally:
        _set_handlers(before)


def _end_at_once(number: int) -> None:
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(exit_status(number))


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[dict[int, Any]]:
    """Gives the handlers that were there."""
    previous = _heeded()
    _set_handlers(dict.fromkeys(previous, handler))
    try:
        yield previous
    finally:
        _set_handlers(previous)


def _heeded() -> dict[int, Any]:
    """The signals to heed and their handlers as they are; only a process's main thread may have any."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}


def _set_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
