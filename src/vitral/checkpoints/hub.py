"""The Hugging Face hub: ``hf://org/name[@revision]``, through huggingface_hub, its cache and its switches."""

from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from vitral.runtime.errors import VitralError, one_line
from vitral.runtime.hub import asked, explained

PREFIX = "hf://"
CARD_FILE = "README.md"
_SECONDS = 20.0  # to wait for the hub's first response
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

    # Unlike a listing of files, this is asked once, so that no connection is known at once.
    found = asked(lambda: HfApi().model_info(repository, revision=revision, timeout=_SECONDS))
    return None if found is None else [file.rfilename for file in found.siblings or ()]


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
