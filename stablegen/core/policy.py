"""Execution policies: in which batches requests run. Planning is pure; it sees lengths, never tokens.

The shape in which a request runs is a function of that request alone, never of what else is waiting. ``native`` is
the control: it runs whatever comes together, as transformers would, and promises nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stablegen.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stablegen.core.request import Request

BUCKET = 64
"""Widths of padded batches are multiples of this many tokens."""
CAPACITY_STEP = 256
"""Capacities of KV caches of fixed length are multiples of this many tokens."""
MAX_PADDED_ROWS = 4096
ACCEPTED = f"'single', 'padded:N' with N from 1 to {MAX_PADDED_ROWS}, 'invariant', or 'native' (the control)"


class Shape(NamedTuple):
    """What a policy fixes for one request, whatever else is waiting; requests of one shape may share a batch.

    ``width`` is the padded length of the prompt in tokens; None where prompts are not padded to a common width
    (``single``, ``invariant``) or only to the longest of them (``native``). ``capacity`` is the length of the KV
    cache in tokens; None where it grows with the answer. ``scored``: of how many positions at the end scores are
    computed, where continuations are scored; 0 where that is each one's own length, None where nothing is scored.
    """

    width: int | None = None
    capacity: int | None = None
    scored: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that run together: a request, or None for a filler row; the rest as in ``Shape``."""

    rows: tuple[Request | None, ...]
    width: int | None = None
    capacity: int | None = None
    scored: int | None = None

    @property
    def requests(self) -> list[tuple[int, Request]]:
        """Return (slot, request) of the rows that are not filler."""
        return [(slot, row) for slot, row in enumerate(self.rows) if row is not None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What planning must know of the engine: the context in tokens.

    ``slot_free`` is False where the self-check found that a row's slot moves its bits; then every request of a
    padded batch stands in slot 0 of a batch of its own. ``static_cache`` says that the engine's KV cache has a fixed
    length, which is then part of every batch's shape.
    """

    context: int
    slot_free: bool = True
    static_cache: bool = False


def capacity_for(tokens: int) -> int:
    """Return the length of a KV cache that holds so many tokens: few lengths, and at most a quarter too long.

    Up to 2048 tokens it is the next multiple of ``CAPACITY_STEP``; with each doubling beyond, the step doubles.
    """
    step = max(CAPACITY_STEP, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


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

    def shape_of(self, request: Request, limits: Limits) -> Shape:
        """Return the shape in which a request runs."""
        if request.continuation:
            return self.scoring_shape(len(request.given), len(request.continuation), limits)
        return self.shape(len(request.prompt_ids), request.params.max_new_tokens, limits)

    def scoring_shape(self, length: int, scored: int, limits: Limits) -> Shape:
        """Return the shape in which ``scored`` tokens are scored, they and their prompt being ``length`` tokens.

        Its width may exceed the context, as no row may be full; positions never do.
        """
        width = self.width(length, length + BUCKET)
        return Shape(width, None, 0 if width is None else min(-(-scored // BUCKET) * BUCKET, width))

    def shape(self, length: int, new: int, limits: Limits) -> Shape:
        """Return the shape in which a prompt of ``length`` tokens and at most ``new`` generated ones run."""
        width = self.width(length, limits.context)
        # padding takes places too, so a capacity may exceed the context; positions never do
        return Shape(width, capacity_for((width or length) + new) if limits.static_cache else None)

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
        return [Batch((request,), *self.shape_of(request, limits)) for request in requests]


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
        """Return batches of one shape each, short groups filled with filler rows."""
        buckets: dict[Shape, list[Request]] = {}
        for request in requests:
            buckets.setdefault(self.shape_of(request, limits), []).append(request)
        batches = []
        real = self.rows if limits.slot_free else 1
        for shape, members in sorted(buckets.items(), key=lambda item: _sortable(item[0])):
            for start in range(0, len(members), real):
                group = members[start : start + real]
                batches.append(Batch((*group, *[None] * (self.rows - len(group))), *shape))
        return batches


@dataclass(frozen=True, slots=True)
class Invariant(ExecutionPolicy):
    """Any batch, through batch-invariant kernels; GPT-2 only."""

    @property
    def spec(self) -> str:
        """Return ``invariant``."""
        return "invariant"

    def scoring_shape(self, length: int, scored: int, limits: Limits) -> Shape:
        """Return the one shape there is: one pass over any tokens gives what decoding them would."""
        return Shape()

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return everything as one batch: the engine runs what fits, and composition cannot matter."""
        return [Batch(tuple(requests))] if requests else []


@dataclass(frozen=True, slots=True)
class Native(ExecutionPolicy):
    """Transformers' own behaviour at whatever batch it is given; promises nothing."""

    promises = False

    @property
    def spec(self) -> str:
        """Return ``native``."""
        return "native"

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return everything as one batch, what is scored apart from what is generated."""
        generated = [request for request in requests if not request.continuation]
        scored = [request for request in requests if request.continuation]
        return [Batch(tuple(rows)) for rows in (generated, scored) if rows]


def _sortable(shape: Shape) -> tuple[int, ...]:
    return tuple(-1 if part is None else part for part in shape)


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
