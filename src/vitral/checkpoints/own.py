"""Models that are a user's own code: our folder keeps their weights, and of the code the class's name."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from vitral.checkpoints.checkpoint import Checkpoint
from vitral.checkpoints.formats.damage import reading
from vitral.checkpoints.formats.weights import Weights
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError, one_line

_CLASS = "module"  # of "architecture" in ``config.json``


def architecture(model: nn.Module) -> dict[str, Any]:
    """Returns what ``config.json`` says of a model: every field of ours, of another the name of its class."""
    if type(model) is VisionTransformer:
        return asdict(model.config)
    return {_CLASS: type(model).__name__}


def refuse_without_module(config: Mapping[str, Any], described: str) -> None:
    """Raises VitralError if a config describes a user's own class, of which no file has the code."""
    described_by = config.get("architecture")
    if isinstance(described_by, Mapping) and _CLASS in described_by:
        new = f"model={described_by[_CLASS]}(...)"
        raise VitralError(
            f"{described} is of the module {described_by[_CLASS]} of your own code; in Python, pass one: "
            f"vitral.load(FOLDER, {new}), or to resume vitral.train(DATA, FOLDER, {new}, resume=True)"
        )


def filled(found: Checkpoint, weights: Weights) -> Checkpoint:
    """Puts weights into a module of the user's, in place.

    Raises:
        VitralError: if they are not of this module.
    """
    # Buffers may be numbers that no weights are: a count of batches, a mask of infinity.
    with reading(weights.path):
        state = safetensors.torch.load_file(weights.path)
    try:
        found.model.load_state_dict(state)
    except RuntimeError as error:
        reason = one_line(" ".join(str(error).split()))
        raise VitralError(f"{weights.path} does not fit {type(found.model).__name__}: {reason}") from error
    return replace(found, model=found.model.eval())


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives each tensor contiguous memory of its own, as safetensors needs it; tied weights are copied."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return found
