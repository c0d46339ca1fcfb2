"""Which images a model is better trained without."""

from collections.abc import Sequence

import numpy as np

from vitral.checks.copies import Copies
from vitral.checks.findings import Kind, Subject
from vitral.checks.labels import LabelSearch


def left_out(
    subject: Subject, kinds: Sequence[Kind], copies: Copies, labels: LabelSearch | None
) -> dict[int, str]:
    """Choose the rows to leave out, and say why; a row for each.

    What cannot be read or is of one colour leaves every split. Of a picture that is in several splits, the
    images of the last one stay (test, then validation), and those of the others leave. Beyond that,
    validation and test images stay as they are, so that figures can be compared; of the training images leave
    all but the first of each picture, all of a picture that has several labels, and, where the search for
    wrong labels is to be trusted, those that it names.
    """
    by_key = {kind.key: kind for kind in kinds}
    chosen: dict[int, str] = {}
    for key in ("broken", "blank"):
        for finding in by_key[key].findings:
            chosen[finding.rows[0]] = by_key[key].title
    train = subject.splits.index("train")
    for rows in _pictures(copies.groups):
        last = max(subject.of[row] for row in rows)
        of_train = [row for row in rows if subject.of[row] == train]
        several = len({subject.labels_of(row) for row in rows}) > 1
        for row in rows:
            if subject.of[row] != last:
                chosen.setdefault(row, f"the same picture is in {subject.splits[last]}")
            elif last == train and several:
                chosen.setdefault(row, "the same picture has another label")
            elif last == train and row != of_train[0]:
                chosen.setdefault(row, f"the same picture as {subject.split.names[of_train[0]]}")
    for finding in by_key["label"].findings if labels is not None and labels.trusted else ():
        if subject.of[finding.rows[0]] == train:
            chosen.setdefault(finding.rows[0], finding.says)
    return dict(sorted(chosen.items()))


def _pictures(groups: np.ndarray) -> list[list[int]]:
    """The rows of each picture that several images show."""
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    return [part.tolist() for part in np.split(order, ends) if len(part) > 1]
