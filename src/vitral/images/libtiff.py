"""libtiff's own messages: it writes them to standard error, where they stand between ours.

Pillow says itself that a picture cannot be decoded, and its name is told with it.
"""

import ctypes
import functools
from typing import Any

_SETTERS = ("TIFFSetErrorHandler", "TIFFSetWarningHandler")


def silence() -> tuple[int | None, ...]:
    """Gives what `restore` takes; nothing where Pillow's library shows no such functions."""
    return tuple(setter(None) for setter in _setters())


def restore(handlers: tuple[int | None, ...]) -> None:
    for setter, handler in zip(_setters(), handlers, strict=True):
        setter(handler)


@functools.cache
def _setters() -> tuple[Any, ...]:
    from PIL import _imaging

    try:
        library = ctypes.CDLL(_imaging.__file__)  # through which the libraries that it needs are seen
        setters = tuple(getattr(library, name) for name in _SETTERS)
    except (AttributeError, OSError):
        return ()
    for setter in setters:
        setter.restype, setter.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return setters
