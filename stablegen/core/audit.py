"""What an audit found: values alone."""

from __future__ import annotations

from typing import Literal

from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.verdict import Verdict

Outcome = Literal["bits", "tokens", "diverged"]
"""What came of computing an answer anew: every score row's bits, the same tokens, or others."""
OUTCOMES: tuple[Outcome, ...] = ("bits", "tokens", "diverged")
CONFIDENCE = 0.95


class Share(Frozen):
    """How many of how many; ``low`` and ``high`` bound the share with 95 % confidence (Clopper and Pearson, exact)."""

    count: int
    of: int
    value: float | None
    low: float
    high: float

    @classmethod
    def over(cls, count: int, of: int) -> Share:
        """Return the share; of none it is unknown, and may be anything."""
        if not of:
            return cls(count=0, of=0, value=None, low=0.0, high=1.0)
        from scipy.stats import binomtest  # heavy, and wanted here alone

        bounds = binomtest(count, of).proportion_ci(CONFIDENCE, method="exact")
        return cls(count=count, of=of, value=count / of, low=float(bounds.low), high=float(bounds.high))


class Bin(Frozen):
    """Answers whose predicted probability of diverging lies between two bounds; ``predicted`` is their mean."""

    low: float
    high: float
    predicted: float
    observed: Share


class AuditedHit(Frozen):
    """One cached answer: what the guard said of it, and what came of computing it anew.

    ``step`` is the first that differs.
    """

    key: str
    prompt: str
    verdict: Verdict
    outcome: Outcome
    step: int | None = None

    @property
    def wrong(self) -> str | None:
        """Return what was wrong with the verdict; None where it was right."""
        if self.verdict.status == "exact" and self.outcome != "bits":
            return "not exact"
        if self.verdict.status == "stable" and self.outcome == "diverged":
            return "missed"
        if self.verdict.flagged and self.outcome != "diverged":
            return "false alarm"
        return None


class Threshold(Frozen):
    """What flagging answers of at least a predicted probability would have come to.

    ``flagged``: the share of all. ``precision``: of the flagged, the share that diverged. ``recall``: of those that
    diverged, the share flagged; None where none did.
    """

    threshold: float
    flagged: float
    precision: float
    recall: float | None


class AuditReport(Frozen):
    """What an audit found.

    ``audited`` answers of ``records`` in the cache, ``skipped`` by reason. ``table``: verdict -> outcome -> answers.
    ``recall``: of the answers that diverged, those flagged; ``precision``: of the flagged, those that diverged.
    ``brier``: mean squared error of the predicted probabilities; ``calibration_error``: their distance from what was
    observed, a mean over ``reliability``'s bins by size. ``exact``: of the answers called so, those with equal bits.
    ``curve``: precision and recall from the highest threshold to the lowest. ``made`` is Unix time.
    """

    model: str
    numerics: Numerics
    app: str | None
    accepted_risk: float
    records: int
    audited: int
    skipped: dict[str, int]
    table: dict[str, dict[str, int]]
    exact: Share
    recall: Share
    precision: Share
    reliability: list[Bin]
    curve: list[Threshold]
    brier: float | None
    calibration_error: float | None
    wrong: list[AuditedHit]
    made: float
    seconds: float

    @property
    def broken(self) -> bool:
        """Return whether an answer that was called ``exact`` was not."""
        return self.exact.count < self.exact.of
