"""Models on disk: a folder with ``config.json`` (what it is) and ``model.safetensors`` (the weights).

Nothing here executes what it reads, and files are replaced as a whole or not at all.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vitral.blocks import height_and_width
from vitral.config import build
from vitral.errors import VitralError
from vitral.model import VisionTransformer, ViTConfig
from vitral.positions import resize_grid
from vitral.preprocess import Preprocess

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_POSITIONS = "embedding.positions.table"


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that its use needs."""

    model: VisionTransformer
    preprocess: Preprocess
    labels: tuple[str, ...]  # empty for a model without a head
    metadata: dict[str, Any] = field(default_factory=dict)  # where it comes from, how data was split


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the two files into `folder`, making it if need be; each is replaced atomically."""
    from vitral import __version__

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(state))
    config = {
        "vitral": __version__,
        "architecture": asdict(checkpoint.model.config),
        "preprocess": asdict(checkpoint.preprocess),
        "labels": list(checkpoint.labels),
        "metadata": checkpoint.metadata,
    }
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())


def load_checkpoint(folder: Path | str, **overrides: Any) -> Checkpoint:
    """Reads a model folder.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``.
        overrides: fields of `ViTConfig` to change. For another ``img_size`` the position table is
            resized; another ``num_classes`` gives a fresh head, and no labels.

    Raises:
        VitralError: if the folder is no model folder, or a file in it is damaged or does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder)
    num_classes = overrides.pop("num_classes", None)
    asked = ", ".join(f"{name}={value}" for name, value in overrides.items())
    described = f"{folder / CONFIG_FILE}{asked and f' with {asked}'}"
    try:
        saved = build(ViTConfig, config["architecture"])
        wanted = replace(saved, **overrides)
        model = _without_weights(wanted)
        preprocess = build(Preprocess, config["preprocess"])
        labels, metadata = tuple(config["labels"]), dict(config["metadata"])
        if labels and len(labels) != saved.num_classes:
            raise ValueError(f"it has {len(labels)} labels for {saved.num_classes} classes")
        if preprocess.img_size != saved.img_size:
            raise ValueError(f"it prepares images of {preprocess.img_size} for a model of {saved.img_size}")
    except KeyError as error:
        raise VitralError(f"{described} cannot be used: it has no {error}") from error
    except (TypeError, ValueError, VitralError) as error:
        raise VitralError(f"{described} cannot be used: {error}") from error
    state = _read_weights(folder / WEIGHTS_FILE)
    if wanted.img_size != saved.img_size:
        preprocess = replace(preprocess, img_size=height_and_width(wanted.img_size))
        if _POSITIONS in state:
            at = model.embedding.positions
            prefix, patches = state[_POSITIONS][: at.prefix], state[_POSITIONS][at.prefix :]
            state[_POSITIONS] = torch.cat([prefix, resize_grid(patches, saved.grid, wanted.grid, at.resize)])
    problems = _misfits(model, state)
    if problems:
        raise VitralError(f"{folder / WEIGHTS_FILE} does not fit {described}: {'; '.join(problems)}")
    model.load_state_dict(state, assign=True)
    # Fixed positions are not in the file; they compute in the type of the weights that are.
    model.requires_grad_().to(next(model.parameters()).dtype)
    if num_classes is not None:
        model.replace_head(num_classes)
        labels = ()
    return Checkpoint(model, preprocess, labels, metadata)


def is_model_folder(path: Path | str) -> bool:
    return Path(path, CONFIG_FILE).is_file()


def _without_weights(architecture: ViTConfig) -> VisionTransformer:
    # On the meta device nothing is allocated or drawn that a file then replaces.
    with torch.device("meta"):
        return VisionTransformer.from_config(architecture).eval()


def _misfits(model: VisionTransformer, state: Mapping[str, Tensor]) -> list[str]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not of this model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    return sorted(problems)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = f"has no {CONFIG_FILE}" if folder.is_dir() else "does not exist"
        raise VitralError(
            f"{folder} {what}; a model is a folder that vitral train wrote, with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    try:
        config = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VitralError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise VitralError(f"{path} is no config of a Vitral model")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise VitralError(f"{path} is missing; the model folder is incomplete") from None
    except SafetensorError as error:
        raise VitralError(f"{path} is damaged or incomplete: {error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """`path` holds either what it held or all of `content`, whenever the process is killed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a model is as readable as any other file its user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
