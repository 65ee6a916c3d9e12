"""What the caller gets: completions, scores and verifications."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

from stablegen.core.record import Record
from stablegen.core.trace import Trace
from stablegen.core.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Completion:
    """What the caller gets.

    ``cached`` says whether the answer stood in the cache; for one computed just now, ``verdict`` is what it would be
    judged if it were asked for again (or, where it replaces a hit, how the two compare).
    """

    record: Record
    cached: bool
    verdict: Verdict

    @property
    def text(self) -> str:
        """Return the generated text, without the prompt and without special tokens."""
        return self.record.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the generated token ids, an end token included."""
        return self.record.token_ids

    @property
    def key(self) -> str:
        """Return the request's key."""
        return self.record.key

    @property
    def trace(self) -> Trace | None:
        """Return the steps' tokens, runner-ups, scores and hashes."""
        return self.record.trace


@dataclass(frozen=True, slots=True)
class Score(Completion):
    """How probable a continuation is after its prompt; ``exact`` where scoring it again gives the same digits.

    ``stable``: other digits, but the same tokens have the highest scores, as far as ``accepted_risk`` goes.
    """

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Return the natural logarithm of each token's probability, float32."""
        return self.record.logprobs

    @property
    def logprob(self) -> float:
        """Return the natural logarithm of the continuation's probability: the sum, rounded once."""
        return fsum(self.record.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Return whether greedy decoding would give this continuation."""
        return self.record.token_ids == self.record.request.continuation


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of verifying a cached answer: the ``record`` that was held against ``fresh``, a run of today.

    ``verdict`` is ``exact`` (same bits), ``stable`` (same tokens) or ``diverged`` at ``verdict.step``. ``fresh`` is
    None where a part of the answer was replayed and the margins of the rest are too wide to matter.
    """

    record: Record
    fresh: Record | None
    verdict: Verdict

    @property
    def continuations(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the cached token ids and the fresh ones from the first step on that differs; empty where none does."""
        step = self.verdict.step
        if self.fresh is None or self.verdict.status != "diverged" or step is None:
            return (), ()
        return self.record.token_ids[step:], self.fresh.token_ids[step:]
