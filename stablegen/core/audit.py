"""The results of an audit, as values."""

from __future__ import annotations

from typing import Literal

from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.verdict import Verdict

Outcome = Literal["bits", "tokens", "diverged"]
"""How a recomputed answer compares: the same bits in every score row, the same tokens, or other tokens."""
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
        """Return the share ``count / of``; where ``of`` is 0 it is unknown, between 0 and 1."""
        if not of:
            return cls(count=0, of=0, value=None, low=0.0, high=1.0)
        from scipy.stats import binomtest  # slow to import, and needed only here

        bounds = binomtest(count, of).proportion_ci(CONFIDENCE, method="exact")
        return cls(count=count, of=of, value=count / of, low=float(bounds.low), high=float(bounds.high))


class Bin(Frozen):
    """Answers whose predicted probability of diverging lies between two bounds; ``predicted`` is their mean."""

    low: float
    high: float
    predicted: float
    observed: Share


class AuditedHit(Frozen):
    """One cached answer: the guard's verdict on it, and how the recomputed answer compares.

    ``step`` is the first step that differs.
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
    """The outcome of flagging every answer whose predicted probability is at least ``threshold``.

    ``flagged``: the share of all answers. ``precision``: the share of flagged answers that diverged. ``recall``: the
    share of diverged answers that were flagged; None where none diverged.
    """

    threshold: float
    flagged: float
    precision: float
    recall: float | None


class AuditReport(Frozen):
    """The result of an audit.

    ``records``: answers in the cache; ``audited``: those recomputed; ``skipped``: the others, counted by reason.
    ``table``: verdict -> outcome -> answers. ``exact``: the share of answers judged ``exact`` whose bits were equal.
    ``recall``: the share of diverged answers that were flagged; ``precision``: of flagged answers that diverged.
    ``brier``: mean squared error of the predicted probabilities; ``calibration_error``: their mean distance from the
    observed shares over the bins of ``reliability``, weighted by answers. ``curve``: precision and recall from the
    highest threshold to the lowest. ``made`` is Unix time.
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
        """Return whether an answer judged ``exact`` came out with other bits."""
        return self.exact.count < self.exact.of
