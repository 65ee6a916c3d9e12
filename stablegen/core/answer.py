"""What the caller gets: completions, scores and verifications."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

from stablegen.core.record import Record
from stablegen.core.trace import Trace
from stablegen.core.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request.

    ``cached`` says whether it came from the cache. ``verdict``: whether a run now would repeat it; for an answer
    computed just now, how a later hit would be judged, or, where it replaces a hit, how the two compare.
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
    """How probable a continuation is after its prompt.

    The verdict is ``exact`` where scoring it again gives the same digits, and ``stable`` where digits may differ but
    the probability that another token gets the highest score at any step is at most ``accepted_risk``.
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
    """The result of verifying a cached answer: its ``record``, compared with ``fresh``, the record of a run made now.

    ``verdict`` is ``exact`` (same bits), ``stable`` (same tokens) or ``diverged`` at ``verdict.step``. ``fresh`` is
    None where only the first steps were replayed, because the margins of the rest are too wide to flip.
    """

    record: Record
    fresh: Record | None
    verdict: Verdict

    @property
    def continuations(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the cached and the fresh token ids from the first step that differs; both empty where none does."""
        step = self.verdict.step
        if self.fresh is None or self.verdict.status != "diverged" or step is None:
            return (), ()
        return self.record.token_ids[step:], self.fresh.token_ids[step:]
