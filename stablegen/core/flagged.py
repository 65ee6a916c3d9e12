"""A hit that was flagged."""

from __future__ import annotations

from stablegen.core.answer import Verdict
from stablegen.core.frozen import Frozen


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
