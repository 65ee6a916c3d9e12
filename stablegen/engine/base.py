"""What the client asks of an engine; imports no torch, so that planning needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stablegen.numerics import Numerics
from stablegen.policy import Batch, Limits
from stablegen.record import Composition, FinishReason, Trace
from stablegen.request import Request

if TYPE_CHECKING:
    import torch

Observer = Callable[[int, "torch.Tensor"], None]
"""Sees each step of each request: its slot, and the full score row [V] in float32."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One finished request: its trace, why it ended, how its batch was composed, and how long that took (seconds)."""

    request: Request
    trace: Trace
    finish_reason: FinishReason
    composition: Composition
    seconds: float


class Engine(Protocol):
    """Runs planned batches of one model under one ``Numerics``."""

    numerics: Numerics
    limits: Limits

    def generate(self, batch: Batch, observe: Observer | None = None) -> Iterator[Generated]:
        """Yield each request of the batch as it finishes.

        Raises ``NonFiniteScoresError`` for a request whose scores became NaN or infinite, after all others of its
        batch were yielded; ``DeviceMemoryError`` where the batch does not fit.
        """
        ...
