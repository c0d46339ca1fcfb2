"""Which changes are surely better or worse, and the likely mismatch."""

from collections.abc import Sequence

import numpy as np

from vitral.evaluation.diagnosis.changes import Change
from vitral.evaluation.diagnosis.measure import Answers
from vitral.evaluation.diagnosis.paired_tests import mcnemar, paired
from vitral.evaluation.diagnosis.report import SIGNIFICANCE, Diagnosis, Finding, Verdict

# Nats. A loss can be lower without fail by next to nothing; this much raises the true class's probability
# by a hundredth of itself.
LEAST_LOSS_CHANGE = 0.01


def conclude(split: str, damaged: int, changes: Sequence[Change], answers: Sequence[Answers]) -> Diagnosis:
    from scipy.stats import binomtest

    base = answers[0]
    tried = sum(not np.array_equal(answer.losses_N, base.losses_N) for answer in answers)
    found = [
        (_finding(change, base, answer, tried), answer)
        for change, answer in zip(changes[1:], answers[1:], strict=True)
    ]
    likely, rivals = _choose([pair for pair in found if pair[0].verdict == "better"])
    n = len(base.right_N)
    interval = binomtest(int(base.right_N.sum()), n).proportion_ci(method="wilson")
    return Diagnosis(
        split=split,
        n=n,
        damaged=damaged,
        top1=base.top1,
        ci95=(float(interval.low), float(interval.high)),
        loss=float(base.losses_N.mean()),
        tried=tried,
        findings=tuple(finding for finding, _ in found),
        likely=likely,
        rivals=rivals,
    )


def _finding(change: Change, base: Answers, new: Answers, tried: int) -> Finding:
    gained, lost = new.turned(base)
    p_top1 = min(tried * mcnemar(gained, lost), 1.0)
    loss_change, loss_error, _ = paired(new.losses_N - base.losses_N)
    tempered_change, _, p_loss = paired(new.tempered_N - base.tempered_N)
    p_loss = min(tried * p_loss, 1.0)
    if np.array_equal(new.losses_N, base.losses_N):
        verdict, reason = "no effect", change.why_idle
    elif p_top1 <= SIGNIFICANCE:
        verdict, reason = "better" if gained > lost else "worse", f"top-1, p = {p_top1:.1g}"
    else:
        verdict = _verdict_of_losses(p_loss, loss_change, tempered_change)
        reason = "" if verdict == "unclear" else f"loss, p = {p_loss:.1g}"
    return Finding(
        setting=change.setting,
        now=change.now,
        value=change.value,
        top1=new.top1,
        loss=float(new.losses_N.mean()),
        top1_change=new.top1 - base.top1,
        loss_change=loss_change,
        loss_error=loss_error,
        gained=gained,
        lost=lost,
        p_top1=p_top1,
        p_loss=p_loss,
        verdict=verdict,
        reason=reason,
    )


def _verdict_of_losses(p: float, *changes: float) -> Verdict:
    """All changes must agree, and be large enough to matter."""
    if p <= SIGNIFICANCE and max(changes) <= -LEAST_LOSS_CHANGE:
        return "better"
    return "worse" if p <= SIGNIFICANCE and min(changes) >= LEAST_LOSS_CHANGE else "unclear"


def _choose(better: Sequence[tuple[Finding, Answers]]) -> tuple[Finding | None, tuple[Finding, ...]]:
    """The best and its rivals: the highest top-1, or less loss where top-1 cannot tell and the loss can."""
    if not better:
        return None, ()
    # Of equals the first, which is the commonest.
    best, highest = max(better, key=lambda pair: pair[1].top1)
    close = [pair for pair in better if mcnemar(*highest.turned(pair[1])) > SIGNIFICANCE]
    of_least_loss, lowest = min(close, key=lambda pair: pair[1].tempered_N.mean())
    _, _, p = paired(lowest.tempered_N - highest.tempered_N)
    if p <= SIGNIFICANCE:
        best = of_least_loss
    return best, tuple(finding for finding, _ in close if finding is not best)
