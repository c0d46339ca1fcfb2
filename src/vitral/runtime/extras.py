"""What is said where a library of an extra is not installed; pyproject.toml lists the extras."""

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec

from vitral.runtime.errors import VitralError


@cache
def is_installed(library: str) -> bool:
    """Tell whether a library is there; looked for once in a process, for it is asked at each image."""
    return find_spec(library) is not None


def why_not(what: str, libraries: Iterable[str], extra: str) -> str | None:
    """Say which library is missing for it, and the command that installs it; None if all are there."""
    for library in libraries:
        if find_spec(library) is None:
            return f"{what} needs {library}: pip install 'vitral[{extra}]'"
    return None


def need(what: str, *libraries: str, extra: str) -> None:
    """Raise VitralError, with `why_not`, if a library is missing; imports none of them.

    Args:
        what: what cannot be done without, in the singular.
        libraries: their names in Python.
        extra: of Vitral, that has them all.
    """
    if reason := why_not(what, libraries, extra):
        raise VitralError(reason)
