"""Decides which file may be written when: a file or a folder appears whole, or not at all.

`write_atomically` and `new_file` replace one file, `new_folder` makes one folder, `remove_leftovers` cleans
up after processes that were killed in between. Nothing else in Vitral makes a file
that others may read half-written.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from vitral.runtime.errors import VitralError


def cache_folder(kind: str, wanted: Path | None = None) -> Path:
    """Gives `wanted`, else the folder of this kind in $VITRAL_CACHE, else in ``~/.cache/vitral``."""
    if wanted is not None:
        return wanted
    return Path(os.environ.get("VITRAL_CACHE") or Path.home() / ".cache" / "vitral") / kind


# What `tempfile.mkstemp` makes of the prefix in `write_atomically`.
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file: `path` has either its old content or all of the new, whenever the process is killed.

    Raises:
        OSError: if it cannot be written; the old file is then as it was.
    """
    with new_file(path) as temporary, temporary.open("r+b") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a file to write, which replaces `path` at the end; if anything is raised, nothing of it remains.

    Raises:
        OSError: if there is no place for it.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # under the name that the user knows
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a model is as readable as any other file its user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_in_place(staging: Path, folder: Path) -> None:
    """Gives a folder that several processes wrote its name; what had it is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(staging, folder)


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Removes what killed processes left of `write_atomically`; nobody may be writing these files."""
    for file in folder.iterdir() if folder.is_dir() else ():
        left = _TEMPORARY.fullmatch(file.name)
        if left and left[1] in names:
            file.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Tells whether a file's name is one that `new_file` gives until its end."""
    return _TEMPORARY.fullmatch(name) is not None


def refuse_filled(path: Path) -> None:
    """Raises VitralError if `path` is there and is no empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise VitralError(f"{path} exists already; choose a new folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `path` at the end; if anything is raised, nothing remains.

    `path` must not be there yet, or be empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield staging
        staging.chmod(0o755)
        staging.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
