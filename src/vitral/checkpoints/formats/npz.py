"""NumPy's ``.npz``, stored or compressed."""

import zipfile
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitral.checkpoints.formats.damage import reading, refuse_repeated
from vitral.checkpoints.formats.weights import FileWeights, Shape, no_weights
from vitral.runtime.errors import VitralError

# Deflate reaches a thousandfold on zeros only; weights hardly shrink. Small files may be all zeros.
_MAX_RATIO, MAY_BE_ZEROS = 100, 2**26
# bfloat16, which NumPy does not know, is stored as two bytes of no type.
_BFLOAT16 = "|V2"
_TYPES = ("<f2", _BFLOAT16, "<f4", "<f8")


class NpzWeights(FileWeights):
    """Arrays that NumPy reads one at a time; the zip's checksum of each is checked at its end."""

    def __init__(self, path: Path) -> None:
        self._arrays: dict[str, tuple[str, str]] = {}  # name -> its member of the archive, and its type
        shapes: dict[str, Shape] = {}
        with reading(path), zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            refuse_repeated(path, [_name(member) for member in members])
            claimed, size = sum(member.file_size for member in members), path.stat().st_size
            if claimed > max(_MAX_RATIO * size, MAY_BE_ZEROS):
                raise ValueError(f"its arrays claim {claimed} bytes, the file has {size}")
            for member in members:
                shapes[_name(member)], dtype = _header(archive, member)
                self._arrays[_name(member)] = member.filename, dtype
        super().__init__(path, shapes)

    def _read(self, name: str) -> Tensor:
        member, dtype = self._arrays[name]
        if dtype not in _TYPES:
            raise no_weights(self.path, name, dtype)
        with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if dtype == _BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(".npy")


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[Shape, str]:
    """Returns an array's shape and type, checked against the bytes that are there.

    NumPy itself, asked for the array, would take one with bytes left over, and one of (10**12, 0).
    """
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(file)
        start = file.tell()
    if dtype.hasobject:
        raise VitralError(
            f"{archive.filename}: {member.filename} has Python objects, which are never loaded; take another"
        )
    if min(shape, default=0) < 0 or start + prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} is not as long as its shape {shape} says")
    return tuple(shape), dtype.str
