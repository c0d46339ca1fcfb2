"""Checkpoints of other libraries: opened, understood by a layout, and made a checkpoint of ours."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitral.checkpoints import hub, lora, sidecar, validate
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.fit import PATCHES, empty_model, fill, told
from vitral.checkpoints.formats.damage import ENDINGS
from vitral.checkpoints.formats.open import open_weights
from vitral.checkpoints.layouts import key_table
from vitral.checkpoints.layouts.authors import OPEN_CLIP_FILE
from vitral.checkpoints.layouts.layout import RawCheckpoint, Reading
from vitral.checkpoints.layouts.registry import LAYOUTS
from vitral.checkpoints.layouts.transformers.preprocessing import PREPROCESSOR_FILE, PROCESSOR_FILE
from vitral.checkpoints.prefixes import strip_prefixes
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.errors import VitralError, one_line
from vitral.runtime.settings import deep_merge

CONFIG_FILE = "config.json"  # of ours, of timm's and of transformers'
WEIGHTS_FILE = "model.safetensors"
NOT_A_MODEL = (
    f"a model is a folder that vitral train wrote, with {CONFIG_FILE} and {WEIGHTS_FILE}, a checkpoint of "
    "another library, or hf://org/name"
)
_WEIGHTS_IN_FOLDERS = (
    WEIGHTS_FILE, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
_MAX_FRONT = 2**16  # characters of a model card, whose front matter is its first lines


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Tells whether a ``config.json`` is one of transformers' or timm's."""
    return "model_type" in config or isinstance(config.get("architecture"), str)


