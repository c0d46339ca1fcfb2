"""How a person or a system asks Vitral to stop, and how long work heeds it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Stopped(Exception):
    """Raised inside long work after a stop was asked for."""


@dataclass
class StopSignal:
    """Whether a stop was asked for; long work looks at it every second or so."""

    requested: bool = False
    _raising: bool = False

    def check(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if self.requested:
            raise Stopped

    @contextmanager
    def raises(self) -> Iterator[None]:
        """Inside, a stop raises Stopped wherever the main thread is, in a library's work too."""
        self.check()
        self._raising = True
        try:
            yield
        finally:
            self._raising = False

    def request(self) -> None:
        self.requested = True
        if self._raising:
            raise Stopped


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Ctrl-C and SIGTERM ask to stop; a second Ctrl-C ends the process at once."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        # Only a process's main thread may handle signals; elsewhere the caller decides when to stop.
        yield stop
        return

    def request(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.request()

    kinds = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(kind, request) for kind in kinds]
    try:
        yield stop
    finally:
        for kind, handler in zip(kinds, previous, strict=True):
            signal.signal(kind, handler)
