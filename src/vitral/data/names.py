"""`Names`: what a million images are called, in one piece of memory.

A list of as many strings takes 100 bytes a name and more, and every process that reads it writes into each
string's count of references: memory that workers share when they begin is then copied, page by page
(pytorch's issue 13246). One array of bytes has no such counts.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, overload

import numpy as np


class Names(Sequence[str]):
    """A sequence of strings that never changes; file names of any bytes, as `os.fsdecode` gives them.

    Args:
        text: all names, one after the other.
        ends: where in it each name ends, (n,).
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Take strings, one at a time."""
        text, ends = bytearray(), []
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), np.uint8), np.array(ends, np.int64))

    @property
    def nbytes(self) -> int:
        return self.text.nbytes + self.ends.nbytes

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int, /) -> str: ...
    @overload
    def __getitem__(self, index: slice, /) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice, /) -> str | Sequence[str]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = range(len(self))[index]  # raises IndexError, and counts from the end
        start = self.ends[row - 1] if row else 0
        return os.fsdecode(self.text[start : self.ends[row]].tobytes())

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield os.fsdecode(self.text[start:end].tobytes())
            start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)
        return isinstance(other, list | tuple) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def take(self, rows: np.ndarray) -> "Names":
        """Give the names of these rows, in this order."""
        rows = np.asarray(rows)
        starts = np.concatenate([[0], self.ends[:-1]])[rows] if len(self) else rows
        lengths = self.ends[rows] - starts
        ends = np.cumsum(lengths)
        # The place in `text` of each byte of the result.
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return Names(self.text[places], ends)
