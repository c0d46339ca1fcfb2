"""``.safetensors``, through the library's memory map."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vitral.checkpoints.formats.damage import reading, refuse_repeated
from vitral.checkpoints.formats.weights import FileWeights, checked

# Bytes. A tensor's entry has a hundred. The library itself stops at 100 million, for which it takes
# (0.8, measured) 20 seconds and 2 GB at 67 million.
_MAX_HEADER = 2**23


class SafetensorsWeights(FileWeights):
    """Tensors on the library's map of the file: copied when written to, in memory as far as they are used."""

    def __init__(self, path: Path) -> None:
        with reading(path):
            _check_header(path)
            # Types, shapes and offsets are the library's to check: no gap, no overlap, all of the file.
            self._file = safe_open(path, "pt")
            names = self._file.keys()
            shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        super().__init__(path, shapes)

    def _read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def temporary(self, name: str) -> Tensor:
        # Pages stay in memory as long as their map. On one of its own they go with the tensor: DINOv3's
        # weights, of which 11 in 16 are joined to others, take 1.02 of the file's size and not 1.69.
        with reading(self.path), safe_open(self.path, "pt") as file:
            tensor = file.get_tensor(name)
        return checked(self.path, name, tensor)


def _check_header(path: Path) -> None:
    """Refuses what the library takes: a header that costs too much, and a name that stands twice."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError(f"its header has {length:,} bytes, those of models have less than 8 million")
        header = file.read(length)

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_repeated(path, [name for name, _ in pairs])
        return dict(pairs)

    json.loads(header, object_pairs_hook=check)
