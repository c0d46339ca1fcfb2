"""One process at a time works on a run's folder."""

import contextlib
from pathlib import Path

from vitral.runtime.errors import VitralError
from vitral.runtime.lock import LockedError, locked


def claim_folder(path: Path, claim: contextlib.ExitStack) -> None:
    """Makes and locks a folder until the claim ends; it is unmade then if nothing was written.

    Raises:
        VitralError: if another process works there, or it cannot be written.
    """
    try:
        for folder in reversed(_make(path)):
            claim.callback(_remove_if_unused, folder)
        claim.enter_context(locked(path / ".lock"))
    except LockedError as error:
        claim.close()
        raise VitralError(
            f"{path} is in use: {error.who} trains there; wait for it, stop it, or choose another --out"
        ) from None
    except OSError as error:
        claim.close()
        raise _unwritable(path, error) from error


def _make(path: Path) -> list[Path]:
    """Makes the folder, and returns those that were not there, inner ones first."""
    place = path
    missing = []
    try:
        while not place.exists() and place != place.parent:
            missing.append(place)
            place = place.parent
        if not place.is_dir():
            within = "" if place == path else f" {path}:"
            raise VitralError(f"--out{within} {place} is a file; a run needs a folder of its own")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return missing


def _unwritable(path: Path, error: OSError) -> VitralError:
    return VitralError(f"--out {path}: a run cannot be written there: {error.strerror or error}")


def _remove_if_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is in use now
        folder.rmdir()
