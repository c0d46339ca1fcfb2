"""The same picture several times: the same file, or nearly the same picture; across splits above all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitral.checks.findings import Finding, Kind, Subject
from vitral.checks.look import Looks
from vitral.checks.stored import is_blank
from vitral.evaluation.analysis.matching import COPIED, NEAR, Matches, find_matches, limit_for

# Of cosines between a model's features: below, two pictures are hardly ever crops of one.
LEAST_COSINE = 0.9


@dataclass(frozen=True)
class Copies:
    """Which images show the same picture."""

    files: tuple[tuple[int, ...], ...]  # rows of the same bytes, in their order
    near: Matches  # rows of other images that show the same picture, the nearest first
    limit: float  # up to which distance; see `limit_for`
    akin: int  # images that are within `NEAR` of another one, named or not
    groups: np.ndarray  # (n,) a number for each image, the same for those that show the same picture


def find_copies(
    subject: Subject,
    looks: Looks,
    also: Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]] | None = None,
    *,
    on_pairs: Callable[[int, int], None] = lambda *_: None,
) -> Copies:
    """Find the images that show the same picture.

    Args:
        subject: the images.
        looks: what was seen of them; what is damaged or of one colour has no copies.
        also: gives pairs that a model holds alike, as places in the rows that it is given.
        on_pairs: told how many pairs are verified, of how many.
    """
    count = len(subject)
    usable = np.flatnonzero(looks.sound & ~is_blank(looks))
    by_digest: dict[bytes, list[int]] = {}
    for row in usable.tolist():
        by_digest.setdefault(looks.seen[row].digest, []).append(row)
    files = tuple(tuple(rows) for rows in by_digest.values() if len(rows) > 1)
    firsts = np.array([rows[0] for rows in by_digest.values()], dtype=np.int64)
    proposed = None if also is None else also(firsts)
    found = find_matches(looks.pictures_NSS[torch.from_numpy(firsts)], also=proposed, on_pairs=on_pairs)
    ends = np.concatenate([found.rows, found.others])
    limit = limit_for(ends, np.tile(found.distances, 2), len(firsts))
    near = found._replace(rows=firsts[found.rows], others=firsts[found.others]).within(limit)
    near = Matches(*(column[np.argsort(near.distances, kind="stable")] for column in near))
    groups = _groups(count, files, near)
    return Copies(files, near, limit, len(np.unique(ends)), groups)


def _groups(count: int, files: Sequence[Sequence[int]], near: Matches) -> np.ndarray:
    """The same number for all that are joined, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = [row for same in files for row in [same[0]] * (len(same) - 1)] + near.rows.tolist()
    others = [row for same in files for row in same[1:]] + near.others.tolist()
    joined: Any = coo_array((np.ones(len(rows), dtype=np.int8), (rows, others)), shape=(count, count))
    return connected_components(joined, directed=False)[1].astype(np.int64)


def copy_kinds(subject: Subject, copies: Copies) -> Iterator[Kind]:
    """Tell which images are the same, a kind at a time."""
    exact: list[_Same] = [(rows, "", None) for rows in copies.files]
    near: list[_Same] = [
        ((row, other), _words(distance, mirrored=mirrored), distance)
        for row, other, distance, mirrored in zip(*(column.tolist() for column in copies.near), strict=True)
    ]
    yield _kind(subject, exact, "same_file_labels", "the same file under several labels", "wrong", _LABELS)
    yield _kind(subject, exact, "same_file_splits", "the same file in several splits", "wrong", _SPLITS)
    yield _kind(subject, exact, "same_file", "the same file several times", "doubtful", _AGAIN)
    yield _kind(subject, near, "near_splits", "nearly the same picture in several splits", "wrong", _SPLITS)
    yield _kind(
        subject, near, "near_labels", "nearly the same picture under several labels", "doubtful", _LABELS
    )
    yield _kind(
        subject, near, "near", "nearly the same picture several times", "doubtful", _AGAIN + _alike(copies)
    )


_Same = tuple[tuple[int, ...], str, float | None]  # rows, words, distance
_LABELS = "One of the labels is wrong, or the picture shows both. "
_SPLITS = "What is measured on them says little of new images: the model may know them by heart. "
_AGAIN = "They count several times, and images that are held out by chance are not new. "


def _alike(copies: Copies) -> str:
    if copies.limit == NEAR:
        return ""
    return (
        f"Pictures of this data are alike by nature: {copies.akin:,} of them are near another one. Only "
        f"those within a distance of {COPIED} are named, as files are that are stored anew. "
    )


def _words(distance: float, *, mirrored: bool) -> str:
    return f"distance {distance:.3f}{', mirrored' if mirrored else ''}"


def _kind(
    subject: Subject,
    found: list[_Same],
    key: str,
    title: str,
    level: Any,
    means: str,
) -> Kind:
    """Those of the copies that belong to this kind; each is of at least one."""
    findings = []
    for rows, words, distance in found:
        splits = len({int(subject.of[row]) for row in rows}) > 1
        labels = len({subject.labels_of(row) for row in rows}) > 1
        belongs = {"splits": splits, "labels": labels}.get(key.rpartition("_")[2], not splits and not labels)
        if belongs:
            differ = "their labels differ" if labels and not key.endswith("labels") else ""
            findings.append(Finding(rows, "; ".join(filter(None, (words, differ))), distance))
    return Kind(key, title, level, means.strip(), tuple(findings))
