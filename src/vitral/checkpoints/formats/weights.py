"""Weights as mappings from names to tensors, whose shapes are known before a tensor is read."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from vitral.checkpoints.dtypes import READABLE
from vitral.checkpoints.formats.damage import AGAIN, reading
from vitral.runtime.errors import VitralError

Shape = tuple[int, ...]


class Weights(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    # Plain values that training code saved in the same file: its "arch" and "args".
    about: Mapping[str, Any] = MappingProxyType({})
    # Names of tensors that stand beside a model's, such as those of a classifier on a backbone.
    beside: frozenset[str] = frozenset()

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        self.path = path
        self._shapes = shapes

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def temporary(self, name: str) -> Tensor:
        """Reads a tensor that is soon copied into another, so that both need not stay in memory."""
        return self[name]

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes


class FileWeights(Weights):
    """The tensors of one file, each checked as it is read."""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        with reading(self.path):
            tensor = self._read(name)
        return checked(self.path, name, tensor)

    def _read(self, name: str) -> Tensor:
        raise NotImplementedError


def checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor. Raises VitralError unless all its numbers are finite and of a type of weights."""
    if tensor.dtype not in READABLE:
        raise no_weights(path, name, tensor.dtype)
    with reading(path):
        finite = not tensor.numel() or all(bound.isfinite() for bound in tensor.aminmax())
    if not finite:
        raise VitralError(
            f"{path}: {name} holds NaN or infinity; the file is damaged, or its training diverged: "
            "take another"
        )
    return tensor


def no_weights(path: Path, name: str, dtype: object) -> VitralError:
    """Returns the error about a tensor of another type than `dtypes.READABLE`."""
    return VitralError(
        f"{path}: {name} is {dtype}, weights are floating-point numbers of 16, 32 or 64 bits; "
        "take a file that is not quantized"
    )


class Shards(Weights):
    """The tensors of several files, which an index names."""

    def __init__(self, index: Path, shards: Iterable[Weights]) -> None:
        self._owners: dict[str, Weights] = {}
        for shard in shards:
            for name in shard:
                if name in self._owners:
                    both = f"{self._owners[name].path.name} and {shard.path.name}"
                    raise VitralError(f"{index}: {both} hold {name}; {AGAIN}")
                self._owners[name] = shard
        super().__init__(index, {name: shard.shape(name) for name, shard in self._owners.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._owners[name][name]

    def temporary(self, name: str) -> Tensor:
        return self._owners[name].temporary(name)


class Renamed(Weights):
    """Weights under other names; a name may stand for one layer of a tensor that has an axis of layers."""

    def __init__(self, weights: Weights, names: Mapping[str, str | tuple[str, int]]) -> None:
        self._olds = {new: (old, None) if isinstance(old, str) else old for new, old in names.items()}
        shapes = {
            new: weights.shape(old)[0 if layer is None else 1 :] for new, (old, layer) in self._olds.items()
        }
        super().__init__(weights.path, shapes)
        self.about, self.beside = weights.about, weights.beside
        self._weights = weights
        self._layers: dict[tuple[str, int], Tensor] = {}  # of tensors that were read, kept until taken

    def __getitem__(self, name: str) -> Tensor:
        old, layer = self._olds[name]
        if layer is None:
            return self._weights[old]
        if (old, layer) not in self._layers:
            self._layers |= {(old, i): part for i, part in enumerate(self._weights[old])}
        return self._layers.pop((old, layer))

    def temporary(self, name: str) -> Tensor:
        old, layer = self._olds[name]
        return self._weights.temporary(old) if layer is None else self[name]
