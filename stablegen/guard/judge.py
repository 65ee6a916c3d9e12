"""Judge cached answers by the self-checks and calibrations in their cache, each read once."""

from __future__ import annotations

from stablegen.core.bounded import Bounded
from stablegen.core.calibration import Calibration
from stablegen.core.numerics import Numerics
from stablegen.core.policy import Shape
from stablegen.core.record import Record
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.verdict import SelfCheck, Verdict
from stablegen.guard.verdicts import compare, judge
from stablegen.machine.plan import processed
from stablegen.store.cache import Cache

KNOWN = 4096
"""The most self-checks, and the most calibrations, that are kept in memory."""
_UNREAD = object()


class Judge:
    """Judges cached answers under any numerics.

    ``accepted_risk``: the probability of divergence up to which a hit is ``stable``. Threads may share a judge.
    """

    def __init__(self, cache: Cache, accepted_risk: float) -> None:
        self.accepted_risk = accepted_risk
        self._cache = cache
        self._checks: Bounded[tuple[str, str, Shape], SelfCheck] = Bounded(KNOWN)
        self._calibrations: Bounded[tuple[str, str, str], object] = Bounded(KNOWN)

    def judge(self, record: Record, numerics: Numerics) -> Verdict:
        """Return the verdict on a record if it were recomputed under ``numerics``."""
        current = numerics_for(record.request, numerics)
        check, calibration = None, None
        if record.numerics.digest == current.digest:  # under other numerics nothing is promised
            check = self.check(record.request.model, current, record.composition.shape)
        if check is None or not check.passed or record.composition.slot:
            calibration = self.calibration(record, current)
        return judge(record, current, check=check, accepted_risk=self.accepted_risk, calibration=calibration)

    def compare(self, old: Record, fresh: Record, *, how: str = "recomputed") -> Verdict:
        """Return the verdict on a hit that was recomputed; ``how`` begins its reason."""
        check = self.check(fresh.request.model, fresh.numerics, fresh.composition.shape)
        return compare(old, fresh, check=check, how=how)

    def check(self, model: ModelIdentity, numerics: Numerics, shape: Shape) -> SelfCheck | None:
        """Return the self-check of a policy in a shape; None where there was none."""
        place = model.canonical, numerics.digest, shape
        known = self._checks.get(place)
        if known is None:
            known = self._cache.self_check(model, numerics, shape)
            if known is not None:
                self._checks[place] = known
        return known

    def learn(self, model: ModelIdentity, check: SelfCheck) -> None:
        """Remember a self-check made just now."""
        self._checks[model.canonical, check.numerics.digest, check.shape] = check

    def calibration(self, record: Record, current: Numerics) -> Calibration | None:
        """Return the calibration from a record's numerics to ``current`` for its model; None where there is none."""
        pair = record.request.model.canonical, record.numerics.digest, current.digest
        found = self._calibrations.get(pair, _UNREAD)
        if found is _UNREAD:
            found = self._cache.calibration(record.request.model, record.numerics, current)
            self._calibrations[pair] = found
        assert found is None or isinstance(found, Calibration)
        return found

    def learn_calibration(self, made: Calibration) -> None:
        """Remember a calibration made just now."""
        self._calibrations[made.model.canonical, made.recorded.digest, made.current.digest] = made


def numerics_for(request: Request, numerics: Numerics) -> Numerics:
    """Return the numerics of a request's answer: ``numerics``, with score processing where the request needs it."""
    return processed(numerics) if request.params.processed else numerics
