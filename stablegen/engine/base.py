"""What the client asks of an engine; imports no torch, so that planning needs none."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Limits
from stablegen.core.record import Composition, FinishReason
from stablegen.core.request import Request
from stablegen.core.trace import Trace

if TYPE_CHECKING:
    import torch

Observer = Callable[[int, "torch.Tensor"], None]
"""Sees each step of each request: its slot, and the full score row [V] in float32."""
Listener = Callable[[int, int, Sequence[int]], None]
"""Hears the token ids of each request as they are known: its slot, the step of the first, and the ids.

Where a batch had to begin anew, steps are heard again.
"""
Stopper = Callable[[Sequence[int]], bool]
"""Says whether an answer's token ids, whose last has just been chosen, are all of it."""
Follow = Mapping[int, Sequence[int]]
"""By slot, the token ids of an answer that decoding is led along."""
Answer = tuple[Request, tuple[int, ...]]
"""A request, and the token ids of an answer to it, or of its beginning."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One finished request: its trace, why it ended, how its batch was composed, and how long that took (seconds).

    ``logprobs``: of each token of a request's continuation, where it has one.
    """

    request: Request
    trace: Trace
    finish_reason: FinishReason
    composition: Composition
    seconds: float
    logprobs: tuple[float, ...] = ()


class Engine(Protocol):
    """Runs planned batches of one model under one ``Numerics``."""

    numerics: Numerics
    limits: Limits

    def generate(
        self, batch: Batch, observe: Observer | None = None, listen: Listener | None = None
    ) -> Generator[Generated, None, None]:
        """Yield each request of the batch as it finishes; closed early, drop the rest.

        Of a request with a continuation, the trace tells what would have been chosen at each of its steps. Raises
        ``NonFiniteScoresError`` for a request whose scores became NaN or infinite, after all others of its batch were
        yielded; ``DeviceMemoryError`` where the batch does not fit.
        """
        ...


@runtime_checkable
class ForcingEngine(Engine, Protocol):
    """An engine in which computing an answer's tokens at once gives the scores of decoding them one by one."""

    def force(
        self, answers: Sequence[Answer], observe: Observer | None = None
    ) -> Generator[tuple[int, Trace], None, None]:
        """Yield what decoding would choose at each step of each answer, with its place, if it were right up to there.

        Raises as ``generate`` does.
        """
        ...

    def resume(self, begun: Sequence[Answer]) -> Generator[Generated, None, None]:
        """Yield what follows the beginnings of answers; ``composition.slot`` is the place. Raises as ``generate``."""
        ...

    def stopper(self, request: Request) -> Stopper | None:
        """Return what ends a request's answer besides its end tokens and its length; None where nothing does."""
        ...


@runtime_checkable
class FollowingEngine(Engine, Protocol):
    """An engine that can be led along given answers, one step after the other."""

    def follow(
        self, batch: Batch, answers: Follow, observe: Observer | None = None
    ) -> Generator[Generated, None, None]:
        """Yield the requests of a batch, each with what would have been chosen at each step of its answer.

        Raises as ``generate`` does.
        """
        ...
