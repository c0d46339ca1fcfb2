"""Uploading to the Hugging Face hub: a model folder of ours, with a model card where there is none."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitral.checkpoints.folder import load_checkpoint
from vitral.checkpoints.hub import CARD_FILE, PREFIX, explained, is_reference, parse
from vitral.runtime.errors import VitralError

# What of a model folder of ours is pushed: not what only a resume needs.
_PUSHED = ("config.json", "model.safetensors", "*.md", "recipe.toml", "summary.json", "parity.json")
# Licences that the hub knows by these names; others have to be called "other".
_LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail",
    "unlicense", "other",
)  # fmt: skip


def push(folder: Path, reference: str, *, private: bool = False) -> str:
    """Uploads a model folder, with a model card if neither it nor the hub has one.

    Returns:
        The repository's address.

    Raises:
        VitralError: if the folder holds no model of ours, or the hub refuses.
    """
    from huggingface_hub import HfApi

    repository, revision = parse(reference)
    config = folder / "config.json"
    if config.is_file():
        load_checkpoint(folder)  # a damaged model is not for others
    described = json.loads(config.read_bytes()) if config.is_file() else {}
    if not isinstance(described.get("architecture"), dict):
        raise VitralError(
            f"{folder} is not a model folder of Vitral; write one with: vitral convert {folder} OUT, and "
            "push OUT"
        )
    with explained(reference):
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
    """Writes what a model is, where its weights come from and how to use it, from its folder's config."""
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
    """Writes YAML as the hub reads it."""
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
    """Leaves out the folders of the machine that it was on."""
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
