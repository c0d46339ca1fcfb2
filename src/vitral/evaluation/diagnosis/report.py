"""`Finding` and `Diagnosis`: what came of each change, and the conclusion."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vitral.evaluation.diagnosis.decoding import DecodingCost
from vitral.evaluation.diagnosis.paired_tests import mcnemar

Verdict = Literal["better", "worse", "unclear", "no effect"]
SIGNIFICANCE = 0.05  # of all changes together: each p-value is multiplied by their number (Bonferroni)


@dataclass(frozen=True)
class Finding:
    """One setting at another value, on the same images; changes are against the settings as they are."""

    setting: str
    now: str
    value: str  # what was tried
    top1: float  # 0..1
    loss: float  # mean cross-entropy, nats
    top1_change: float
    loss_change: float
    loss_error: float  # standard error of `loss_change`
    gained: int  # images that were wrong and are right
    lost: int  # images that were right and are wrong
    p_top1: float  # of McNemar's exact test on those, times `Diagnosis.tried`
    p_loss: float  # of Student's paired test on the losses at their best temperatures, times that too
    verdict: Verdict  # "unclear" where these images prove no difference
    reason: str

    @property
    def name(self) -> str:
        return f"{self.setting} {self.value}"


@dataclass(frozen=True)
class Diagnosis:
    """How a classifier does with its settings as they are, and a finding for each change of one."""

    split: str  # the part of the data that the images are from
    n: int  # images behind every number
    damaged: int  # images that could not be read
    top1: float
    ci95: tuple[float, float]  # of `top1`, Wilson's score interval
    loss: float  # mean cross-entropy, nats
    tried: int  # changes that changed any answer
    findings: tuple[Finding, ...]
    likely: Finding | None  # the mismatch: the best of the changes that are surely better
    rivals: tuple[Finding, ...]  # surely better too, and by top-1 not to be told from the likely one
    decodings: tuple[DecodingCost, ...] = ()  # what decoding JPEGs more coarsely changes

    @property
    def costliest(self) -> tuple[Finding, ...]:
        """The worst value of each setting that surely costs something, the costliest setting first."""
        worst: dict[str, Finding] = {}
        for finding in sorted(self.findings, key=lambda finding: (finding.top1, -finding.loss)):
            if finding.verdict == "worse":
                worst.setdefault(finding.setting, finding)
        return tuple(worst.values())

    @property
    def least_rise(self) -> float:
        """The smallest rise of top-1 that McNemar's test can prove here, if no image is lost for it."""
        gained = 1
        while self.tried * mcnemar(gained, 0) > SIGNIFICANCE:
            gained += 1
        return min(gained / self.n, 1.0)

    def to_dict(self) -> dict[str, Any]:
        costliest = [asdict(finding) for finding in self.costliest]
        return {**asdict(self), "costliest": costliest, "conclusion": self.conclusion()}

    def rows(self) -> list[tuple[str, ...]]:
        """Setting, now, tried, top-1, its change in points, loss, its change, verdict: a row a finding."""
        return [
            (
                finding.setting,
                finding.now,
                finding.value,
                f"{finding.top1:.1%}",
                f"{100 * finding.top1_change:+.1f}",
                f"{finding.loss:.3f}",
                f"{finding.loss_change:+.3f}",
                ": ".join(filter(None, (finding.verdict, finding.reason))),
            )
            for finding in self.findings
        ]

    def conclusion(self) -> str:
        """The likely mismatch and its evidence; or that there is none, and what would cost most."""
        if self.likely:
            return self._mismatch(self.likely)
        text = (
            f"the settings look right: none of {self.tried} changes is surely better on {self.n:,} images, "
            f"which cannot prove a rise of top-1 by less than {100 * self.least_rise:.1f} points"
        )
        if not self.costliest:
            return f"{text}; none is surely worse either"
        costs = "; ".join(
            f"{finding.name} ({100 * finding.top1_change:+.1f} points, loss {finding.loss_change:+.2f})"
            for finding in self.costliest[:3]
        )
        return f"{text}; what would cost most: {costs}"

    def _mismatch(self, likely: Finding) -> str:
        before, after = f"{self.top1:.1%}", f"{likely.top1:.1%}"
        if likely.p_top1 <= SIGNIFICANCE:
            gain = f"top-1 rises from {before} to {after} (McNemar p = {likely.p_top1:.1g})"
        else:
            gain = (
                f"the loss falls from {self.loss:.3f} to {likely.loss:.3f} (paired p = {likely.p_loss:.1g}; "
                f"top-1 {after}, now {before})"
            )
        rivals = ", ".join(finding.name for finding in self.rivals)
        as_good = f"; these do about as well: {rivals}" if rivals else ""
        return (
            f"likely mismatch: {likely.setting}; with {likely.name} {gain}{as_good}. "
            "Changes were made one at a time: set this one, and ask again"
        )
