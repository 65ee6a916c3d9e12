"""What every call of a client shares, and what a client knows of its model at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stablegen.core.bounded import Bounded
from stablegen.core.numerics import Numerics
from stablegen.core.policy import ExecutionPolicy
from stablegen.core.verdict import OnRisk
from stablegen.guard.judge import Judge
from stablegen.session.intake import Intake
from stablegen.session.runner import Runner
from stablegen.sources.base import Source
from stablegen.store.cache import Cache

KNOWN_FLAGS = 65536
"""Flagged hits that are remembered, so that each is written once."""


class State(NamedTuple):
    """A model as it was seen at one moment.

    ``planned``: the numerics that were planned; ``numerics``: those that its engine was found to have, where it runs.
    """

    intake: Intake
    planned: Numerics
    numerics: Numerics


@dataclass(frozen=True, slots=True)
class Parts:
    """The working parts of a client; ``flagged``: hits that are in the cache's list already."""

    source: Source
    cache: Cache
    judge: Judge
    runner: Runner
    policy: ExecutionPolicy
    on_risk: OnRisk
    app: str | None
    flagged: Bounded[tuple[str, str], bool]
