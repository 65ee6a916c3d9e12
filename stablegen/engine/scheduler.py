"""Continuous batching: which rows take part in the next pass; host logic alone, no tensor is touched.

Requests are admitted in order while slots and pages last. Rows whose prompt is not computed yet take part with a chunk
of it, all others with one token. A row leaves when its last step is scheduled, which its budget tells in advance, or
when its end token is read, some passes later; what ran beyond it is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stablegen.engine.kv_cache import KVCache, Lease
from stablegen.record import FinishReason
from stablegen.request import Request


@dataclass(slots=True, eq=False)
class Row:
    """A request that runs: how far its passes are scheduled, and what has been read of them."""

    slot: int
    """Its place in the batch that was asked for."""
    request: Request
    lease: Lease
    computed: int
    """Positions whose keys and values are scheduled."""
    scheduled: int = 0
    """Steps whose choice is scheduled."""
    steps: list[Sequence[int]] = field(default_factory=list)
    """The log's words of each step that was read."""
    finish_reason: FinishReason | None = None
    failed: bool = False

    @property
    def finished(self) -> bool:
        """Return whether nothing more is to be read of it."""
        return self.failed or self.finish_reason is not None

    def read(self, words: Sequence[int]) -> bool:
        """Take one step's words from the log; return whether it was the last."""
        self.steps.append(words)
        params = self.request.params
        if not words[6]:
            self.failed = True
        elif words[0] in params.eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.steps) == params.max_new_tokens:
            self.finish_reason = "length"
        return self.finished

    @property
    def prompt(self) -> tuple[int, ...]:
        """Return the prompt's token ids."""
        return self.request.prompt_ids

    @property
    def left(self) -> int:
        """Return how many steps are not scheduled yet."""
        return self.request.params.max_new_tokens - self.scheduled

    @property
    def wants(self) -> int:
        """Return how many tokens of the prompt are not scheduled yet."""
        return max(0, len(self.prompt) - self.computed)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one row contributes to a pass: ``count`` tokens from ``start``; or its newest token, with start -1."""

    row: Row
    start: int
    count: int
    chooses: bool
    """Whether the scores behind its last token are wanted."""


class Scheduler:
    """Admits requests and composes passes."""

    def __init__(self, requests: Iterable[tuple[int, Request]], cache: KVCache, *, chunk: int) -> None:
        self._waiting = deque(requests)
        self._cache = cache
        self._chunk = chunk
        self.running: list[Row] = []

    @property
    def busy(self) -> bool:
        """Return whether anything is left to be scheduled."""
        return bool(self._waiting or self.running)

    def admit(self) -> None:
        """Let waiting requests in, in order, while slots and pages last."""
        while self._waiting:
            slot, request = self._waiting[0]
            positions = len(request.prompt_ids) + request.params.max_new_tokens
            lease = self._cache.lease(request.prompt_ids, positions)
            if lease is None:
                assert self.running, "a request that can never fit is refused before"
                return
            self._waiting.popleft()
            self.running.append(Row(slot, request, lease, lease.shared))

    def compose(self) -> tuple[list[Piece], int]:
        """Return the next pass, and how often it may repeat.

        Each row that decodes contributes one token, the others chunks of their prompts.
        """
        room = self._chunk
        pieces = []
        for row in self.running:
            if row.wants == 0:
                pieces.append(Piece(row, -1, 1, chooses=True))
        for row in self.running:
            count = min(row.wants, room)
            if count:
                # whoever was admitted earlier computes first: a page shared with it is written when it is read
                pieces.append(Piece(row, row.computed, count, chooses=count == row.wants))
                room -= count
        if any(piece.start >= 0 for piece in pieces):
            return pieces, 1
        return pieces, min(row.left for row in self.running)

    def count(self, pieces: list[Piece], times: int) -> None:
        """Take a pass as done so many times; rows leave whose last step that was."""
        for piece in pieces:
            row = piece.row
            row.computed += piece.count * times
            row.scheduled += piece.chooses * times
            if row.left == 0:
                self._leave(row)

    def drop(self, row: Row) -> None:
        """Take a row out of the passes to come, where it has not left by itself."""
        if row in self.running:
            self._leave(row)

    def close(self) -> None:
        """Give everything back; prompts that were not computed are known to nobody."""
        for row in self.running:
            self._cache.release(row.lease, forget=True)
        self.running.clear()
        self._waiting.clear()

    def _leave(self, row: Row) -> None:
        # its slot and pages may go to others at once: their passes come later on the same stream
        self.running.remove(row)
        self._cache.release(row.lease)
