"""Parts of a split: what is held out to validate on, few images of each class, a sample of all."""

import hashlib
import os

import numpy as np

from vitral.data.split import Split, evenly
from vitral.runtime.errors import VitralError


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divides a split into training and validation images, the same share of each class.

    Images are ranked by a hash of their name, so that adding some moves few others. With several classes an
    image, the images of the rarest class are divided first, and those of each further class as far as they
    are not divided yet (iterative stratification, Sechidis et al., 2011). Where the split has groups, each
    is held out whole or not at all, and the shares are as near as that allows.

    Raises:
        VitralError: if there would be none to validate on.
    """
    if split.groups is not None:
        chosen = _groups_to_hold_out(split.labels, split.groups, fraction, seed)
        if not chosen.any():
            raise VitralError(
                "no group of images can be held out to validate on, for each has a class that no other has; "
                "give a val split, or more groups"
            )
        return _parted(split, chosen)
    ranks = np.array([hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest()[:8] for name in split.names])
    chosen, divided = np.zeros(len(split), dtype=bool), np.zeros(len(split), dtype=bool)
    groups = rows_by_class(split.labels)
    for members in groups:
        wanted = min(max(round(len(members) * fraction), 1), len(members) - 1)
        left = members[~divided[members]]
        count = max(wanted - chosen[members].sum(), 0)
        chosen[left[np.argsort(ranks[left], kind="stable")[:count]]] = True
        divided[members] = True
    for members in groups:
        if chosen[members].all():  # by its companions' shares; there must be something to learn from
            chosen[members[np.argmax(ranks[members])]] = False
    if not chosen.any():
        raise VitralError(
            "no image can be held out to validate on; give a val folder, or more images per class"
        )
    return _parted(split, chosen)


def _parted(split: Split, chosen: np.ndarray) -> tuple[Split, Split]:
    """The images that were not chosen, and those that were."""
    kind = np.int32 if len(chosen) < 2**31 else np.int64  # millions of rows stay in memory
    kept, held = (np.flatnonzero(part).astype(kind) for part in (~chosen, chosen))
    return split.take(kept), split.take(held)


def _groups_to_hold_out(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which images are of groups to hold out, (n,).

    In the order of the groups' hashes a group is taken if that brings the shares of its classes nearer to
    `fraction` (the sum of their squared distances), and if each of its classes keeps another group to learn
    from. If none is taken so, the nearest is.
    """
    numbers, group_of = np.unique(groups, return_inverse=True)
    classes = rows_by_class(labels)
    shares: list[dict[int, float]] = [{} for _ in numbers]  # of each group: of its classes' images
    for place, rows in enumerate(classes):
        for group, count in zip(*np.unique(group_of[rows], return_counts=True), strict=True):
            shares[group][place] = count / len(rows)
    left = np.bincount([place for of_group in shares for place in of_group], minlength=len(classes))
    held, chosen = np.zeros(len(classes)), np.zeros(len(numbers), dtype=bool)

    def cost(group: int) -> float:
        """How much farther from `fraction` the shares are with it."""
        return sum(share * (share + 2 * (held[place] - fraction)) for place, share in shares[group].items())

    ranked = sorted(
        range(len(numbers)), key=lambda group: hashlib.sha256(f"{seed}/{numbers[group]}".encode()).digest()
    )
    for group in ranked:
        if cost(group) < 0 and all(left[place] > 1 for place in shares[group]):
            chosen[group] = True
            for place, share in shares[group].items():
                held[place] += share
                left[place] -= 1
    spare = [group for group in ranked if all(left[place] > 1 for place in shares[group])]
    if not chosen.any() and spare:
        chosen[min(spare, key=cost)] = True
    return chosen[group_of]


def rows_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Gives the rows of each class that there is.

    With several classes per image, from the rarest class on; images of no class count as one more.
    """
    if labels.ndim == 1:
        # One sort, for a comparison with each class takes the square of many.
        order = np.argsort(labels, kind="stable")
        return np.split(order, np.unique(labels[order], return_index=True)[1][1:])
    shown = np.column_stack([labels, ~labels.any(1)])
    groups = [np.flatnonzero(column) for column in shown.T]
    return sorted((members for members in groups if len(members)), key=len)


def sample_rows(split: Split, limit: int, seed: int) -> np.ndarray:
    """Draws at most `limit` rows evenly over the classes, in the split's order; a function of the seed.

    One class per image, here, in `in_turns` and in `few_shot`.
    """
    return np.sort(in_turns(split, seed)[:limit])


def sample(split: Split, limit: int, seed: int) -> Split:
    """Takes `sample_rows`."""
    return split.take(sample_rows(split, limit, seed))


def in_turns(split: Split, seed: int) -> np.ndarray:
    """Orders the rows, one of each class after another: any first part is even over the classes."""
    order, turns = _turns(split, seed)
    return order[np.argsort(turns[order], kind="stable")]


def few_shot(split: Split, per_class: int, seed: int) -> Split:
    """Takes at most `per_class` images of each class; a larger number adds to those of a smaller one."""
    _, turns = _turns(split, seed)
    return split.take(np.flatnonzero(turns < per_class))


def _turns(split: Split, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random order of the images, and of each image how many of its class come before it there."""
    order = np.random.default_rng(seed).permutation(len(split))
    turns = np.empty(len(split), dtype=np.int64)
    by_class = order[np.argsort(split.labels[order], kind="stable")]
    _, firsts, counts = np.unique(split.labels[by_class], return_index=True, return_counts=True)
    turns[by_class] = np.arange(len(split)) - np.repeat(firsts, counts)
    return order, turns


def thinned(split: Split, at_most: int) -> Split:
    """Takes at most so many of the images, evenly over the split's order."""
    return split.take(evenly(len(split), at_most))
