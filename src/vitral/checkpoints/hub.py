"""The Hugging Face hub: ``hf://org/name[@revision]``, through huggingface_hub, its cache and its switches."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vitral.errors import VitralError

PREFIX = "hf://"
CARD_FILE = "README.md"
_SECONDS = 20.0  # to wait for the hub's first answer
_DESCRIPTIONS = ("config.json", "preprocessor_config.json", CARD_FILE)
# In the order of preference: a repository may hold the same weights in several formats.
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
    if not is_reference(reference) or repository.count("/") != 1 or not all(repository.split("/")):
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

    repository, revision = parse(reference)
    with _explained(reference):
        files = _files(repository, revision)
        if files is None:
            # What is in the cache is what was wanted when it was downloaded.
            patterns, local = list(_DESCRIPTIONS), True
        else:
            patterns, local = [*_DESCRIPTIONS, *_best_weights(reference, files)], False
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local)
        )


def _files(repository: str, revision: str | None) -> list[str] | None:
    """What the repository holds; None without a connection. Raises what the hub itself answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        return None
    try:
        # Unlike a listing of files, this is asked once, so that no connection is known at once.
        found = HfApi().model_info(repository, revision=revision, timeout=_SECONDS)
        return [file.rfilename for file in found.siblings or ()]
    except HfHubHTTPError:
        raise
    except Exception:  # of the connection; its kinds are those of the HTTP library of the day
        return None


def _best_weights(reference: str, files: list[str]) -> list[str]:
    """Of one format only, so that no weights are downloaded twice."""
    for names in _WEIGHTS:
        if any(fnmatch(file, names[0]) for file in files):
            return list(names)
    raise VitralError(f"{reference} holds no weights that Vitral reads; its files are {', '.join(files[:6])}")


def push(folder: Path, reference: str, *, private: bool = False) -> str:
    """Uploads a model folder, with a model card if it has none; gives the repository's address.

    Raises:
        VitralError: if the folder holds no model of ours, or the hub refuses.
    """
    from huggingface_hub import HfApi

    repository, revision = parse(reference)
    config = folder / "config.json"
    described = json.loads(config.read_bytes()) if config.is_file() else {}
    if "architecture" not in described or not isinstance(described["architecture"], dict):
        raise VitralError(
            f"{folder} is no model folder of Vitral's; write one with: vitral convert {folder} OUT, and push "
            "OUT"
        )
    with _explained(reference):
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        if not (folder / CARD_FILE).exists():
            card = model_card(described, repository).encode()
            api.upload_file(
                path_or_fileobj=card, path_in_repo=CARD_FILE, repo_id=repository, revision=revision
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            # Not what only a resume needs.
            allow_patterns=[
                "config.json",
                "model.safetensors",
                "*.md",
                "recipe.toml",
                "summary.json",
                "parity.json",
            ],
            commit_message="Upload a Vision Transformer with Vitral",
        )
    return str(address)


def model_card(config: Mapping[str, Any], repository: str) -> str:
    """What the model is, where its weights come from and how to use it, from a model folder's config."""
    architecture, metadata = config["architecture"], config.get("metadata") or {}
    labels, source = config.get("labels") or [], metadata.get("source") or metadata.get("base")
    front = ["---", "library_name: vitral", "tags:", "- vision-transformer"]
    front.append(f"pipeline_tag: {'image-classification' if labels else 'image-feature-extraction'}")
    if metadata.get("licence"):
        front.append(f"license: {metadata['licence']}")
    if source and is_reference(source):
        front.append(f"base_model: {parse(source)[0]}")
    height, width = architecture["img_size"]
    facts = {
        "images": f"{height}x{width} pixels in patches of {architecture['patch_size']}",
        "layers": f"{architecture['num_layers']} of width {architecture['embed_dim']}, "
        f"{architecture['num_heads']} heads",
        "preprocessing": ", ".join(f"{name} {value}" for name, value in config["preprocess"].items()),
        "classes": f"{len(labels)}: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}",
        "weights from": source,
        "licence of the weights": metadata.get("licence"),
    }
    rows = [
        f"| {name} | {value} |" for name, value in facts.items() if value and (labels or name != "classes")
    ]
    use = f'vitral.load("hf://{repository}").' + (
        'predict(["photo.jpg"])' if labels else 'features(["photo.jpg"])'
    )
    title = f"# {repository.split('/')[1]}\n\nA Vision Transformer, made with Vitral."
    code = f"```python\nimport vitral\n\n{use}\n```\n\n```\nvitral info hf://{repository}\n```"
    return "\n".join([*front, "---", "", title, "", "| | |", "| --- | --- |", *rows, "", code, ""])


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """What the hub or the network refuses, as one line that helps."""
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
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise VitralError(
                f"{reference}: the hub does not allow it; run hf auth login with a token that may"
            ) from error
        # Everything else comes from the connection, whose errors are those of the HTTP library of the day.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VitralError(
            f"{reference} cannot be reached: {reason}; check the connection and try again"
        ) from error
