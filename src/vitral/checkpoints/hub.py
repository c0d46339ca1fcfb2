"""The Hugging Face hub: ``hf://org/name[@revision]``, through huggingface_hub and its cache."""

from pathlib import Path

from vitral.errors import VitralError

PREFIX = "hf://"
# Weights in the order of preference; a repository may hold the same ones in several formats.
_DESCRIPTIONS = ("config.json", "preprocessor_config.json", "README.md")
_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("open_clip_model.safetensors",),
    ("*.npz",),
    ("*.pth",),
)


def is_reference(source: str) -> bool:
    return source.startswith(PREFIX)


def parse(reference: str) -> tuple[str, str | None]:
    """Repository and revision. Raises VitralError if it is no ``hf://org/name[@revision]``."""
    repository, _, revision = reference.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise VitralError(
            f"{reference} is no model on the hub; write hf://org/name or hf://org/name@revision"
        )
    return repository, revision or None


def download(reference: str) -> Path:
    """The folder in the hub's cache, its files downloaded if they are not there.

    Raises:
        VitralError: if there is no such model, it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = parse(reference)
    try:
        wanted = [*_DESCRIPTIONS, *_best_weights(repository, revision)]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise VitralError(
            f"{reference} is gated: accept its terms at the model's page on the hub, then run hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise VitralError(f"{reference}: there is no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise VitralError(
            f"{reference}: there is no such model on the hub, or it is private; check the name, or run hf auth login"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise VitralError(
            f"{reference} is not in the cache, and the hub cannot be reached; check the connection, or unset "
            "HF_HUB_OFFLINE"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise VitralError(f"{reference} cannot be downloaded: {str(error).splitlines()[0]}") from error


def _best_weights(repository: str, revision: str | None) -> tuple[str, ...]:
    """The files of one format, so that no weights are downloaded twice; all known ones without a connection."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import OfflineModeIsEnabled

    everything = tuple(name for names in _WEIGHTS for name in names)
    if HF_HUB_OFFLINE:
        return everything
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
    except (OfflineModeIsEnabled, ConnectionError):
        return everything
    for names in _WEIGHTS:
        if any(fnmatch(file, names[0]) for file in files):
            return names
    raise VitralError(f"{PREFIX}{repository} holds no weights; its files are {', '.join(files[:6])}")
