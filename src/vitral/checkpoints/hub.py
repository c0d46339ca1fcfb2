"""The Hugging Face hub: ``hf://org/name[@revision]``, through huggingface_hub, its cache and its switches."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from vitral.checkpoints.files import one_line
from vitral.errors import VitralError

PREFIX = "hf://"
CARD_FILE = "README.md"
_SECONDS = 20.0  # to wait for the hub's first answer
_BUSY = (429, 500, 502, 503, 504)  # its answers when it cannot answer
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
# What of a model folder of ours is pushed: not what only a resume needs.
_PUSHED = ("config.json", "model.safetensors", "*.md", "recipe.toml", "summary.json", "parity.json")
# Licences that the hub knows by these names; others have to be called "other".
_LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail",
    "unlicense", "other",
)  # fmt: skip


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
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = parse(reference)
    with _explained(reference):
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
    """What the repository holds; None while it cannot be reached. Raises what the hub itself refuses."""
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


def push(folder: Path, reference: str, *, private: bool = False) -> str:
    """Uploads a model folder, with a model card if neither it nor the hub has one.

    Returns:
        The repository's address.

    Raises:
        VitralError: if the folder holds no model of ours, or the hub refuses.
    """
    from huggingface_hub import HfApi

    from vitral.checkpoints import load_checkpoint

    repository, revision = parse(reference)
    config = folder / "config.json"
    if config.is_file():
        load_checkpoint(folder)  # a damaged model is not for others
    described = json.loads(config.read_bytes()) if config.is_file() else {}
    if not isinstance(described.get("architecture"), dict):
        raise VitralError(
            f"{folder} is no model folder of Vitral's; write one with: vitral convert {folder} OUT, and push "
            "OUT"
        )
    with _explained(reference):
        api = HfApi()
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if not (folder / CARD_FILE).exists() and not api.file_exists(
            repository, CARD_FILE, revision=revision
        ):
            card = model_card(described, repository).encode()
            api.upload_file(
                path_or_fileobj=card, path_in_repo=CARD_FILE, repo_id=repository, revision=revision
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(_PUSHED),
            commit_message="Upload a Vision Transformer with Vitral",
        )
    return str(address)


def model_card(config: Mapping[str, Any], repository: str) -> str:
    """What the model is, where its weights come from and how to use it, from a model folder's config."""
    metadata, labels = config.get("metadata") or {}, config.get("labels") or []
    parts = [
        f"---\n{_front_matter(metadata, bool(labels))}---",
        f"# {repository.split('/')[1]}",
        "A Vision Transformer, made with Vitral.",
        _table(_facts(config)),
        "## Use",
        _use(repository, bool(labels)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(metadata: Mapping[str, Any], labelled: bool) -> str:  # noqa: FBT001
    """YAML, as the hub reads it."""
    source, licence = metadata.get("source"), metadata.get("licence")
    fields: dict[str, Any] = {
        "library_name": "vitral",
        "pipeline_tag": "image-classification" if labelled else "image-feature-extraction",
        "tags": ["vision-transformer", "vit"],
    }
    if licence:
        known = str(licence).lower() in _LICENCES
        fields |= (
            {"license": str(licence).lower()} if known else {"license": "other", "license_name": licence}
        )
    if isinstance(source, str) and is_reference(source):
        fields["base_model"] = parse(source)[0]
    # JSON is YAML, and quotes what a licence may be called.
    return "".join(f"{name}: {_plain(value)}\n" for name, value in fields.items())


def _plain(value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value)
    return value if plain else json.dumps(value)


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture, metadata = config["architecture"], config.get("metadata") or {}
    labels, (height, width) = config.get("labels") or [], architecture["img_size"]
    some = ", ".join(str(label) for label in labels[:10])
    shape = {name: architecture.get(name) for name in ("position", "pooling", "mlp_ratio")}
    return {
        "images": f"{height}x{width} pixels in patches of {architecture['patch_size']}",
        "layers": f"{architecture['num_layers']} of width {architecture['embed_dim']}, "
        f"{architecture['num_heads']} heads",
        **{name.replace("_", " "): value for name, value in shape.items() if value is not None},
        "preprocessing": ", ".join(f"{name} {value}" for name, value in config["preprocess"].items()),
        "classes": f"{len(labels)}: {some}{', ...' if len(labels) > 10 else ''}" if labels else None,
        "weights from": _public(metadata.get("source")) or "training from scratch",
        "trained on": _public(metadata.get("data")),
        "licence of the weights": metadata.get("licence") or "not stated",
    }


def _public(source: Any) -> str | None:
    """Without the folders of the machine that it was on."""
    return source if source is None or is_reference(str(source)) else Path(str(source)).name


def _table(facts: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        return " ".join(str(value).split()).replace("|", "\\|")

    rows = [f"| {name} | {cell(value)} |" for name, value in facts.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _use(repository: str, labelled: bool) -> str:  # noqa: FBT001
    reference = PREFIX + repository
    last = 'print(model.predict(["photo.jpg"])[0].top)' if labelled else 'model.features(["photo.jpg"])'
    what = (
        f"vitral predict {reference} photo.jpg" if labelled else f"vitral convert {reference} OUT --to timm"
    )
    return (
        f'```python\nimport vitral\n\nmodel = vitral.load("{reference}")\n{last}\n```\n\n'
        f"```shell\npip install vitral\nvitral info {reference}\n{what}\n```"
    )


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
        raise VitralError(f"{reference} {_unforeseen(error)}") from error


def _unforeseen(error: Exception) -> str:
    """What to do about an error by where it comes from: the hub, this machine, or between them."""
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