def load_foreign(name: str, path: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Loads a file or a folder of another library; see `load_checkpoint`."""
    return _load(_open(name, path), overrides)


def load_adapted(name: str, folder: Path, overrides: dict[str, Any], base: str | None) -> Checkpoint:
    """Loads the model that a LoRA adapter adapts, `base` or the one that it names, and adds the adapter."""
    base = base or lora.base_of(folder, name)
    path = hub.download(base) if hub.is_reference(base) else Path(base)
    if not path.exists():
        raise VitralError(f"{name} is a LoRA adapter of {base}, which is not there; pass base=MODEL")
    config = validate.read_json(path / CONFIG_FILE) if path.is_dir() else {}
    if path.is_dir() and (find_weights(path) is None or not is_foreign(config)):
        raise VitralError(f"{name} is a LoRA adapter of {base}, which peft does not adapt")
    raw = _open(name, path)
    return _load(replace(raw, weights=lora.AdaptedWeights(raw.weights, folder)), overrides)


# --- Opening -------------------------------------------------------------------------------------


def _open(name: str, path: Path) -> RawCheckpoint:
    weights = find_weights(path) if path.is_dir() else path
    assert weights is not None
    config = validate.read_json(path / CONFIG_FILE) if path.is_dir() else {}
    opened = strip_prefixes(open_weights(weights), described=bool(config))
    kept = sidecar.read(weights)
    if path.is_file():
        return RawCheckpoint(name, path, opened, sidecar=kept)
    open_clip = validate.read_json(path / OPEN_CLIP_FILE)
    return RawCheckpoint(name, path, opened, config, _preprocessor(path), _licence(path), open_clip, kept)


def find_weights(folder: Path) -> Path | None:
    """Finds the weights of a foreign folder: by their usual name, or the only file of weights there."""
    for name in _WEIGHTS_IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    files = [file for file in folder.iterdir() if file.is_file() and file.name.endswith(ENDINGS)]
    return files[0] if len(files) == 1 else None


def _preprocessor(folder: Path) -> Mapping[str, Any]:
    """Reads how images are prepared, from whichever file the library's version keeps it in."""
    processors = validate.read_json(folder / PROCESSOR_FILE)
    found = processors.get("image_processor")
    return found if isinstance(found, Mapping) else validate.read_json(folder / PREPROCESSOR_FILE)


def _licence(folder: Path) -> str | None:
    """Reads the model card's front matter."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(_MAX_FRONT), re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


# --- Understanding -------------------------------------------------------------------------------


def _load(raw: RawCheckpoint, overrides: dict[str, Any]) -> Checkpoint:
    described, layout, reading = _read(raw, overrides)
    overrides.pop("preprocess", None)
    try:
        found, state = _understood(raw, overrides, described, reading)
    except (TypeError, ValueError) as error:
        raise VitralError(f"{described}, cannot be used: {one_line(error)}") from error
    except VitralError as error:
        beside = ". To read the backbone without what is beside it, pass num_classes=0"
        message = str(error) if described in str(error) else f"{described}: {error}"
        raise VitralError(message + (beside if raw.weights.beside else "")) from error
    found = replace(found, metadata=_metadata(raw, layout, reading))
    return fill(raw.sidecar.complete(found), state, overrides, described, raw.name)


def _read(raw: RawCheckpoint, overrides: dict[str, Any]) -> tuple[str, str, Reading]:
    """Returns what messages call the checkpoint, its layout's name, and what the layout makes of it."""
    layout = next((layout for layout in LAYOUTS if layout.recognizes(raw)), None)
    if layout is None and PATCHES in raw.weights:
        raise VitralError(f"{raw.name} has no {CONFIG_FILE}; {NOT_A_MODEL}")
    if layout is None:
        some = key_table.listing(list(raw.weights))
        raise VitralError(f"{raw.name} is in no layout that Vitral reads; its keys are such as {some}")
    described = f"{raw.name}, read as {layout.name}'s layout{told(overrides)}"
    try:
        return described, layout.name, layout.read(raw, overrides)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        # A config of another program's, or keys without their usual neighbours.
        raise VitralError(f"{described}, cannot be used: {type(error).__name__} {one_line(error)}") from error


def _understood(
    raw: RawCheckpoint, overrides: Mapping[str, Any], described: str, reading: Reading
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Makes a checkpoint whose model is empty yet, and its weights under our names."""
    sizes = {"img_size", "patch_size", "num_classes"}
    asked = {name: value for name, value in overrides.items() if name not in sizes}
    saved = ViTConfig(**deep_merge(reading.draft, asked))
    validate.refuse_costly(described, saved, reading.weights)
    # A head of another kind than Vitral's is no loss to who asks for another.
    optional = raw.weights.beside if "num_classes" in overrides else ()
    state = key_table.read(reading.rows(saved), reading.weights, saved.num_layers, reading.ignored, optional)
    prepared = reading.preprocess(height_and_width(saved.img_size)).for_channels(saved.in_channels)
    preprocess = validate.preprocess(prepared)
    labels = validate.foreign_labels(reading.labels) if saved.num_classes and saved.head.bias else ()
    saved, labels = _as_classifier(saved, state, labels, reading)
    model = empty_model(described, saved)
    return Checkpoint(model, preprocess, labels, multi_label=reading.multi_label, notes=reading.notes), state


def _as_classifier(
    saved: ViTConfig, state: dict[str, Tensor], labels: tuple[str, ...], reading: Reading
) -> tuple[ViTConfig, tuple[str, ...]]:
    """Returns the config and the labels of a head that is read as a classifier's.

    A head of one number z says yes with probability sigmoid(z): it is one of two, with logits 0 and z.
    The numbers of a regression have no labels.
    """
    if reading.regression:
        return saved, ()
    if len(labels) != 1 or reading.multi_label:
        return saved, labels
    for name in [name for name in state if name.startswith(("head.", "distillation_head."))]:
        state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
    numbered = labels == ("class 0",)
    return replace(saved, num_classes=2), ("no", "yes") if numbered else (f"not {labels[0]}", labels[0])


def _metadata(raw: RawCheckpoint, layout: str, reading: Reading) -> dict[str, Any]:
    """Tells where the weights come from; what a sidecar says of it comes first."""
    kept = raw.sidecar.metadata
    about = raw.config.get("pretrained_cfg")
    stated = about.get("license") if isinstance(about, Mapping) else None
    return {
        **kept,
        "source": raw.name,
        "layout": layout,
        "licence": raw.licence or stated or kept.get("licence"),
        "origin": kept.get("origin") or {"layout": layout, **reading.origin},
        **({"regression": True} if reading.regression else {}),
    }
