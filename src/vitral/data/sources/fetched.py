"""`FetchedFiles`: what was fetched from elsewhere, in a folder of a bounded size that all processes share.

A file is fetched by one process while the others that want it wait, appears whole, and is removed when room
is needed and nobody asked for it the longest. Whoever has it open meanwhile reads on.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitral.runtime.errors import VitralError
from vitral.runtime.files import is_temporary, new_file

# The most that is kept, in bytes; a disk with less room gets half of it.
LIMIT_VARIABLE = "VITRAL_STREAM_BYTES"
_LIMIT = 32 * 2**30
_SHARE_OF_DISK = 0.5
_LOCKS = 64
_LOCK = ".lock-"
_SECONDS_LEFT_OVER = 6 * 3600.0  # after which what a killed process began is nobody's


@dataclass(frozen=True)
class FetchedFiles:
    """Files by key; safe to pickle, in forks, and for many processes on one folder."""

    folder: Path

    def path(self, key: str, fetch: Callable[[Path], None]) -> Path:
        """Gives the file of a key, which `fetch` writes if it is not there.

        Raises:
            VitralError: if the folder cannot be written; and what `fetch` raises.
        """
        digest = hashlib.sha256(os.fsencode(key)).hexdigest()
        path = self.folder / digest[:32]
        if _touched(path):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(int(digest[-4:], 16) % _LOCKS):
                if not _touched(path):
                    self._fetch(path, fetch)
        except OSError as error:
            raise VitralError(
                f"{self.folder} cannot keep what is fetched: {error.strerror or error}; make room there, or "
                "name another folder by VITRAL_CACHE"
            ) from error
        return path

    def _fetch(self, path: Path, fetch: Callable[[Path], None]) -> None:
        with new_file(path) as temporary:
            fetch(temporary)
            self._make_room(temporary.stat().st_size)

    @contextmanager
    def _locked(self, number: int) -> Iterator[None]:
        import fcntl  # not on Windows

        with (self.folder / f"{_LOCK}{number:02}").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, wanted: int) -> None:
        """Removes what was asked for the longest ago, until a file of `wanted` bytes fits the limit."""
        kept = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            if is_temporary(entry.name) and time.time() - status.st_mtime > _SECONDS_LEFT_OVER:
                Path(entry.path).unlink(missing_ok=True)
            elif not entry.name.startswith("."):
                kept.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in kept)
        limit = min(_limit(), int(_SHARE_OF_DISK * (shutil.disk_usage(self.folder).free + wanted + used)))
        for _, size, path in sorted(kept):
            if used + wanted <= limit:
                return
            Path(path).unlink(missing_ok=True)
            used -= size


def _touched(path: Path) -> bool:
    """Whether it is there; its time then says that it was asked for."""
    try:
        os.utime(path)
    except OSError:
        return False
    return True


def _limit() -> int:
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return _LIMIT
    if not text.isdecimal() or int(text) < 2**20:
        raise VitralError(f"{LIMIT_VARIABLE}={text}: give a number of bytes, 1048576 at least")
    return int(text)
