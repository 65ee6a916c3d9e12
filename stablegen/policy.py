"""Execution policies: in which batches requests run. Planning is pure; it sees lengths, never tokens.

The shape in which a request runs is a function of that request alone, never of what else is waiting. ``native`` is
the control: it runs whatever comes together, as transformers would, and promises nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stablegen.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablegen.request import Request

BUCKET = 64
"""Widths of padded batches are multiples of this many tokens."""
MAX_PADDED_ROWS = 4096
ACCEPTED = f"'single', 'padded:N' with N from 1 to {MAX_PADDED_ROWS}, 'invariant', or 'native' (the control)"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run together: a request, or None for a filler row.

    ``width`` is the padded length of the prompts in tokens; None where prompts are not padded to a common width
    (``single``, ``invariant``) or only to the longest of them (``native``).
    """

    rows: tuple[Request | None, ...]
    width: int | None = None

    @property
    def requests(self) -> list[tuple[int, Request]]:
        """Return (slot, request) of the rows that are not filler."""
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What planning must know of the engine: the context in tokens, and how many rows fit at once.

    ``slot_free`` is False where the self-check found that a row's slot moves its bits; then every request of a
    padded batch stands in slot 0 of a batch of its own.
    """

    context: int
    max_rows: int = 64
    slot_free: bool = True


class ExecutionPolicy(ABC):
    """One way to run requests; ``spec`` is how it is written in settings and on the command line."""

    __slots__ = ()

    promises = True
    """Whether equal ``Numerics`` imply equal bits under this policy."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """Return the name in settings: ``load_policy(policy.spec) == policy``."""

    @abstractmethod
    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return batches that hold each request once."""

    def width(self, length: int, context: int) -> int | None:
        """Return the padded width in tokens of a prompt of ``length`` tokens; None where nothing is padded."""
        return None

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True, slots=True)
class Single(ExecutionPolicy):
    """One row, no padding."""

    @property
    def spec(self) -> str:
        """Return ``single``."""
        return "single"

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return one batch a request."""
        return [Batch((request,)) for request in requests]


@dataclass(frozen=True, slots=True)
class Padded(ExecutionPolicy):
    """Always ``rows`` rows, left-padded to the prompt's own bucket."""

    rows: int

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_PADDED_ROWS:
            raise PolicyError(f"policy 'padded:{self.rows}' asks for {self.rows} rows", accepted=ACCEPTED)

    @property
    def spec(self) -> str:
        """Return ``padded:N``."""
        return f"padded:{self.rows}"

    def width(self, length: int, context: int) -> int:
        """Return the next multiple of ``BUCKET`` above ``length``, or the context.

        It is always wider than the prompt: were a row ever full, a batch of full rows would lose its mask inside
        transformers and run another attention kernel than the same row beside a shorter one.
        """
        return min((length // BUCKET + 1) * BUCKET, context)

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return batches of one width each, short groups filled with filler rows."""
        buckets: dict[int, list[Request]] = {}
        for request in requests:
            buckets.setdefault(self.width(len(request.prompt_ids), limits.context), []).append(request)
        batches = []
        real = self.rows if limits.slot_free else 1
        for width, members in sorted(buckets.items()):
            for start in range(0, len(members), real):
                group = members[start : start + real]
                batches.append(Batch((*group, *[None] * (self.rows - len(group))), width))
        return batches


@dataclass(frozen=True, slots=True)
class Invariant(ExecutionPolicy):
    """Any batch, through batch-invariant kernels; GPT-2 only."""

    @property
    def spec(self) -> str:
        """Return ``invariant``."""
        return "invariant"

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return batches of what fits, in the order given; composition cannot matter."""
        return [
            Batch(tuple(requests[start : start + limits.max_rows]))
            for start in range(0, len(requests), limits.max_rows)
        ]


@dataclass(frozen=True, slots=True)
class Native(ExecutionPolicy):
    """Transformers' own behaviour at whatever batch it is given; promises nothing."""

    promises = False

    @property
    def spec(self) -> str:
        """Return ``native``."""
        return "native"

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return everything as one batch."""
        return [Batch(tuple(requests))] if requests else []


def load_policy(spec: str | ExecutionPolicy) -> ExecutionPolicy:
    """Return the policy written as ``spec``; raise ``PolicyError`` for any other text."""
    if isinstance(spec, ExecutionPolicy):
        return spec
    if isinstance(spec, str):
        fixed: dict[str, ExecutionPolicy] = {"single": Single(), "invariant": Invariant(), "native": Native()}
        if spec in fixed:
            return fixed[spec]
        match = re.fullmatch(r"padded:(\d{1,9})", spec)
        if match:
            return Padded(int(match[1]))
    raise PolicyError(f"unknown policy {spec!r}", accepted=ACCEPTED)
