"""`Ring`: memory for batches that is taken once and written into again and again.

To copy an image into memory that is new costs many times as much as into memory that was used before, for the
system has to find and clear each page; of memory that processes share it cost forty times as much
(docs/log.md, 2026-11-27).

The contract: a piece is given out with a tensor over it, and is free again when nothing refers to the memory
of that tensor any more, by whatever view. So a batch that is kept never changes; whoever keeps many has the
later ones in memory of their own, and nobody waits. A copy to a GPU ends the use of what it reads from: from
memory that is not pinned CUDA returns once all is read, and what is pinned are copies that torch keeps itself
until they are read (CUDA Runtime API, "API synchronization behavior"; torch's CachingHostAllocator).
"""

import io
import mmap
import multiprocessing
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

Memory = Callable[[int], Tensor]  # so many bytes, (n,), to write into


def new_memory(nbytes: int) -> Tensor:
    """Take memory of no ring."""
    return torch.empty(nbytes, dtype=torch.uint8)


class Ring:
    """Pieces of memory of one size.

    Args:
        nbytes: of a piece.
        pieces: how many; their memory is taken as it is first written.
        shared: whether processes that are forked from here write into the same memory. It is no file, so that
            no container's /dev/shm is too small.
    """

    def __init__(self, nbytes: int, pieces: int, *, shared: bool = False) -> None:
        self.nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE  # no two processes write into one page
        total = max(self.nbytes * pieces, 1)
        self._memory: Any = mmap.mmap(-1, total) if shared else np.empty(total, np.uint8)
        self._free = list(range(pieces))
        _rings[id(self)] = self

    @classmethod
    def among_processes(cls, nbytes: int, pieces: int) -> Self | None:
        """Make one for processes that are begun later; None where they would not share it."""
        if not processes_share():
            return None
        try:
            return cls(nbytes, pieces, shared=True)
        except (OSError, ValueError):  # a system that promises no more memory than it has
            return None

    @property
    def free(self) -> int:
        """How many pieces nobody uses."""
        return len(self._free)

    def take(self) -> int | None:
        """Take the number of a free piece, if there is one; `lend` gives it back."""
        return self._free.pop() if self._free else None  # the last that was used, of which caches know most

    def lend(self, piece: int) -> Tensor:
        """Give a piece that was taken, (n,) bytes; it is free again when no view of it is left."""
        array = self._array(piece)
        weakref.finalize(array, self._free.append, piece)
        return torch.from_numpy(array)

    def memory(self, nbytes: int) -> Tensor:
        """Lend a piece, or take new memory where none is free or large enough."""
        if nbytes > self.nbytes or (piece := self.take()) is None:
            return new_memory(nbytes)
        return self.lend(piece)[:nbytes]

    def _array(self, piece: int) -> np.ndarray:
        # Not a slice of one array of all: views of it would refer to that array, and not to this one.
        return np.frombuffer(self._memory, np.uint8, self.nbytes, piece * self.nbytes)

    # --- From a process to another -----------------------------------------------------------------

    def packed(self, piece: int | None, make: Callable[[Memory], Any]) -> "Packed":
        """Make a batch in a forked process, its tensors written into a piece if it has room for them."""
        inside = None if piece is None else torch.from_numpy(self._array(piece))

        def memory(nbytes: int) -> Tensor:
            return new_memory(nbytes) if inside is None or nbytes > self.nbytes else inside[:nbytes]

        content = io.BytesIO()
        _Pickler(content, inside).dump(make(memory))
        return Packed(id(self), piece, content.getvalue())

    def unpacked(self, packed: "Packed") -> Any:
        """Give the batch where the piece was taken; copied out of it where no other piece is free."""
        lent = new_memory(0) if packed.piece is None else self.lend(packed.piece)
        if not self._free:
            lent = lent.clone()
        return _Unpickler(io.BytesIO(packed.content), lent).load()


def processes_share() -> bool:
    """Whether processes that are begun from here are forked, and so share memory that is no file."""
    return multiprocessing.get_start_method() == "fork"


def used_again(pieces: int = 3) -> Memory:
    """Give memory that is used again, for batches of one process: in use, being made, and one to spare."""
    ring = Ring(0, 0)

    def memory(nbytes: int) -> Tensor:
        nonlocal ring
        if nbytes > ring.nbytes:
            ring = Ring(nbytes, pieces)
        return ring.memory(nbytes)

    return memory


_rings: "weakref.WeakValueDictionary[int, Ring]" = weakref.WeakValueDictionary()  # of this process


@dataclass(frozen=True)
class Packed:
    """A batch on its way from a forked process: where it is in the ring, and all else that it is."""

    ring: int
    piece: int | None
    content: bytes

    def unpacked(self) -> Any:
        """Give the batch, in the process that the ring is of."""
        return _rings[self.ring].unpacked(self)

    def pin_memory(self) -> Any:
        """Give it pinned, as DataLoader's thread asks for; that is a copy, and the piece is free again."""
        return self.unpacked().pin_memory()


class _Pickler(pickle.Pickler):
    """Writes of a tensor in the piece its place alone, and any other's numbers: torch would make a file."""

    def __init__(self, file: io.BytesIO, inside: Tensor | None) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._inside = inside

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        inside, kind, shape = self._inside, obj.dtype, tuple(obj.shape)
        if inside is not None and obj.is_contiguous():
            first = obj.data_ptr() - inside.data_ptr()
            if 0 <= first < len(inside):
                return slice(first, first + obj.nbytes), kind, shape
        return obj.detach().reshape(-1).view(torch.uint8).numpy(), kind, shape


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, lent: Tensor) -> None:
        super().__init__(file)
        self._lent = lent

    def persistent_load(self, pid: Any) -> Tensor:
        found, kind, shape = pid
        content = self._lent[found] if isinstance(found, slice) else torch.from_numpy(found)
        return content.view(kind).view(shape)
