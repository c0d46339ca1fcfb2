"""The Hugging Face hub: ``hf://org/name[@revision]``, through huggingface_hub, its cache and its switches."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from vitral.checkpoints.formats.damage import one_line
from vitral.runtime.errors import VitralError

PREFIX = "hf://"
CARD_FILE = "README.md"
_SECONDS = 20.0  # to wait for the hub's first response
_BUSY = (429, 500, 502, 503, 504)  # its statuses when it cannot serve
_DESCRIPTIONS = (
    "config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json",
    "vision_transformer.json", "vitral.json", CARD_FILE,
)  # fmt: skip
# In the order of preference: a repository may hold the same weights in several formats.
_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("open_clip_model.safetensors",),
    ("open_clip_pytorch_model.bin",),
    ("adapter_model.safetensors", "adapter_config.json"),
    ("adapter_model.bin", "adapter_config.json"),
    ("*.safetensors",),
    ("*.npz",),
    ("*.pth",),
    ("*.pt",),
)


def is_reference(source: str) -> bool:
    return source.startswith(PREFIX)


def parse(reference: str) -> tuple[str, str | None]:
    """Returns repository and revision. Raises VitralError if it is no ``hf://org/name[@revision]``."""
    repository, _, revision = reference.removeprefix(PREFIX).partition("@")
    if not is_reference(reference) or repository.count("/") != 1 or not all(repository.split("/")):
        raise VitralError(
            f"{reference} does not name a model on the hub; write hf://org/name or hf://org/name@revision"
        )
    return repository, revision or None


def download(reference: str) -> Path:
    """Returns the folder in the hub's cache, its files downloaded if they are not there.

    Raises:
        VitralError: if there is no such model, it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = parse(reference)
    with explained(reference):
        files = _files(repository, revision)
        offline = files is None

        def folder(patterns: list[str]) -> Path:
            return Path(
                snapshot_download(
                    repository, revision=revision, allow_patterns=patterns, local_files_only=offline
                )
            )

        if files is None:
            # What was wanted when it was downloaded, as far as it was.
            files = [path.name for path in folder([]).iterdir()]
            if not set(files) - set(_DESCRIPTIONS):
                raise LocalEntryNotFoundError(f"{reference} has no weights in the cache")
        return folder([*_DESCRIPTIONS, *_best_weights(reference, files)])


def _files(repository: str, revision: str | None) -> list[str] | None:
    """Lists the repository's files; None while it cannot be reached. Raises what the hub itself refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        return None
    try:
        # Unlike a listing of files, this is asked once, so that no connection is known at once.
        found = HfApi().model_info(repository, revision=revision, timeout=_SECONDS)
        return [file.rfilename for file in found.siblings or ()]
    except HfHubHTTPError as error:
        if error.response.status_code in _BUSY:
            return None
        raise
    except ValueError:
        raise
    except Exception:  # of the connection; its kinds are those of the HTTP library of the day
        return None


def _best_weights(reference: str, files: list[str]) -> list[str]:
    """Patterns of one format only, so that no weights are downloaded twice."""
    for names in _WEIGHTS:
        found = [file for file in files if "/" not in file and fnmatch(file, names[0])]
        if len(found) > 1:
            raise VitralError(
                f"{reference} holds {len(found)} files of weights, such as {', '.join(sorted(found)[:3])}; "
                "download one and give its path"
            )
        if found:
            return [escape(found[0]), *names[1:]]
    some = one_line(", ".join(files[:6]) or "none")
    raise VitralError(f"{reference} holds no weights that Vitral reads; its files are {some}")


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
            errors.GatedRepoError: "is gated: accept its terms on the model's page, then run hf auth login",
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
