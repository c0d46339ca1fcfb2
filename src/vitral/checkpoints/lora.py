"""peft's LoRA adapters (arXiv:2106.09685): the base model by its name, and what was learnt added to it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitral.checkpoints.formats.open import open_weights
from vitral.checkpoints.formats.weights import Weights, checked
from vitral.checkpoints.layouts.key_table import listing
from vitral.checkpoints.validate import read_json
from vitral.runtime.errors import VitralError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(\.default)?\.weight")
_REPLACED = re.compile(r"(.+?)(\.modules_to_save)?(\.default)?\.(weight|bias)")

# Modules as transformers calls them since version 5, and the keys on disk, which stayed.
_ON_DISK = (
    (r"(^|\.)layers\.(\d+)\.attention\.([qkv])_proj$", r"\1encoder.layer.\2.attention.attention.\3"),
    (r"(^|\.)layers\.(\d+)\.attention\.o_proj$", r"\1encoder.layer.\2.attention.output.dense"),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc1$", r"\1encoder.layer.\2.intermediate.dense"),
    (r"(^|\.)layers\.(\d+)\.mlp\.fc2$", r"\1encoder.layer.\2.output.dense"),
    (r"(^|\.)layers\.(\d+)\.(norm\d|layernorm_\w+)$", r"\1encoder.layer.\2.\3"),
)
_DINOV2_MLP = (r"(^|\.)layers\.(\d+)\.mlp\.(\w+)$", r"\1encoder.layer.\2.mlp.\3")
_PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def base_of(folder: Path, name: str) -> str:
    """Returns the name of the model that was adapted. Raises VitralError if the adapter does not tell it."""
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise VitralError(
            f"{name} is a LoRA adapter, and its {CONFIG_FILE} does not name its base model; pass base=MODEL, "
            f"as in vitral convert {name} OUT base=MODEL"
        )
    revision = read_json(folder / CONFIG_FILE).get("revision")
    if Path(base).exists() or base.startswith("hf://") or base.count("/") != 1:
        return base
    return f"hf://{base}" + (f"@{revision}" if revision else "")


class AdaptedWeights(Weights):
    """The base's tensors; to those that were adapted, the product of the factors is added."""

    def __init__(self, base: Weights, folder: Path) -> None:
        self._base = base
        self._settings = _settings(folder)
        file = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
        if file is None:
            raise VitralError(f"{folder} lacks {WEIGHTS_FILES[0]}; the adapter is incomplete")
        self._learnt = open_weights(file)
        self._factors: dict[str, dict[str, str]] = {}
        self._replaced: dict[str, str] = {}
        for name in self._learnt:
            self._place(name)
        half = [key for key, factors in self._factors.items() if len(factors) != 2]
        unknown = half + [key for key in self._factors if key not in base]
        if unknown:
            raise VitralError(f"{folder} adapts {listing(unknown)}, which {base.path} does not have")
        shapes = {name: base.shape(name) for name in base}
        shapes |= {name: self._learnt.shape(learnt) for name, learnt in self._replaced.items()}
        super().__init__(base.path, shapes)
        self.about, self.beside = base.about, base.beside

    def _place(self, name: str) -> None:
        plain = name.removeprefix(_PREFIX)
        if factor := _FACTOR.fullmatch(plain):
            self._factors.setdefault(f"{self._on_disk(factor[1])}.weight", {})[factor[2]] = name
        elif kept := _REPLACED.fullmatch(plain):
            self._replaced[f"{self._on_disk(kept[1])}.{kept[4]}"] = name
        else:
            raise VitralError(f"{self._learnt.path} holds {plain}, which is no factor of LoRA's")

    def _on_disk(self, module: str) -> str:
        """Returns the module's name among the base's keys."""
        if f"{module}.weight" in self._base:
            return module
        for pattern, disk in (*_ON_DISK, _DINOV2_MLP):
            found = re.sub(pattern, disk, module)
            found = re.sub(r"attention\.([qkv])$", lambda m: f"attention.{_PROJECTIONS[m[1]]}", found)
            if found != module and f"{found}.weight" in self._base:
                return found
        return module

    def __getitem__(self, name: str) -> Tensor:
        if name in self._replaced:
            return self._learnt[self._replaced[name]]
        if name not in self._factors:
            return self._base[name]
        tensor = self._base.temporary(name)
        down, up = (self._learnt[self._factors[name][letter]].float() for letter in "AB")
        if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != tuple(tensor.shape):
            raise VitralError(
                f"{self._learnt.path}: factors of {tuple(up.shape)} and {tuple(down.shape)} do not fit {name}"
            )
        change = up @ down * self._scale(down.shape[0])
        return checked(
            self.path, name, (tensor.float() + change).to(torch.promote_types(tensor.dtype, up.dtype))
        )

    def temporary(self, name: str) -> Tensor:
        own = name in self._factors or name in self._replaced
        return self[name] if own else self._base.temporary(name)

    def _scale(self, rank: int) -> float:
        alpha = self._settings["lora_alpha"]
        return alpha / rank**0.5 if self._settings.get("use_rslora") else alpha / rank


def _settings(folder: Path) -> Mapping[str, Any]:
    """Reads what the factors mean. Raises VitralError if they are of a kind that is not read."""
    found = read_json(folder / CONFIG_FILE)
    kind = found.get("peft_type")
    if kind != "LORA":
        raise VitralError(f"{folder} is an adapter of peft's {kind}; only LORA is read: merge it with peft")
    special = [
        name for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern") if found.get(name)
    ]
    if special:
        raise VitralError(f"{folder} uses {special[0]} of peft, which is not read: merge it with peft")
    alpha = found.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1e6:
        raise VitralError(f"{folder / CONFIG_FILE}: lora_alpha is {alpha!r}; it must be a number")
    return found
