"""Files of weights, read without executing anything and without holding them twice.

`open_weights` gives a mapping whose tensors are read when they are asked for: safetensors and PyTorch's
own files (one or shards) from a memory map, Google's .npz an array at a time.
"""

import argparse
import io
import json
import mmap
import pickle
import pickletools
import re
import sys
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vitral.runtime.errors import VitralError

SAFETENSORS = ".safetensors"
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
NUMPY = ".npz"
ENDINGS = (SAFETENSORS, *PICKLED, NUMPY)

# The names under which training code saves a model beside its optimizer, the one to use first.
_WRAPPERS = ("teacher", "target_encoder", "model_ema", "model", "module", "state_dict", "encoder")
_HEADS = ("head", "classifier", "fc")  # a mapping of its own beside them
_MAX_WRAPPERS = 8  # one in another; a pickle may hold a dict that holds itself
_MAX_MESSAGE = 1200  # characters
_MAX_NAME = 250  # characters; names stand in messages
# Bytes; a tensor's entry has a hundred, and the library's own limit takes seconds and gigabytes to parse.
_MAX_HEADER = 2**23
# Deflate reaches a thousandfold on zeros only; weights hardly shrink. Small files may be all zeros.
_MAX_RATIO, _ALWAYS_FINE = 100, 2**26
_MAX_EMPTY = 2**16  # a side of a tensor without numbers
_MAX_NPY_HEADER = 2**14  # bytes; NumPy's own limit is 10,000
_CHUNK = 2**22  # bytes that are decompressed at once
_ZIP = b"PK\3\4"
_AGAIN = "download or copy it again"

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAFETENSORS_TYPES = dict(zip(("F16", "BF16", "F32", "F64"), _FLOATS, strict=True))
# bfloat16, which NumPy does not know, is stored as two bytes of no type.
_NUMPY_TYPES = dict(zip(("<f2", "|V2", "<f4", "<f8"), _FLOATS, strict=True))


# --- Mappings ------------------------------------------------------------------------------------


class Weights(Mapping[str, Tensor]):
    """Tensors by name, read when asked for; shapes are known before."""

    # Plain values that training code saved in the same file: its "arch" and "args".
    about: Mapping[str, Any] = MappingProxyType({})
    # Names that stand beside a model's (`names.plain`), such as those of a classifier on a backbone.
    beside: frozenset[str] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path = path

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def unstacked(self, name: str) -> list[Tensor]:
        """The tensor's parts along its first axis, none of which keeps the others in memory."""
        return list(self[name])

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """Raises VitralError unless all numbers are finite."""
        with _reading(self.path):
            finite = not tensor.numel() or all(bound.isfinite() for bound in tensor.aminmax())
        if not finite:
            raise VitralError(
                f"{self.path}: {name} holds NaN or infinity; the file is damaged, or its training diverged: "
                "take another"
            )
        return tensor

    def refused(self, name: str, kind: object) -> VitralError:
        return VitralError(
            f"{self.path}: {name} is {kind}, weights are floating-point numbers of 16, 32 or 64 bits; "
            "take a file that is not quantized"
        )


class _Map:
    """A file in memory as far as it is used; a part's pages are given back with the last tensor on it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy on write: tensors may be changed, the file is not.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._parts: weakref.WeakValueDictionary[tuple[int, int], memoryview] = weakref.WeakValueDictionary()

    def flat(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=dtype)
        part = self._parts.get((start, stop))
        if part is None:
            part = self._parts[start, stop] = memoryview(self._map)[start:stop]
            self._release_after(part, start, stop)
        # The tensor's storage holds on to `part`.
        if start % dtype.itemsize:
            return torch.frombuffer(part, dtype=torch.uint8).clone().view(dtype)
        return torch.frombuffer(part, dtype=dtype)

    def _release_after(self, part: memoryview, start: int, stop: int) -> None:
        # Else tensors that were joined to one of ours would stay in memory beside it.
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            release = weakref.finalize(part, self._map.madvise, mmap.MADV_DONTNEED, first, last - first)
            release.atexit = False  # pyrefly: ignore[missing-attribute] - a property that its stub lacks


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a file: bytes `start` to `stop`, of which it may be a view."""

    file: _Map
    start: int
    stop: int
    dtype: torch.dtype | str  # a name for types that are no weights
    shape: tuple[int, ...]
    view: tuple[tuple[int, ...], int] | None = None  # strides and offset, if not contiguous from the start


