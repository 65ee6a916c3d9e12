"""What the demo measured."""

from __future__ import annotations

from typing import Any

from stablegen.core.frozen import Frozen
from stablegen.core.verdict import Verdict


class Flip(Frozen):
    """The first step at which a prompt's answer beside other prompts differs from its answer alone."""

    prompt: str
    situation: str
    step: int
    alone: str
    beside: str
    margin: float


class Measured(Frozen):
    """One policy and dtype over all situations: how many score rows moved, by how much, and which tokens flipped.

    Rows are compared bit for bit, up to the first flip; ``largest`` is the largest difference of a score.
    """

    policy: str
    dtype: str
    rows: int
    moved: int
    largest: float
    flips: list[Flip]
    note: str = ""


class Judged(Frozen):
    """One call of the cache: how the record was computed, how the client would compute it, and the verdict.

    ``truth``: what computing it under the client's numerics gave, where that was done.
    """

    prompt: str
    recorded: str
    current: str
    cached: bool
    verdict: Verdict
    token: str | None = None
    runner_up: str | None = None
    truth: str = ""


class DemoReport(Frozen):
    """What ``stablegen demo`` measured; ``numerics`` are those that all runs share, device and versions among them."""

    model: str
    numerics: dict[str, Any]
    prompts: int
    situations: list[str]
    measured: list[Measured]
    judged: list[Judged]
    seconds: float
