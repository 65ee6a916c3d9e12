"""What a session asks of an engine; imports no torch, so that planning needs none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Limits
from stablegen.core.record import Composition, FinishReason
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.errors import TeacherForcingError

if TYPE_CHECKING:
    import torch

Observer = Callable[[Request, "torch.Tensor"], None]
"""Sees each step of each request: the request, and the model's own full score row [V] in float32."""
Listener = Callable[[Request, int, Sequence[int]], None]
"""Hears the token ids of each request as they are known: the request, the step of the first, and the ids.

Where a batch had to begin anew, steps are heard again.
"""
Stopper = Callable[[Sequence[int]], bool]
"""Says whether an answer's token ids, whose last has just been chosen, are all of it."""
Answers = Mapping[Request, Sequence[int]]
"""By request, the token ids of an answer to it, or of the answer's beginning."""
NO_ANSWERS: Answers = MappingProxyType({})


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


class Engine(ABC):
    """Runs planned batches of one model under one ``Numerics``.

    ``limits`` say what planning must know, and whether prefill and decode give the same bits
    (``prefill_equals_decode``): then ``begun`` may be given to ``generate``, and an answer can be verified in one pass.
    Generators may be closed early; what has not finished is dropped.
    """

    numerics: Numerics
    limits: Limits

    @abstractmethod
    def generate(
        self,
        batch: Batch,
        observe: Observer | None = None,
        listen: Listener | None = None,
        *,
        begun: Answers = NO_ANSWERS,
    ) -> Generator[Generated, None, None]:
        """Yield each request of the batch as it finishes.

        Of a request with a continuation, the trace tells what would have been chosen at each of its steps. ``begun``:
        the first tokens of some answers, at whose steps nothing is chosen; what is yielded of those follows them. Only
        an engine whose ``limits.prefill_equals_decode`` takes it. Raises ``NonFiniteScoresError`` for a request whose
        scores became NaN or infinite, after all others of its batch were yielded; ``DeviceMemoryError`` where the batch
        does not fit; ``NumericsChangedError`` where torch's flags are no longer those of ``numerics``.
        """

    def follow(
        self, batch: Batch, answers: Answers, observe: Observer | None = None
    ) -> Generator[Generated, None, None]:
        """Teacher-force: yield the requests of a batch, each with what would be chosen at each step of its answer.

        Each step sees the answer's own tokens before it, whatever would have been chosen. Raises as ``generate``, and
        ``TeacherForcingError`` where an engine cannot.
        """
        raise TeacherForcingError(
            f"{type(self).__name__} cannot score given tokens, so its answers can be neither calibrated nor replayed",
            hint="Use a client whose policy runs on one of stablegen's own engines",
        )

    def forget(self) -> None:  # noqa: B027 - most engines share nothing between requests
        """Let later requests share nothing that earlier ones computed, which moves no bit."""

    def close(self) -> None:  # noqa: B027 - an engine may hold nothing
        """Release what the engine holds."""