class MappedWeights(Weights):
    """Tensors that lie in a memory-mapped file."""

    def __init__(self, path: Path, places: Mapping[str, _Place]) -> None:
        super().__init__(path)
        self._places = places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        if isinstance(place.dtype, str):
            raise self.refused(name, place.dtype)
        with _reading(self.path):
            flat = place.file.flat(place.start, place.stop, place.dtype)
            tensor = flat.as_strided(place.shape, *place.view) if place.view else flat.view(place.shape)
        return self.checked(name, tensor)


class LegacyWeights(Weights):
    """PyTorch's files of before 1.6, which cannot be mapped: read whole, each tensor kept until taken."""

    def __init__(self, path: Path, load: "Callable[[], _Saved]") -> None:
        super().__init__(path)
        first = load()
        self._load, self._tensors, self.about = load, first.tensors, first.about
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> Tensor:
        if name in self._shapes and name not in self._tensors:
            self._tensors = self._load().tensors
        tensor = self._tensors.pop(name).detach()
        if tensor.dtype not in _FLOATS:
            raise self.refused(name, tensor.dtype)
        return self.checked(name, tensor)


class Shards(Weights):
    """The files that an index names."""

    def __init__(self, index: Path, shards: Iterable[Weights]) -> None:
        super().__init__(index)
        self._owners: dict[str, Weights] = {}
        for shard in shards:
            for name in shard:
                if name in self._owners:
                    both = f"{self._owners[name].path.name} and {shard.path.name}"
                    raise VitralError(f"{index}: {both} hold {name}; {_AGAIN}")
                self._owners[name] = shard

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owners[name].shape(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __contains__(self, name: object) -> bool:
        return name in self._owners

    def __getitem__(self, name: str) -> Tensor:
        return self._owners[name][name]


class Renamed(Weights):
    """Weights under other names; a name may stand for one layer of a tensor that holds all layers."""

    def __init__(self, weights: Weights, names: Mapping[str, str | tuple[str, int]]) -> None:
        super().__init__(weights.path)
        self.about, self.beside = weights.about, weights.beside
        self._weights = weights
        self._names = {new: (old, None) if isinstance(old, str) else old for new, old in names.items()}
        self._layers: dict[tuple[str, int], Tensor] = {}  # of what was unstacked, kept until taken

    def shape(self, name: str) -> tuple[int, ...]:
        old, layer = self._names[name]
        return self._weights.shape(old)[0 if layer is None else 1 :]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        old, layer = self._names[name]
        if layer is None:
            return self._weights[old]
        if (old, layer) not in self._layers:
            self._layers |= {(old, i): part for i, part in enumerate(self._weights.unstacked(old))}
        return self._layers.pop((old, layer))


@dataclass(frozen=True)
class _Array:
    """What the header of an .npy says."""

    member: str
    start: int  # of the numbers in it
    dtype: str
    shape: tuple[int, ...]
    fortran: bool


class NumpyWeights(Weights):
    """Google's .npz, stored or compressed; reading an array to its end checks it against its checksum."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with _reading(path), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _refuse_repeated(path, [member.filename.removesuffix(".npy") for member in members])
            claimed, size = sum(member.file_size for member in members), path.stat().st_size
            if claimed > max(_MAX_RATIO * size, _ALWAYS_FINE):
                raise ValueError(f"its arrays claim {claimed} bytes, the file has {size}")
            self._arrays = {m.filename.removesuffix(".npy"): _npy_header(archive, m) for m in members}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Tensor:
        array = self._arrays[name]
        if array.fortran:
            reverse = list(range(len(array.shape)))[::-1]
            return self._read(name, array.shape[::-1], 1)[0].permute(reverse)
        return self._read(name, array.shape, 1)[0]

    def unstacked(self, name: str) -> list[Tensor]:
        array = self._arrays[name]
        if array.fortran:
            return [part.clone() for part in self[name]]
        return self._read(name, array.shape[1:], array.shape[0])

    def _read(self, name: str, shape: tuple[int, ...], count: int) -> list[Tensor]:
        """So many tensors of this shape, which follow each other in the array."""
        array = self._arrays[name]
        if array.dtype not in _NUMPY_TYPES:
            raise self.refused(name, array.dtype)
        dtype = _NUMPY_TYPES[array.dtype]
        with _reading(self.path), _opened(self.path, array.member) as file:
            file.read(array.start)
            tensors = [_read_tensor(file, shape, dtype) for _ in range(count)]
        return [self.checked(name, tensor) for tensor in tensors]


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        yield file


def _read_tensor(file: IO[bytes], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flat = torch.empty(prod(shape), dtype=dtype)
    content = flat.view(torch.uint8).numpy()
    for start in range(0, len(content), _CHUNK):
        part = content[start : start + _CHUNK]
        read = file.read(len(part))
        if len(read) < len(part):
            raise EOFError("it ends early")
        part[:] = np.frombuffer(read, np.uint8)
    return flat.view(shape)


# --- Opening -------------------------------------------------------------------------------------


def open_weights(path: Path) -> Weights:
    """The weights of a file, or of the shards that ``*.index.json`` lists.

    Raises:
        VitralError: if the file is missing, damaged, of an unknown kind, or would have to execute code.
    """
    if not path.is_file():
        raise VitralError(f"{path} is missing")
    return _open_shards(path) if path.name.endswith(".index.json") else _open_file(path, _unwrapped)


def _open_file(path: Path, saved_in: "Callable[[Path, Any], _Saved]") -> Weights:
    """One file; `saved_in` finds the tensors in what a pickle holds."""
    _refuse_pointer(path)
    if path.suffix == SAFETENSORS:
        weights: Weights = MappedWeights(path, _safetensors_places(path))
    elif path.suffix == NUMPY:
        weights = NumpyWeights(path)
    elif path.suffix in PICKLED and _start(path)[:4] == _ZIP:
        weights = _open_archive(path, saved_in)
    elif path.suffix in PICKLED:
        weights = LegacyWeights(path, lambda: saved_in(path, _load_pickled(path, "cpu")))
    else:
        raise VitralError(f"{path} is no file of weights; known are {', '.join(ENDINGS)}")
    size = path.stat().st_size
    for name in weights:
        if len(name) > _MAX_NAME or not name.isprintable():
            raise damaged(path, f"it names a tensor {name[:40]!a}")
        # Only what is empty can have a side longer than the file (or, compressed, than what zeros shrink to).
        shape = weights.shape(name)
        if max(shape, default=0) > (_MAX_EMPTY if 0 in shape else max(size, _ALWAYS_FINE)):
            raise damaged(path, f"{name} of shape {shape} holds nothing")
    return weights


def _open_shards(index: Path) -> Weights:
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(files.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VitralError(f"{index} is no index of shards: {one_line(error)}; {_AGAIN}") from error
    if outside:
        raise VitralError(f"{index} names {one_line(outside[0])!r}, which is not beside it; {_AGAIN}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent or not names:
        lacking = f"{len(absent)} of {len(names)} shards, such as {one_line((absent or ['any'])[0])}"
        raise VitralError(f"{index.parent} lacks {lacking}; the download is incomplete: {_AGAIN}")
    weights = Shards(index, [_open_file(index.parent / name, _named) for name in names])
    missing = files.keys() - set(weights)
    if missing:
        raise VitralError(f"{index} names {one_line(min(missing))}, which is in no shard; {_AGAIN}")
    return weights


def _safetensors_places(path: Path) -> dict[str, _Place]:
    with _reading(path):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError(f"its header claims {length} bytes, the file has {path.stat().st_size}")
            if length > _MAX_HEADER:
                raise ValueError(f"its header has {length:,} bytes, those of models have less than 8 million")
            header = file.read(length)
        entries = json.loads(header, object_pairs_hook=lambda pairs: _unrepeated(path, pairs))
        # The library's own check of types, shapes and offsets: no gap, no overlap, all of the file.
        with safe_open(path, "pt"):
            file_map = _Map(path)
        places = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                dtype = _SAFETENSORS_TYPES.get(entry["dtype"], entry["dtype"])
                places[name] = _Place(file_map, start, stop, dtype, tuple(entry["shape"]))
        return places


def _unrepeated(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A parser would keep either of two that have one name."""
    _refuse_repeated(path, [name for name, _ in pairs])
    return dict(pairs)


def _refuse_repeated(path: Path, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise damaged(path, f"it holds {repeated[0]} twice")


def _npy_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Array:
    """Shape and type of an array, checked against the bytes that are there."""
    name = member.filename
    with archive.open(member) as opened:
        file = io.BytesIO(opened.read(_MAX_NPY_HEADER))
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
        start = file.tell()
    if dtype.hasobject:
        raise VitralError(
            f"{archive.filename}: {name} holds Python objects, which are never loaded; take another"
        )
    if min(shape, default=0) < 0 or start + prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{name} is not as long as its shape {shape} says")
    if max(shape, default=0) > member.file_size:
        raise ValueError(f"{name} of shape {shape} holds nothing")
    return _Array(name, start, dtype.str, tuple(shape), fortran)


# --- PyTorch's files -----------------------------------------------------------------------------


def _load_pickled(path: Path, device: str) -> Any:
    with _reading(path):
        _refuse_growth(path)
    # argparse.Namespace, which training scripts save their settings in, holds plain values.
    with _reading(path), torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            unsafe = re.search(r"GLOBAL (\S+)", str(error))
            if not unsafe:
                # The rest of PyTorch's message tells how to switch the check off.
                reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
                raise damaged(path, reason[1] if reason else "it is no pickle of tensors") from error
            raise VitralError(
                f"{path} holds {one_line(unsafe[1])}, which loading would have to execute; "
                "save its state_dict with safetensors"
            ) from error


# What PyTorch's unpickler calls, and may give gigabytes for a few bytes: bytearray(n), nested "hex"
# encodings, a tensor of lists in lists. A state dict holds none of them.
_GROWING = ("builtins bytearray", "__builtin__ bytearray", "_codecs encode", "torch Tensor")
_REBUILT = "torch._tensor _rebuild_from_type_v2"  # takes the type of a tensor as an argument
_PICKLES = 5  # in a row, in files of before PyTorch 1.6


def _refuse_growth(path: Path) -> None:
    """Raises ValueError if a pickle asks for memory that does not depend on the file's size."""
    if _start(path)[:4] == _ZIP:
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
    """The names that pickles refer to, as far as they can be read."""
    names: set[str] = set()
    try:
        for _ in range(_PICKLES):
            names |= {str(value) for code, value, _ in pickletools.genops(stream) if code.name == "GLOBAL"}
    except (ValueError, IndexError, UnicodeError):
        pass  # the end of the pickles, or damage: PyTorch's own reader stops there too
    return names


def _open_archive(path: Path, saved_in: "Callable[[Path, Any], _Saved]") -> Weights:
    records = _records(path)
    _refuse_byte_order(path)
    # On the meta device no tensor is read, and each storage says where in the file it begins.
    saved = saved_in(path, _load_pickled(path, "meta"))
    file_map, places = _Map(path), {}
    for name, tensor in saved.tensors.items():
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None or records.get(start) != storage.nbytes():
            raise damaged(path, f"it has no record of {storage.nbytes()} bytes for {name}")
        view = None if _is_plain(tensor) else (tensor.stride(), int(tensor.storage_offset()))
        dtype = tensor.dtype if tensor.dtype in _FLOATS else str(tensor.dtype)
        places[name] = _Place(file_map, start, start + storage.nbytes(), dtype, tuple(tensor.shape), view)
    weights = MappedWeights(path, places)
    weights.about = saved.about
    return weights


def _refuse_byte_order(path: Path) -> None:
    """Swapping bytes on the meta device ends the process."""
    with _reading(path):
        reader = torch._C.PyTorchFileReader(str(path))
        order = reader.get_record("byteorder") if "byteorder" in reader.get_all_records() else b"little"
        if order != sys.byteorder.encode():
            raise ValueError(f"its bytes are not in {sys.byteorder}-endian order")


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is all of its storage, in order."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _records(path: Path) -> dict[int, int]:
    """Where the records of a zip archive begin, and their lengths."""
    records = {}
    with _reading(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = archive.infolist()
        _refuse_repeated(path, [member.filename for member in members])
        for member in members:
            if member.filename.endswith("/constants.pkl"):
                raise VitralError(f"{path} is a TorchScript archive, which holds code; save its state_dict()")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed, which PyTorch never does")
            # The local header: 30 bytes, of which the last four are the lengths of a name and of extras.
            file.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            records[member.header_offset + 30 + name + extra] = member.file_size
    return records


@dataclass(frozen=True)
class _Saved:
    """What a pickle holds of a model."""

    tensors: dict[str, Tensor]
    about: Mapping[str, Any]  # `Weights.about`


def _unwrapped(path: Path, content: Any) -> _Saved:
    """The model's tensors, out of what training code saves it in and under."""
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
    return replace(_named(path, {**content, **beside} if beside else content), about=about)


def _about(content: Any) -> dict[str, Any]:
    """The architecture's name and the settings that timm's training script saves."""
    if not isinstance(content, Mapping) or not isinstance(content.get("arch"), str):
        return {}
    settings = content.get("args")
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    return {"arch": content["arch"], "args": dict(settings) if isinstance(settings, Mapping) else {}}


def _named(path: Path, content: Any) -> _Saved:
    """The tensors in a mapping. Raises VitralError if there are none, or not as weights are saved."""
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}
    if not tensors:
        raise VitralError(f"{path} holds no tensors by name; save a model's state_dict()")
    for name, tensor in tensors.items():
        # An expanded tensor of a few bytes may claim terabytes.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise damaged(path, f"{name} of shape {tuple(tensor.shape)} is larger than what is stored of it")
    return _Saved(tensors, {})


# --- Damage --------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes one line of whatever a parser raises."""
    try:
        yield
    except VitralError:
        raise
    except PermissionError as error:
        raise VitralError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
    # On damaged bytes the parsers of zip, pickle and JSON raise almost anything: struct.error,
    # zlib.error, RecursionError, AttributeError, MemoryError.
    except Exception as error:
        raise damaged(path, error) from error


def damaged(path: Path, reason: object) -> VitralError:
    return VitralError(f"{path} is damaged or incomplete: {one_line(reason)}; {_advice(path)}")


def one_line(reason: object) -> str:
    """The first line of an error's message, and no more than a terminal can show."""
    line = next(iter(str(reason).strip().splitlines()), "") or type(reason).__name__
    if "weights_only" in line or "Weights only" in line:
        # PyTorch tells here how to switch off what keeps a file from executing code.
        line = "it is in a form that PyTorch reads only by executing code"
    return "".join(c if c.isprintable() else "?" for c in line[:_MAX_NAME])


def shown(message: object) -> str:
    """A message as one line, whatever a file's fields, which it may repeat, hold."""
    line = "".join(c if c.isprintable() else "?" for c in str(message))
    half = _MAX_MESSAGE // 2
    return line if len(line) <= _MAX_MESSAGE else f"{line[:half]} ... {line[-half:]}"


def _refuse_pointer(path: Path) -> None:
    if path.stat().st_size == 0:
        raise damaged(path, "it is empty")
    if _start(path).startswith(b"version https://git-lfs"):
        raise VitralError(f"{path} is a pointer of Git LFS, not the weights; run git lfs pull")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _advice(path: Path) -> str:
    """What to do, by what the file begins with."""
    start = _start(path)
    if start.lstrip().startswith(b"<"):
        return "it is a web page; download the file itself"
    ending = _ending(start)
    same = path.suffix == ending or (path.suffix in PICKLED and ending in PICKLED)
    return _AGAIN if ending is None or same else f"if it is whole, its name should end in {ending}"


def _ending(start: bytes) -> str | None:
    """That of files which begin so."""
    if start[8:9] == b"{":
        return SAFETENSORS
    if start[:4] == _ZIP and b".npy" in start:
        return NUMPY
    return PICKLED[0] if start[:1] == b"\x80" or (start[:4] == _ZIP and b"data.pkl" in start) else None
