"""How far long work is that no caller follows, such as the first reading of a source.

Whoever has a place to show it, the command line, says so by `shown_by`; else it is silent.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

# Takes what is being done and what is counted; gives a function of (done, total).
Show = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]


def _silent(_: str, __: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda *_: None)


_show: Show = _silent


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Let the progress of all work inside be shown."""
    global _show
    before, _show = _show, show
    try:
        yield
    finally:
        _show = before


def progress(description: str, things: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Give a function of (done, total) to call as work goes on."""
    return _show(description, things)
