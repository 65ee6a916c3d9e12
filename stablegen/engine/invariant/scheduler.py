"""Continuous batching: which rows take part in the next pass. It is logic on the host; no tensor is touched.

Tasks are admitted in order while slots and pages last. Rows whose given tokens are not computed yet take part with a
chunk of them, all others with one token. A row leaves when its last step is scheduled, which its budget tells in
advance, or when its end token is read, some passes later; what ran beyond it is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from stablegen.core.record import FinishReason
from stablegen.core.request import Request
from stablegen.engine.base import Stopper
from stablegen.engine.invariant.kv_cache import KVCache, Lease
from stablegen.kernels import log


@dataclass(frozen=True, slots=True)
class Task:
    """A request to be run.

    ``answer``: where it is teacher-forced, or has a continuation to score, the token ids at whose steps it is logged
    what would be chosen. ``begun``: the token ids that its answer begins with; it is run from there on.
    """

    slot: int
    """Its place in the batch that was asked for."""
    request: Request
    answer: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()

    @property
    def given(self) -> tuple[int, ...]:
        """Return the token ids known before it runs."""
        return self.request.prompt_ids + (self.answer[:-1] or self.begun)

    @property
    def first(self) -> int:
        """Return the position of the first token that is followed by a step of its own."""
        return len(self.request.prompt_ids) + len(self.begun) - 1

    @property
    def budget(self) -> int:
        """Return how many steps it has at most."""
        return len(self.answer) or self.request.params.max_new_tokens - len(self.begun)

    @property
    def positions(self) -> int:
        """Return how many positions its keys and values take at most."""
        return len(self.given) + (0 if self.answer else self.budget)


@dataclass(slots=True, eq=False)
class Row:
    """A task that runs: how far its passes are scheduled, and what has been read of them."""

    task: Task
    lease: Lease
    computed: int
    """Positions whose keys and values are scheduled."""
    scheduled: int = 0
    """Steps that are scheduled."""
    logged: list[npt.NDArray[Any]] = field(default_factory=list)
    """What was read of the log, in order: [N, WIDTH] int32 each, see ``kernels.log``."""
    steps: int = 0
    """Steps that were read."""
    finish_reason: FinishReason | None = None
    failed: bool = False
    logprobs: list[Any] = field(default_factory=list)
    """Of each token of a continuation, as tensors of the device."""
    given: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.given = self.task.given

    @property
    def slot(self) -> int:
        """Return its place in the batch that was asked for."""
        return self.task.slot

    @property
    def request(self) -> Request:
        """Return what it runs for."""
        return self.task.request

    @property
    def finished(self) -> bool:
        """Return whether it has ended or failed."""
        return self.failed or self.finish_reason is not None

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the token ids that end it."""
        return () if self.task.answer else self.request.params.eos_token_ids

    @property
    def tokens(self) -> list[int]:
        """Return the token ids of its answer as far as they are known."""
        return [*self.task.begun, *(int(token) for words in self.logged for token in words[:, log.TOKEN])]

    def read(self, words: npt.NDArray[Any], may_end: bool = True, stops: Stopper | None = None) -> bool:
        """Take the words [N, WIDTH] of its next steps from the log; return whether it ends with one of them.

        ``may_end``: whether any of them may report a failure or hold a token that ends an answer. ``stops``: what else
        may end it.
        """
        tokens = [] if stops is None else self.tokens
        if not may_end and stops is None:
            words = words[: self.task.budget - self.steps]
            self._take(words)
            if self.steps == self.task.budget:
                self.finish_reason = "length"
            return self.finished
        for count, step in enumerate(words.tolist(), start=1):
            token = step[log.TOKEN]
            tokens.append(token)
            if not step[log.FINITE]:
                self.failed = True
            elif token in self.ends or (stops is not None and stops(tokens)):
                self.finish_reason = "stop"
            elif self.steps + count == self.task.budget:
                self.finish_reason = "length"
            if self.finished:
                self._take(words[:count])
                return True
        self._take(words)
        return False

    def _take(self, words: npt.NDArray[Any]) -> None:
        self.logged.append(words)
        self.steps += len(words)

    @property
    def left(self) -> int:
        """Return how many steps are not scheduled yet."""
        return self.task.budget - self.scheduled

    @property
    def unscheduled(self) -> int:
        """Return how many of its given tokens are not scheduled yet."""
        return max(0, len(self.given) - self.computed)

    def choices(self, count: int) -> int:
        """Return how many of its next tokens are followed by a step of its own."""
        return max(0, self.computed + count - max(self.computed, self.task.first))

    def fit(self, count: int, choices: int) -> int:
        """Return how many of its next ``count`` tokens fit into a pass that has room for so many more ``choices``."""
        return count - max(0, self.choices(count) - choices)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one row contributes to a pass: ``count`` of its given tokens from ``start`` on, or its newest token (-1)."""

    row: Row
    start: int
    count: int
    choices: int
    """For how many of its last tokens scores are computed, and a token chosen."""


class Scheduler:
    """Admits tasks and composes passes of at most ``chunk`` given tokens and at most ``choices`` steps."""

    def __init__(self, tasks: Iterable[Task], cache: KVCache, *, chunk: int, choices: int | None = None) -> None:
        self._waiting = deque(tasks)
        self._cache = cache
        self._chunk = chunk
        self._choices = choices or chunk
        self.running: list[Row] = []

    @property
    def busy(self) -> bool:
        """Return whether anything is left to be scheduled."""
        return bool(self._waiting or self.running)

    def admit(self) -> None:
        """Let waiting tasks in, in order, while slots and pages last."""
        while self._waiting:
            task = self._waiting[0]
            # scores are needed from the prompt's last token on, so everything that follows it is computed
            lease = self._cache.lease(task.given, task.positions, share=task.first)
            if lease is None:
                assert self.running, "a request that can never fit was refused before"
                return
            self._waiting.popleft()
            self.running.append(Row(task, lease, lease.shared))

    def compose(self) -> tuple[list[Piece], int]:
        """Return the next pass, and how often it may repeat.

        Each row that decodes contributes one token, the others chunks of what they are given.
        """
        room, choices = self._chunk, self._choices
        pieces = []
        for row in self.running:
            if row.unscheduled == 0:
                pieces.append(Piece(row, -1, 1, choices=1))
        choices -= len(pieces)
        for row in self.running:
            count = row.fit(min(row.unscheduled, room), choices)
            if count:
                # rows admitted earlier compute first: a page shared with them is written before it is read
                pieces.append(Piece(row, row.computed, count, row.choices(count)))
                room -= count
                choices -= pieces[-1].choices
        if any(piece.start >= 0 for piece in pieces):
            return pieces, 1
        return pieces, min(row.left for row in self.running)

    def count(self, pieces: list[Piece], times: int) -> None:
        """Count a pass as run so many times; rows leave whose last step that was."""
        for piece in pieces:
            row = piece.row
            row.computed += piece.count * times
            row.scheduled += piece.choices * times
            if row.left == 0:
                self._leave(row)

    def drop(self, row: Row) -> None:
        """Take a row out of the passes to come, where it has not left by itself."""
        if row in self.running:
            self._leave(row)

    def close(self) -> None:
        """Give everything back; prompts that were not computed are not shared."""
        for row in self.running:
            self._cache.release(row.lease, forget=True)
        self.running.clear()
        self._waiting.clear()

    def _leave(self, row: Row) -> None:
        # its slot and pages may go to others at once: their passes come later on the same stream
        self.running.remove(row)
        self._cache.release(row.lease)
