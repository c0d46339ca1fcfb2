"""One way in, whatever a checkpoint is, and our own model folder.

Ours is a folder with ``config.json`` (what it is) and ``model.safetensors`` (the weights). Those of other
libraries are read in `foreign`. Nothing here executes what it reads, and a file is replaced as a whole
(`runtime.files`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from vitral.artifacts.manifest import is_artifact
from vitral.checkpoints import hub, lora, own, validate
from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.fit import empty_model, fill, told
from vitral.checkpoints.foreign import (
    CONFIG_FILE,
    NOT_A_MODEL,
    WEIGHTS_FILE,
    find_weights,
    is_foreign,
    load_adapted,
    load_foreign,
)
from vitral.checkpoints.formats.damage import ENDINGS, printable
from vitral.checkpoints.formats.open import open_weights
from vitral.checkpoints.formats.weights import Weights
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError, one_line
from vitral.runtime.files import write_atomically
from vitral.runtime.settings import build, deep_merge
from vitral.runtime.version import vitral_version


def load_checkpoint(source: Path | str, **overrides: Any) -> Checkpoint:
    """Loads a checkpoint of any layout that Vitral reads.

    Args:
        source: a folder of ours, or of timm's or transformers' hub layout; a file of Google's (.npz),
            torchvision's or a model's authors' (.safetensors, .pth, .bin); a folder of peft's with a LoRA
            adapter; ``hf://org/name[@revision]``.
        overrides: fields of `ViTConfig` to change, groups as mappings. For another ``img_size`` or
            ``patch_size`` positions and patches are resized; another ``num_classes`` gives a fresh head,
            and no labels. Further ``preprocess``, a mapping of fields of `Preprocess`, ``base``, the
            model of an adapter that does not name it, and ``model``, a module that takes the weights of a
            folder of ours.

    Raises:
        VitralError: if there is no model there, or a file is damaged or does not fit.
    """
    name = str(source)
    prepared, base = overrides.get("preprocess"), overrides.pop("base", None)
    module = overrides.pop("model", None)
    try:
        path = hub.download(name) if hub.is_reference(name) else Path(source)
        if is_artifact(path):
            raise VitralError(
                f"{name} is an artifact of `vitral export`; predict, eval, doctor, bench, serve and verify "
                "take it, all else needs the model that it was made from"
            )
        if not path.exists():
            raise VitralError(f"{name} does not exist; {NOT_A_MODEL}")
        found = _load(name, path, overrides, base) if module is None else _load_into(module, path, overrides)
        if prepared:
            changed = build(Preprocess, deep_merge(asdict(found.preprocess), prepared))
            found = replace(found, preprocess=validate.preprocess(changed))
        return found
    except VitralError as error:
        raise VitralError(printable(error)) from error
    except OSError as error:
        raise VitralError(f"{name} cannot be read: {error.strerror or one_line(error)}") from error
    # A config of other types, or tensors of other shapes, than its layout has: almost anything.
    except Exception as error:
        reason = f"{type(error).__name__} {one_line(error)}"
        raise VitralError(f"{name} cannot be used, its config or weights are damaged: {reason}") from error


def _load(name: str, path: Path, overrides: dict[str, Any], base: str | None) -> Checkpoint:
    if path.is_file():
        return load_foreign(name, path, overrides)
    if lora.is_adapter(path):
        return load_adapted(name, path, overrides, base)
    config = validate.read_json(path / CONFIG_FILE)
    if find_weights(path) is None or (is_model_folder(path) and not is_foreign(config)):
        overrides.pop("preprocess", None)
        return _load_ours(path, config, overrides)
    return load_foreign(name, path, overrides)


def is_checkpoint(source: Path | str) -> bool:
    """Tells whether `source` names something to load rather than a variant such as "ViT-B/16"."""
    path = Path(source)
    if hub.is_reference(str(source)) or (path.is_file() and path.name.endswith(ENDINGS)):
        return True
    return path.is_dir() and (is_model_folder(path) or find_weights(path) is not None)


def is_model_folder(path: Path | str) -> bool:
    return Path(path, CONFIG_FILE).is_file()


# --- Ours ----------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the two files into `folder`, making it if need be; each is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    state = own.unshared(checkpoint.model.state_dict())
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(state))
    write_atomically(folder / CONFIG_FILE, description(checkpoint).encode())


def description(checkpoint: Checkpoint) -> str:
    """Returns all but the weights, as the text of ``config.json``."""
    config = {
        "vitral": vitral_version(),
        "architecture": own.architecture(checkpoint.model),
        "preprocess": checkpoint.preprocess.record(),
        "labels": list(checkpoint.labels),
        "temperature": checkpoint.temperature,
        "multi_label": checkpoint.multi_label,
        "metadata": checkpoint.metadata,
    }
    return json.dumps(config, indent=1, allow_nan=False) + "\n"


def _load_ours(folder: Path, config: Mapping[str, Any], overrides: dict[str, Any]) -> Checkpoint:
    weights = _our_weights(folder)
    described = f"{folder / CONFIG_FILE}{told(overrides)}"

    def build_model(architecture: ViTConfig) -> VisionTransformer:
        validate.refuse_costly(described, architecture, weights)
        return empty_model(described, architecture)

    found = described_checkpoint(config, described, build_model)
    return fill(found, dict(weights), overrides, described, str(weights.path))


def _load_into(module: nn.Module, folder: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """Loads our folder's weights into a module that the user passed."""
    if other := sorted(overrides.keys() - {"preprocess"}):
        raise VitralError(f"{other[0]} is for a model that Vitral builds, and one was passed; leave it out")
    weights, described = _our_weights(folder), str(folder / CONFIG_FILE)
    found = described_checkpoint(validate.read_json(folder / CONFIG_FILE), described, module=module)
    return own.filled(found, weights)


def _our_weights(folder: Path) -> Weights:
    if not is_model_folder(folder):
        raise VitralError(f"{folder} has no {CONFIG_FILE}; {NOT_A_MODEL}")
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise VitralError(f"{path} is missing; the model folder is incomplete")
    return open_weights(path)


def described_checkpoint(
    config: Mapping[str, Any],
    described: str,
    build_model: Callable[[ViTConfig], VisionTransformer] = VisionTransformer.from_config,
    module: nn.Module | None = None,
) -> Checkpoint:
    """Makes the checkpoint that a ``config.json`` describes, with `module` or a model from `build_model`.

    Args:
        config: what `description` wrote, parsed.
        described: what messages call it.
        build_model: makes the model of an architecture.
        module: the model, if the user passed one.

    Raises:
        VitralError: if something is missing or unfit, or the model is the user's own and was not passed.
    """
    if module is None:
        own.refuse_without_module(config, described)
    try:
        saved = build(ViTConfig, config["architecture"]) if module is None else None
        preprocess = validate.preprocess(build(Preprocess, config["preprocess"]))
        labels, metadata = validate.labels(config["labels"]), validate.training(config["metadata"])
        temperature = validate.temperature(config.get("temperature", 1.0))
        multi_label = validate.flag("multi_label", config.get("multi_label", False))
    except KeyError as error:
        raise VitralError(f"{described} cannot be used: it has no {error}") from error
    except (TypeError, ValueError, VitralError) as error:
        raise VitralError(f"{described} cannot be used: {error}") from error
    model: Any = build_model(saved) if saved else module
    return Checkpoint(model, preprocess, labels, metadata, temperature, multi_label)
