"""`Background`: work that goes on while the caller does, in one thread, in order; its error comes later."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Takes pieces of work, of which a few may wait.

    After one that failed no other is begun: what comes later may stand on it. The error is raised where the
    next work is handed in, or `finish` is called.

    Args:
        most: that may be unfinished; whoever hands in another waits for the first.
    """

    def __init__(self, most: int = 3) -> None:
        self._most = most
        self._unfinished: deque[Future[None]] = deque()
        self._executor: ThreadPoolExecutor | None = None
        self._failed = False

    def begin(self, work: Callable[[], object]) -> None:
        """Let `work` be done. What it touches is its own from now on."""
        while self._unfinished and (self._unfinished[0].done() or len(self._unfinished) >= self._most):
            self._wait()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "vitral-background")
        self._unfinished.append(self._executor.submit(self._do, work))

    def finish(self) -> None:
        """Wait until all is done."""
        while self._unfinished:
            self._wait()

    def close(self) -> None:
        """Finish, and end the thread."""
        try:
            self.finish()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
            self._executor, self._failed = None, False

    def _wait(self) -> None:
        try:
            self._unfinished.popleft().result()
        except BaseException:
            for later in self._unfinished:  # which do nothing any more
                later.exception()
            self._unfinished.clear()
            raise

    def _do(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise
