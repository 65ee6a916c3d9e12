"""The parts that all calls of a client share, and a snapshot of its model."""

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
"""The most flagged hits that are kept in memory, so that each is written once."""


class State(NamedTuple):
    """A snapshot of a model.

    ``planned``: the planned numerics; ``numerics``: those of the engine, once it was started, else the planned ones.
    """

    intake: Intake
    planned: Numerics
    numerics: Numerics


@dataclass(frozen=True, slots=True)
class Parts:
    """The working parts of a client; ``flagged``: hits that are already in the cache's list."""

    source: Source
    cache: Cache
    judge: Judge
    runner: Runner
    policy: ExecutionPolicy
    on_risk: OnRisk
    app: str | None
    flagged: Bounded[tuple[str, str], bool]
