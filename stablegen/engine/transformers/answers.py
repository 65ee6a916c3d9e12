"""The answers of one batch as they grow, one token a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from stablegen.core.policy import Batch, Shape
from stablegen.core.record import Composition, FinishReason
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import NO_ANSWERS, Answers, Generated, Listener, Stopper
from stablegen.engine.compute import raise_failed, unsigned
from stablegen.kernels.base import RowSummary


@dataclass(slots=True)
class _Row:
    request: Request
    given: Sequence[int] = ()
    """Where it is teacher-forced, the token ids that are fed in place of those chosen."""
    stops: Stopper | None = None
    tokens: list[int] = field(default_factory=list)
    runner_ups: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    runner_up_scores: list[float] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def finish_reason(self) -> FinishReason | None:
        params = self.request.params
        if not self.given and (
            self.tokens[-1] in params.eos_token_ids or (self.stops is not None and self.stops(self.tokens))
        ):
            return "stop"
        return "length" if len(self.tokens) == (len(self.given) or params.max_new_tokens) else None

    def newest(self) -> int:
        return self.given[len(self.tokens) - 1] if self.given else self.tokens[-1]

    def trace(self) -> Trace:
        return Trace.of(self.tokens, self.runner_ups, self.scores, self.runner_up_scores, unsigned(self.hashes))


class GrowingAnswers:
    """The answers of a batch as they grow; ``live`` are the slots whose answers are not finished.

    ``shape``: the one in which the batch runs. ``answers``: of requests that are teacher-forced, the token ids that are
    fed in place of those chosen. ``stopper`` makes what ends a request's answer besides its end tokens, ``listen``
    hears every token.
    """

    def __init__(
        self,
        batch: Batch,
        shape: Shape,
        answers: Answers = NO_ANSWERS,
        *,
        stopper: Callable[[Request], Stopper | None] = lambda _: None,
        listen: Listener | None = None,
    ) -> None:
        self._batch = batch
        self._shape = shape
        self._listen = listen
        self._rows = {
            slot: _Row(request, answers.get(request, ()), stopper(request)) for slot, request in batch.requests
        }
        self._failed: list[tuple[Request, int]] = []
        self._started = time.perf_counter()
        self.live = list(self._rows)
        self.teacher_forced = bool(answers)

    def request(self, slot: int) -> Request:
        """Return the request of a slot."""
        return self._rows[slot].request

    def newest(self) -> list[int]:
        """Return the token that each live slot is fed next."""
        return [self._rows[slot].newest() for slot in self.live]

    def add(self, slots: Sequence[int], summary: RowSummary) -> Iterator[Generated]:
        """Take one step, the ``summary`` of M rows, of the M ``slots``; yield what it finishes.

        Slots that are not live are ignored.
        """
        columns = (summary.tokens, summary.scores, summary.hashes, summary.finite)
        steps = zip(slots, *(column.tolist() for column in columns), strict=True)
        live = set(self.live)
        for slot, (token, runner_up), (score, runner_up_score), hash_value, finite in steps:
            if slot not in live:
                continue
            row = self._rows[slot]
            if not finite:
                self._failed.append((row.request, len(row.tokens)))
                self.live.remove(slot)
                continue
            row.tokens.append(token)
            row.runner_ups.append(runner_up)
            row.scores.append(score)
            row.runner_up_scores.append(runner_up_score)
            row.hashes.append(hash_value)
            if self._listen is not None:
                self._listen(row.request, len(row.tokens) - 1, [token])
            reason = row.finish_reason()
            if reason is None:
                continue
            self.live.remove(slot)
            yield Generated(
                row.request,
                row.trace(),
                reason,
                Composition(len(self._batch.rows), len(self._rows), slot, self._shape),
                time.perf_counter() - self._started,
            )

    def check(self) -> None:
        """Raise ``NonFiniteScoresError`` where a row failed."""
        raise_failed(self._failed)
