"""Which known name a wrong one was meant to be, if one is near."""

from collections.abc import Iterable

_MOST = 3


def near(name: str, known: Iterable[str]) -> list[str]:
    """Give the known names that `name` may stand for, the likeliest first, three at most; often none.

    A name is near if it is the same but for case and dashes, has the same words beside others
    (``num_epochs``, ``epochs``), the same words shortened (``lr_decay``, ``layer_decay``) or their first
    letters (``wd``), or is one slip of the fingers in five letters away. A slip leaves the first letter of
    each word: ``patch_size`` is no misspelt ``batch_size``.

    >>> near("learning_rte", ["learning_rate", "batch_size"])
    ['learning_rate']
    >>> near("patch_size", ["batch_size"])
    []
    """
    asked = _words(name)
    ranks = {other: _distance(asked, _words(other.rpartition(".")[2])) for other in known}
    found = sorted(
        (rank, place, other) for place, (other, rank) in enumerate(ranks.items()) if rank is not None
    )
    # Where one is the same word, or nearly, others that merely share some are none.
    return [other for rank, _, other in found if rank - found[0][0] < 1][:_MOST]


def meant(name: str, known: Iterable[str]) -> str:
    """Write ``"; did you mean 'epochs'?"``, or nothing where no name is near."""
    found = near(name, known)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _words(name: str) -> list[str]:
    return [word for word in name.lower().strip("-_").replace("-", "_").split("_") if word]


def _distance(asked: list[str], known: list[str]) -> float | None:
    """0 for the same name, more for one less alike, None for another name."""
    if not asked or not known:
        return None
    if "".join(asked) == "".join(known):
        return 0
    slips = _slips("_".join(asked), "_".join(known))
    if slips <= max(len("".join(asked)) // 5, 1) and _same_initials(asked, known):
        return 1 + slips / 10
    if len(asked) == len(known) and all(map(_shortens, asked, known)):
        return 2
    if _initials(known) == "".join(asked) and len(known) > 1:
        return 2
    if set(asked) < set(known) or set(asked) > set(known):
        return 3
    return None


def _initials(words: list[str]) -> str:
    return "".join(word[0] for word in words)


def _same_initials(asked: list[str], known: list[str]) -> bool:
    """With the words joined or divided differently, or two letters exchanged, the first alone must agree."""
    if len(asked) == len(known):
        return all(a[0] == b[0] or sorted(a) == sorted(b) for a, b in zip(asked, known, strict=True))
    return asked[0][0] == known[0][0]


def _shortens(a: str, b: str) -> bool:
    """Whether one has the letters of the other, from the first on, with some left out."""
    if a == b:
        return True
    short, long = sorted((a, b), key=len)
    letters = iter(long)
    return len(short) > 1 and short[0] == long[0] and all(letter in letters for letter in short)


def _slips(a: str, b: str) -> int:
    """Letters added, left out, exchanged for another, or swapped with their neighbour."""
    before, row = [], list(range(len(b) + 1))
    for i, letter in enumerate(a):
        older, before = before, row
        row = [i + 1]
        for j, other in enumerate(b):
            best = min(before[j + 1] + 1, row[j] + 1, before[j] + (letter != other))
            if i and j and letter == b[j - 1] and a[i - 1] == other:
                best = min(best, older[j - 1] + 1)
            row.append(best)
    return row[-1]
