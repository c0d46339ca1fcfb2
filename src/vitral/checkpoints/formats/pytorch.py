"""PyTorch's own files, through `torch.load` with `weights_only`, memory-mapped where that can be."""

import argparse
import io
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vitral.checkpoints.formats.damage import ZIP, damaged, first_bytes, reading, refuse_repeated
from vitral.checkpoints.formats.weights import FileWeights, checked
from vitral.runtime.errors import VitralError, one_line

# The names under which training code saves a model beside its optimizer, the one to use first.
_WRAPPERS = ("teacher", "target_encoder", "model_ema", "model", "module", "state_dict", "encoder")
_HEADS = ("head", "classifier", "fc")  # a mapping of its own beside them
_MAX_PASSED = 2**25  # bytes of tensors that were copied into others, and are in memory all the same
_MAX_WRAPPERS = 8  # one in another; a pickle may hold a dict that holds itself


@dataclass(frozen=True)
class Saved:
    """What a pickle holds of a model."""

    tensors: dict[str, Tensor]
    about: Mapping[str, Any]  # `Weights.about`


class PickledWeights(FileWeights):
    """The tensors of a pickle, each kept until it is taken; asked for again, it is read again."""

    def __init__(self, path: Path, find: Callable[[Path, Any], Saved]) -> None:
        """Reads the pickle; `find` takes the model's tensors out of its content."""
        self._load = lambda: _load(path, find)
        saved = self._load()
        self._tensors, self.about = saved.tensors, saved.about
        self._passing, self._passed = dict[str, Tensor](), 0
        super().__init__(path, {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()})

    def _read(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors = self._load().tensors
        return self._tensors.pop(name).detach()

    def temporary(self, name: str) -> Tensor:
        # On a second map, which is exchanged for a new one when much of it is in memory.
        if first_bytes(self.path)[:4] != ZIP:
            return self[name]
        if name not in self._passing or self._passed > _MAX_PASSED:
            self._passing, self._passed = self._load().tensors, 0
        tensor = self._passing.pop(name).detach()
        self._passed += tensor.nbytes
        return checked(self.path, name, tensor)


def _load(path: Path, find: Callable[[Path, Any], Saved]) -> Saved:
    """Reads a pickle of tensors and plain values, and nothing else."""
    # The format of before PyTorch 1.6 cannot be mapped; it is read whole.
    mapped = first_bytes(path)[:4] == ZIP
    with reading(path):
        records = _records(path) if mapped else None
        _refuse_growth(path)
    # argparse.Namespace, which training scripts save their settings in, holds plain values.
    with reading(path), torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise _explained(path, error) from error
    saved = find(path, content)
    if records is not None:
        _refuse_other_lengths(path, saved.tensors, records)
    return saved


def _explained(path: Path, error: pickle.UnpicklingError) -> VitralError:
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        return VitralError(
            f"{path} holds {one_line(unsafe[1])}, which loading would have to execute; "
            "save its state_dict with safetensors"
        )
    # The rest of PyTorch's message tells how to switch the check off.
    reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
    return damaged(path, reason[1] if reason else "it is no pickle of tensors")


# --- What torch.load takes -----------------------------------------------------------------------


def _records(path: Path) -> Counter[int]:
    """Counts the lengths of a zip archive's records. Raises if it is none that PyTorch writes."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    refuse_repeated(path, [member.filename for member in members])
    for member in members:
        if member.filename.endswith("/constants.pkl"):
            raise VitralError(f"{path} is a TorchScript archive, which holds code; save its state_dict()")
        # torch.load maps the compressed bytes as if they were numbers.
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed, which PyTorch never does")
    return Counter(member.file_size for member in members)


def _refuse_other_lengths(path: Path, tensors: Mapping[str, Tensor], records: Counter[int]) -> None:
    """Raises VitralError unless each storage is as long as a record.

    On a map, torch.load goes on into the next record where one is shorter than its tensor.
    """
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    lengths = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    wrong = Counter(lengths.values()) - records
    if wrong:
        raise damaged(path, f"it has no record of {min(wrong)} bytes")


# What PyTorch's unpickler calls, and may give gigabytes for a few bytes: bytearray(n), nested "hex"
# encodings, a tensor of lists in lists. A state dict holds none of them. Measured (torch 2.14): files of less
# than 1,500 bytes take 2.1 GB, 1.3 GB and, for 10**8 numbers, 31 seconds.
_GROWING = ("builtins bytearray", "__builtin__ bytearray", "_codecs encode", "torch Tensor")
_REBUILT = "torch._tensor _rebuild_from_type_v2"  # takes the type of a tensor as an argument
_PICKLES = 5  # in a row, in files of before PyTorch 1.6


def _refuse_growth(path: Path) -> None:
    """Raises ValueError if a pickle asks for memory that does not depend on the file's size."""
    if first_bytes(path)[:4] == ZIP:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            streams: list[IO[bytes]] = [io.BytesIO(archive.read(name)) for name in pickles[:1]]
    else:
        streams = [path.open("rb")]
    for stream in streams:
        with stream:
            names = _globals(stream)
        growing = [name for name in names if name in _GROWING]
        if growing and not (growing == ["torch Tensor"] and _REBUILT in names):
            raise ValueError(f"it makes a {growing[0].split()[-1]}, which a state_dict does not hold")


def _globals(stream: IO[bytes]) -> set[str]:
    """Returns the names that pickles refer to, as far as they can be read."""
    names: set[str] = set()
    try:
        for _ in range(_PICKLES):
            names |= {str(value) for code, value, _ in pickletools.genops(stream) if code.name == "GLOBAL"}
    except (ValueError, IndexError, UnicodeError):
        pass  # the end of the pickles, or damage: PyTorch's own reader stops there too
    return names


# --- What a pickle holds -------------------------------------------------------------------------


def model_in(path: Path, content: Any) -> Saved:
    """Finds the model's tensors in what training code saves them in and under.

    Raises:
        VitralError: if there are none.
    """
    about = _about(content)
    heads: dict[str, Any] = {}
    for _ in range(_MAX_WRAPPERS):
        inner = None
        if isinstance(content, Mapping):
            inner = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        heads |= {name: content[name] for name in _HEADS if isinstance(content.get(name), Mapping)}
        content = content[inner]
    # {"model": ..., "head": ...}: the head's names begin with its own.
    beside = {f"{head}.{name}": x for head, tensors in heads.items() for name, x in tensors.items()}
    return replace(state_dict(path, {**content, **beside} if beside else content), about=about)


def _about(content: Any) -> dict[str, Any]:
    """Returns the architecture's name and the settings that timm's training script saves."""
    if not isinstance(content, Mapping) or not isinstance(content.get("arch"), str):
        return {}
    settings = content.get("args")
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    return {"arch": content["arch"], "args": dict(settings) if isinstance(settings, Mapping) else {}}


def state_dict(path: Path, content: Any) -> Saved:
    """Takes the tensors of a mapping. Raises VitralError if there are none, or not as weights are saved."""
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}
    if not tensors:
        raise VitralError(f"{path} holds no tensors by name; save a model's state_dict()")
    for name, tensor in tensors.items():
        # torch.load gives an expanded tensor of a few bytes that claims terabytes.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise damaged(path, f"{name} of shape {tuple(tensor.shape)} is larger than what is stored of it")
    return Saved(tensors, {})
