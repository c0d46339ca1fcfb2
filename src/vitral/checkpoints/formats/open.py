"""From a path to weights: one file, or the shards that an index lists."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitral.checkpoints.formats.damage import (
    AGAIN,
    ENDINGS,
    NUMPY,
    PICKLED,
    SAFETENSORS,
    damaged,
    one_line,
    refuse_pointer,
)
from vitral.checkpoints.formats.npz import MAY_BE_ZEROS, NpzWeights
from vitral.checkpoints.formats.pytorch import PickledWeights, Saved, model_in, state_dict
from vitral.checkpoints.formats.safetensors import SafetensorsWeights
from vitral.checkpoints.formats.weights import Shards, Weights
from vitral.runtime.errors import VitralError

_MAX_NAME = 250  # characters; names stand in messages
_MAX_EMPTY = 2**16  # a side of a tensor without numbers


def open_weights(path: Path) -> Weights:
    """Opens a file of weights, or the shards that ``*.index.json`` lists.

    Raises:
        VitralError: if the file is missing, damaged, of an unknown kind, or would have to execute code.
    """
    if not path.is_file():
        raise VitralError(f"{path} is missing")
    return _open_shards(path) if path.name.endswith(".index.json") else _open_file(path, model_in)


def _open_file(path: Path, find: Callable[[Path, Any], Saved]) -> Weights:
    refuse_pointer(path)
    if path.suffix == SAFETENSORS:
        weights: Weights = SafetensorsWeights(path)
    elif path.suffix == NUMPY:
        weights = NpzWeights(path)
    elif path.suffix in PICKLED:
        weights = PickledWeights(path, find)
    else:
        raise VitralError(f"{path} is not a file of weights; those end in {', '.join(ENDINGS)}")
    size = path.stat().st_size
    for name in weights:
        if len(name) > _MAX_NAME or not name.isprintable():
            raise damaged(path, f"it names a tensor {name[:40]!a}")
        # Only what is empty can have a side longer than the file (or, compressed, than what zeros shrink to).
        shape = weights.shape(name)
        if max(shape, default=0) > (_MAX_EMPTY if 0 in shape else max(size, MAY_BE_ZEROS)):
            raise damaged(path, f"{name} of shape {shape} holds nothing")
    return weights


def _open_shards(index: Path) -> Weights:
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(files.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VitralError(f"{index} is no index of shards: {one_line(error)}; {AGAIN}") from error
    if outside:
        raise VitralError(f"{index} names {one_line(outside[0])!r}, which is not beside it; {AGAIN}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent or not names:
        lacking = f"{len(absent)} of {len(names)} shards, such as {one_line((absent or ['any'])[0])}"
        raise VitralError(f"{index.parent} lacks {lacking}; the download is incomplete: {AGAIN}")
    weights = Shards(index, [_open_file(index.parent / name, state_dict) for name in names])
    missing = files.keys() - set(weights)
    if missing:
        raise VitralError(f"{index} names {one_line(min(missing))}, which is in no shard; {AGAIN}")
    return weights
