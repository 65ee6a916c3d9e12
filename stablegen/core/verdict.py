"""The guard's judgements: verdicts, the hits it flagged, and what a self-check found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.policy import Shape

Status = Literal["exact", "stable", "at_risk", "diverged", "unknown"]
Basis = Literal["numerics", "prior", "calibrated", "verified", "none"]
OnRisk = Literal["serve", "warn", "verify", "recompute", "raise"]
"""What happens to a flagged hit."""
DEFAULT_ACCEPTED_RISK = 0.005
"""The probability of divergence up to which a hit is ``stable``, unless the user sets another."""


class Verdict(Frozen):
    """The guard's judgement of one hit under the numerics that would recompute it.

    ``probability`` is that of a divergence anywhere in the answer (None where it is not known); ``step`` is the most
    fragile step or, once ``diverged``, the first that differs, with its ``token``, ``runner_up`` (token ids) and
    ``margin``. ``basis`` says what the probability rests on.
    """

    status: Status
    reason: str
    basis: Basis = "none"
    probability: float | None = None
    step: int | None = None
    token: int | None = None
    runner_up: int | None = None
    margin: float | None = None

    @property
    def flagged(self) -> bool:
        """Return whether ``on_risk`` applies: anything but ``exact`` and ``stable``."""
        return self.status not in ("exact", "stable")


class FlaggedHit(Frozen):
    """A hit that was flagged, as ``stablegen warnings`` lists it.

    ``token`` and ``runner_up`` are the texts of the two tokens that nearly tie at ``verdict.step``; ``recorded`` and
    ``current`` say in words under which numerics the answer was computed and would be recomputed.
    """

    key: str
    app: str | None
    prompt: str
    verdict: Verdict
    token: str | None
    runner_up: str | None
    recorded: str
    recorded_digest: str
    current: str
    current_digest: str
    seen: float


class SelfCheck(Frozen):
    """Whether a policy keeps its promise under one numerics with one model; ``checks`` says what was compared.

    ``passed``: no bit changed. ``slot_free``: a row's slot in the batch changed none either. ``shape``: that measured.
    """

    numerics: Numerics
    shape: Shape = Shape()
    passed: bool
    slot_free: bool = False
    checks: dict[str, str] = Field(default_factory=dict)
