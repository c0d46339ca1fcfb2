"""One process at a time: a lock on a file, which the death of its holder releases."""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# A process is never refused its own record lock, so it must know itself which it has.
_locked_here: set[Path] = set()


class LockedError(Exception):
    """Another has the lock; `pid` is its process, if that is known."""

    def __init__(self, pid: int | None) -> None:
        super().__init__(pid)
        self.pid = pid

    @property
    def who(self) -> str:
        """Names the holder in a message."""
        return "another process" if self.pid is None else f"process {self.pid}"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Lock `file` inside, so that nobody else has it; the file lives as the lock does and names the process.

    A record lock, not one of flock: that would live on in worker processes after the death of their parent.
    Where the file system has no locks, there is none.

    Raises:
        LockedError: if another process, or another thread of this one, has it.
        OSError: if the file cannot be made.
    """
    key = file.resolve()
    if key in _locked_here:
        raise LockedError(os.getpid())
    _locked_here.add(key)
    try:
        descriptor = _locked_descriptor(file)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            yield
        finally:
            # While the lock is ours, so that the file of a later holder is never removed.
            try:
                file.unlink(missing_ok=True)
            finally:
                os.close(descriptor)
    finally:
        _locked_here.discard(key)


def is_locked(file: Path) -> bool:
    """Tell whether a process has the lock, this one included, without taking it."""
    if file.resolve() in _locked_here:
        return True
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(descriptor)
    return False


def _locked_descriptor(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock(descriptor) and _is_at(descriptor, file):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise LockedError(_pid_in(descriptor)) from None
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """False if the last holder removed the file between our opening and our locking it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    return False


def _pid_in(descriptor: int) -> int | None:
    text = os.read(descriptor, 20).strip()
    return int(text) if text.isdigit() else None
