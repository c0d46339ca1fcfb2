"""What the Hugging Face hub or the network refuses, in one line that helps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from vitral.runtime.errors import VitralError, one_line

_BUSY = (429, 500, 502, 503, 504)  # the hub's statuses when it cannot serve

T = TypeVar("T")


@contextmanager
def explained(reference: str) -> Iterator[None]:
    """Makes one line that helps of what the hub or the network refuses inside."""
    from huggingface_hub import errors

    try:
        yield
    except VitralError:
        raise
    except Exception as error:
        helpful = {
            errors.GatedRepoError: "is gated: accept its terms on its page, then run hf auth login",
            errors.RevisionNotFoundError: "is not there in that revision",
            errors.RepositoryNotFoundError: "is not on the hub, or private: check the name, or run "
            "hf auth login",
            errors.LocalEntryNotFoundError: "is not in the cache, and the hub is out of reach: check the "
            "connection, or unset HF_HUB_OFFLINE",
            errors.OfflineModeIsEnabled: "needs the hub, and HF_HUB_OFFLINE is set: unset it",
            errors.LocalTokenNotFoundError: "needs you to be logged in: run hf auth login",
        }
        for kind, text in helpful.items():
            if isinstance(error, kind):
                raise VitralError(f"{reference} {text}") from error
        raise VitralError(f"{reference} {_unforeseen(error)}") from error


def asked(ask: Callable[[], T]) -> T | None:
    """Give what the hub answers; None while it cannot be reached. Raises what the hub itself refuses."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        return None
    try:
        return ask()
    except HfHubHTTPError as error:
        if error.response.status_code in _BUSY:
            return None
        raise
    except ValueError:
        raise
    except Exception:  # of the connection; its kinds are those of the HTTP library of the day
        return None


def _unforeseen(error: Exception) -> str:
    """Says what to do about an error by where it comes from: the hub, this machine, or between them."""
    reason = one_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "is not open to you: run hf auth login with a token that may write there"
    if status is not None and status not in _BUSY:
        return f"is refused by the hub: {reason}"
    if isinstance(error, ValueError):
        return f"cannot be used: {reason}; check its name and the model card's first lines"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"cannot be kept or read on this machine: {reason}; check the space and rights of the cache"
    # The connection's errors are those of the HTTP library of the day.
    return f"cannot be reached: {reason}; check the connection and try again"
