"""`Names`: what a million images are called, in one piece of memory.

A list of as many strings takes 100 bytes a name and more, and every process that reads it writes into each
string's count of references: memory that workers share when they begin is then copied, page by page
(pytorch's issue 13246). One array of bytes has no such counts.
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import eq
from typing import Self, overload

import numpy as np

_TOGETHER = 65_536  # names whose places are looked up at once


class Names(Sequence[str]):
    """A sequence of strings that never changes; file names of any bytes, as `os.fsdecode` gives them.

    Args:
        text: names, one after the other.
        ends: where in it each of them ends, (m,).
        rows: which of them these are, (n,); None: all, in their order.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray, rows: np.ndarray | None = None) -> None:
        small = ends.dtype != np.uint32 and len(text) < 2**32
        self.text, self.ends, self.rows = text, ends.astype(np.uint32) if small else ends, rows

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Take strings, one at a time."""
        text, ends = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    @property
    def nbytes(self) -> int:
        return self.text.nbytes + self.ends.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.ends if self.rows is None else self.rows)

    @overload
    def __getitem__(self, index: int, /) -> str: ...
    @overload
    def __getitem__(self, index: slice, /) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice, /) -> str | Sequence[str]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = range(len(self))[index]  # raises IndexError, and counts from the end
        return self._name(row if self.rows is None else int(self.rows[row]))

    def _name(self, row: int) -> str:
        start = self.ends[row - 1] if row else 0
        return os.fsdecode(self.text[start : self.ends[row]].tobytes())

    def __iter__(self) -> Iterator[str]:
        text = self.text.tobytes()
        letters = text.decode("ascii") if text.isascii() else None  # else a letter may be several bytes
        for first in range(0, len(self), _TOGETHER):
            rows = np.arange(first, min(first + _TOGETHER, len(self)))
            rows = rows if self.rows is None else self.rows[rows]
            starts = np.where(rows > 0, self.ends[rows - 1], 0).tolist()
            for start, end in zip(starts, self.ends[rows].tolist(), strict=True):
                yield os.fsdecode(text[start:end]) if letters is None else letters[start:end]

    def take(self, rows: np.ndarray) -> "Names":
        """Give the names of these rows, in this order; none of their letters is copied."""
        rows = np.asarray(rows)
        return Names(self.text, self.ends, rows if self.rows is None else self.rows[rows])


class Numbered(Sequence[str]):
    """What images without a name of their own are called: the same words, and the number of each row."""

    def __init__(self, words: str, count: int) -> None:
        self.words, self.number = words, count

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[str]:
        return (f"{self.words} {row}" for row in range(self.number))

    @overload
    def __getitem__(self, index: int, /) -> str: ...
    @overload
    def __getitem__(self, index: slice, /) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice, /) -> str | Sequence[str]:
        rows = range(self.number)[index]
        return f"{self.words} {rows}" if isinstance(rows, int) else [f"{self.words} {row}" for row in rows]
