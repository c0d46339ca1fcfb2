"""`Names` beside the list of strings that it stands for."""

import os
import pickle

import numpy as np
import pytest

from vitral.data.names import Names

WORDS = ["a.jpg", "", "chat noir/é.png", os.fsdecode(b"latin-\xe9.jpg"), "z" * 300]


def test_a_list_of_any_names():
    names = Names.of(iter(WORDS))
    assert list(names) == WORDS
    assert [names[row] for row in range(len(WORDS))] == WORDS
    assert names[-1] == WORDS[-1]
    assert list(names[1:3]) == WORDS[1:3]
    assert len(names) == len(WORDS)
    assert names == WORDS == names
    assert names == Names.of(WORDS) != Names.of([*WORDS[1:], WORDS[0]])
    assert names != WORDS[:-1]
    with pytest.raises(IndexError):
        names[len(WORDS)]


@pytest.mark.parametrize("rows", [[], [3, 0, 3, 1], list(range(5))])
def test_rows_in_any_order(rows):
    assert list(Names.of(WORDS).take(np.array(rows, dtype=np.int64))) == [WORDS[row] for row in rows]


def test_no_names():
    assert list(Names.of([])) == []
    assert len(Names.of([]).take(np.empty(0, dtype=np.int64))) == 0


def test_a_million_names_fit():
    """The bar of 1.28 million names and labels is 100 MB; 40 bytes are a long name."""
    names = Names.of(f"train/n{row // 1300:08d}/n{row // 1300:08d}_{row}.JPEG" for row in range(20_000))
    assert names.nbytes / len(names) * 1.28e6 < 80e6
    assert list(pickle.loads(pickle.dumps(names))) == list(names)
