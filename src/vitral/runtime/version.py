"""Which Vitral this is."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

FROM_SOURCE = "0+source"


def vitral_version() -> str:
    """The installed version; "0+source" where Vitral runs from a checkout that was never installed."""
    try:
        return version_of("vitral")
    except PackageNotFoundError:
        return FROM_SOURCE
