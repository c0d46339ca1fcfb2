"""Files of weights, read without executing anything and without holding them twice.

`open_weights` gives a mapping whose tensors are read when they are asked for: safetensors (one file or
shards) and PyTorch's own files from a memory map, Google's .npz an array at a time.
"""

import argparse
import json
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitral.errors import VitralError

SAFETENSORS = ".safetensors"
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
NUMPY = ".npz"
ENDINGS = (SAFETENSORS, *PICKLED, NUMPY)

# The names under which training code saves a model beside its optimizer, the one to use first.
_WRAPPERS = ("teacher", "target_encoder", "model_ema", "model", "module", "state_dict", "encoder")
# Names that wrap every key of a model.
_PREFIXES = ("module.", "backbone.", "_orig_mod.", "encoder.module.")
# Deflate reaches a thousandfold on zeros only; weights hardly shrink.
_MAX_RATIO = 100


class Weights(Mapping[str, Tensor]):
    """Tensors by name, read when asked for; shapes are known before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """Raises VitralError unless the tensor holds finite floating-point numbers."""
        if not tensor.is_floating_point():
            raise VitralError(f"{self.path}: {name} is {tensor.dtype}, weights are floating-point numbers")
        # A sum is finite only if all its terms are; the slow test is for sums that overflow.
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise VitralError(f"{self.path}: {name} holds NaN or infinity; the file is damaged")
        return tensor


class SafetensorsWeights(Weights):
    """One file, or the shards that an index names."""

    def __init__(self, path: Path, shards: list[Path]) -> None:
        super().__init__(path)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for shard in shards:
            _check_header(shard)
            try:
                file = safe_open(shard, "pt")
            except (SafetensorError, OSError) as error:
                raise VitralError(f"{shard} is damaged or incomplete: {error}") from error
            for name in file.keys():  # noqa: SIM118 - no mapping
                self._files[name] = file
                self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self.checked(name, self._files[name].get_tensor(name))


class TensorWeights(Weights):
    """Tensors that are memory-mapped already, such as those of torch.load(mmap=True)."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(path)
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.checked(name, self._tensors[name])


class Renamed(Weights):
    """Weights under other names; a name may stand for one layer of a tensor that holds all layers."""

    def __init__(self, weights: Weights, names: Mapping[str, str | tuple[str, int]]) -> None:
        super().__init__(weights.path)
        self._weights = weights
        self._names = {new: (old, None) if isinstance(old, str) else old for new, old in names.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        old, layer = self._names[name]
        return self._weights.shape(old)[0 if layer is None else 1 :]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        old, layer = self._names[name]
        return self._weights[old] if layer is None else self._weights[old][layer]


class NumpyWeights(Weights):
    """Google's .npz; bfloat16, which NumPy does not know, is stored as two bytes of no type."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                names = Counter(archive.namelist())
                repeated = [name for name, count in names.items() if count > 1]
                if repeated:
                    raise VitralError(f"{path} holds {repeated[0]} twice; it is damaged")
                for member in archive.infolist():
                    self._headers[member.filename.removesuffix(".npy")] = _npy_header(archive, member)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise VitralError(f"{path} is damaged or incomplete: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __contains__(self, name: object) -> bool:
        return name in self._headers

    def __getitem__(self, name: str) -> Tensor:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                array = archive[name]
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise VitralError(f"{self.path}: {name} cannot be read: {error}") from error
        if array.dtype == np.dtype("V2"):
            return self.checked(name, torch.from_numpy(array.view(np.int16)).view(torch.bfloat16))
        return self.checked(name, torch.from_numpy(array))


def open_weights(path: Path) -> Weights:
    """The weights of a file, or of the shards that ``*.index.json`` lists.

    Raises:
        VitralError: if the file is missing, damaged, of an unknown kind, or would have to execute code.
    """
    if not path.is_file():
        raise VitralError(f"{path} is missing")
    if path.stat().st_size == 0:
        raise VitralError(f"{path} is damaged or incomplete: it is empty")
    _refuse_pointer(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == SAFETENSORS:
        return SafetensorsWeights(path, [path])
    if path.suffix == NUMPY:
        return NumpyWeights(path)
    if path.suffix in PICKLED:
        return TensorWeights(path, _unwrapped(path, _load_pickled(path)))
    raise VitralError(f"{path} is no file of weights; known are {', '.join(ENDINGS)}")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise VitralError(f"{path} is a pointer of Git LFS, not the weights; run git lfs pull")


def _open_shards(index: Path) -> Weights:
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VitralError(f"{index} is no index of shards: {error!r}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise VitralError(f"{index} names {outside[0]}, which is not beside it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise VitralError(f"{index.parent} lacks {', '.join(absent)}; the download is incomplete")
    shards = [index.parent / name for name in names]
    if shards[0].suffix == SAFETENSORS:
        weights: Weights = SafetensorsWeights(index, shards)
    else:
        tensors = [_unwrapped(shard, _load_pickled(shard)) for shard in shards]
        weights = TensorWeights(index, {name: x for part in tensors for name, x in part.items()})
    missing = files.keys() - set(weights)
    if missing:
        raise VitralError(f"{index} names {sorted(missing)[0]}, which is in no shard")
    return weights


def _check_header(path: Path) -> None:
    """Raises VitralError where a key stands twice, of which a parser would keep either."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        # More than the file is the parser's to report.
        if not 0 < length < min(path.stat().st_size, 100_000_000):
            return
        header = file.read(length)

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise VitralError(f"{path} holds {name} twice; it is damaged")
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=refuse_repeated)
    except (ValueError, RecursionError) as error:
        raise VitralError(f"{path} is damaged or incomplete: its header is not JSON") from error


def _npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, checked against the bytes that are there."""
    if member.file_size > _MAX_RATIO * max(member.compress_size, 1):
        raise ValueError(f"{member.filename} claims {member.file_size} bytes of {member.compress_size}")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects, which are never loaded")
        if file.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize != member.file_size:
            raise ValueError(f"{member.filename} is not as long as its shape {shape} says")
    return tuple(shape), dtype


def _load_pickled(path: Path) -> Any:
    # argparse.Namespace, which training scripts save their settings in, holds plain values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise VitralError(
                f"{path} is damaged, or holds more than tensors, which loading would have to execute; "
                "save its state_dict with safetensors"
            ) from error
        except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
            raise VitralError(f"{path} is damaged or incomplete: {str(error).splitlines()[0]}") from error


def _unwrapped(path: Path, content: Any) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return _without_prefix(tensors)
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    raise VitralError(f"{path} holds no tensors by name; expected a state_dict")


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(name.startswith("backbone.") for name in tensors):
        # DINO saves its projection head beside it.
        tensors = {name: x for name, x in tensors.items() if name.startswith("backbone.")}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return _without_prefix({name.removeprefix(prefix): x for name, x in tensors.items()})
    return tensors
