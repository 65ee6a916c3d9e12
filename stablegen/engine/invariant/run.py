"""One batch on its way through the batch-invariant engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from stablegen.core.trace import Trace
from stablegen.engine.base import Listener, Observer, Stopper
from stablegen.engine.invariant.kv_cache import TICKS
from stablegen.engine.invariant.scheduler import Piece, Row, Scheduler, Task
from stablegen.engine.sampling import Chooser, upload
from stablegen.engine.transformers.decode import computing, cpu_threads
from stablegen.kernels.base import LOG_WIDTH
from stablegen.kernels.reference import log_probs, words_of

if TYPE_CHECKING:
    from stablegen.engine.invariant.engine import GPT2Engine, Memory

READ_EVERY = 8
"""Passes between two looks at the log."""
UNREAD = 3
"""Looks that may be under way before the host waits for the first of them."""


@dataclass(frozen=True, slots=True)
class _Look:
    """A part of the log on its way to the host: ``words`` [passes, choices, LOG_WIDTH], and what chose in each pass."""

    words: torch.Tensor
    chosen: list[list[Piece]]
    done: torch.cuda.Event | None

    def arrived(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> np.ndarray:
        if self.done is not None:
            self.done.synchronize()
        return self.words.numpy()


class Run:
    """One batch on its way through the engine."""

    def __init__(
        self,
        engine: GPT2Engine,
        scheduler: Scheduler,
        memory: Memory,
        observe: Observer | None,
        listen: Listener | None,
    ) -> None:
        self._engine = engine
        self._model = engine.model
        self._scheduler = scheduler
        self._cache = memory.cache
        self._steps = memory.steps
        self._packed = memory.packed
        self._observe = observe
        self._listen = listen
        self._choosers: dict[int, Chooser] = {}
        self._stoppers: dict[int, Stopper | None] = {}
        self._tick = 0
        self._unread: list[list[Piece]] = []  # of each pass whose log was not sent for, what chose
        self._looks: deque[_Look] = deque()
        self._steps.forget()

    def __iter__(self) -> Iterator[Row]:
        """Yield rows as they are read to their end."""
        scheduler = self._scheduler
        while scheduler.busy or self._unread or self._looks:
            self._engine.order_after_last()
            with computing(self._model.device), cpu_threads(self._engine.numerics.threads):
                if scheduler.busy:
                    scheduler.admit()
                    self._advance()
                if len(self._unread) >= (1 if self._observe else READ_EVERY) or not scheduler.busy:
                    self._look()
            while self._looks and (len(self._looks) > UNREAD or not scheduler.busy or self._looks[0].arrived()):
                yield from self._settle(self._looks.popleft())

    def close(self) -> None:
        """Give back what rows hold that have not finished."""
        self._scheduler.close()

    def _advance(self) -> None:
        """Run the next pass, as often as it may repeat before the log is looked at."""
        self._cache.upload()
        pieces, times = self._scheduler.compose()
        chosen = [piece for piece in pieces if piece.choices]
        shown = self._observe is not None or any(wants_scores(piece.row.task) for piece in chosen)
        vocabulary = self._model.vocabulary if shown else None
        if _width(chosen) > self._cache.slots:
            assert not shown, "a pass that shows its scores logs where the others do"
            self._wide(pieces, chosen)
            self._scheduler.count(pieces, 1)
            return
        if any(piece.start >= 0 for piece in pieces):
            times = 1
            scores = self._packed.run(pieces, self._tick, vocabulary)
            self._steps.forget()
        else:
            times = 1 if shown else min(times, READ_EVERY - len(self._unread))
            slots = tuple(piece.row.lease.slot for piece in chosen)
            for i in range(times):
                scores = self._steps.run(slots, self._tick + i, vocabulary)
        if shown and scores is not None:
            self._look_at(scores, chosen)
        self._scheduler.count(pieces, times)
        if chosen:
            self._unread += [chosen] * times
            self._tick += times

    def _look_at(self, scores: torch.Tensor, chosen: list[Piece]) -> None:
        """Do what the pass's score rows [R, V] are wanted for: be observed, score continuations, choose tokens."""
        choosers: list[Chooser] = []
        steps: list[int] = []
        places: list[int] = []
        fed: list[int] = []  # of the places, those whose token is the slot's newest
        slots: list[int] = []
        first = 0
        for piece in chosen:
            row, request, own = piece.row, piece.row.request, scores[first : first + piece.choices]
            if self._observe is not None:
                for row_scores in own:
                    self._observe(row.slot, row_scores)
            if request.continuation:
                tokens = request.continuation[row.scheduled : row.scheduled + piece.choices]
                row.logprobs.append(log_probs(own, upload(tokens, scores.device)))
            elif request.params.processed:
                if row.slot not in self._choosers:
                    self._choosers[row.slot] = Chooser(request, scores.device, row.task.answer, row.task.begun)
                begun = len(row.task.begun) + row.scheduled
                if not row.task.answer:
                    fed.append(len(places))
                    slots.append(row.lease.slot)
                choosers += [self._choosers[row.slot]] * piece.choices
                steps += range(begun, begun + piece.choices)
                places += range(first, first + piece.choices)
            first += piece.choices
        if choosers:
            at = upload(places, scores.device)
            log = self._cache.log[self._tick % TICKS]
            hashes = log[at, 4:6].contiguous().view(torch.int64)[:, 0]
            best = self._engine.selector.choose(choosers, scores[at], steps, hashes)
            log.index_copy_(0, at, words_of(best))
            if fed:
                newest = best.tokens[upload(fed, scores.device), 0]
                self._cache.newest.index_copy_(0, upload(slots, scores.device), newest.int())

    def _wide(self, pieces: Sequence[Piece], chosen: list[Piece]) -> None:
        """Run a pass that chooses more tokens than the log has rows, and so logs elsewhere."""
        self._look()  # what was chosen before is read before
        self._packed.run(pieces, 0)
        self._steps.forget()
        self._send(self._packed.log[:, : _width(chosen)], [chosen])

    def _look(self) -> None:
        """Send for what the passes since the last look have logged."""
        count = len(self._unread)
        if not count:
            return
        width = max(map(_width, self._unread))
        first = (self._tick - count) % TICKS
        log = self._cache.log[:, :width]
        part = (
            log[first : first + count]
            if first + count <= TICKS
            else torch.cat([log[first:], log[: first + count - TICKS]])
        )
        self._send(part, self._unread)
        self._unread = []

    def _send(self, part: torch.Tensor, chosen: list[list[Piece]]) -> None:
        """Bring a part of a log to the host, when the device gets there."""
        done = None
        if part.is_cuda:
            words = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            words.copy_(part, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        else:
            words = part.clone()
        self._looks.append(_Look(words, chosen, done))

    def _settle(self, look: _Look) -> Iterator[Row]:
        """Give the rows what was logged of them; yield those that end by it."""
        words = look.wait()
        first = 0
        for _, repeated in groupby(look.chosen, key=id):
            chosen, *again = repeated
            logged = words[first : first + 1 + len(again), : _width(chosen)]  # other passes may be wider
            first += len(logged)
            ends = {token for piece in chosen for token in piece.row.ends}
            notable = ((logged[..., 6] == 0) | np.isin(logged[..., 0], list(ends))).any()
            place = 0
            for piece in chosen:
                row, own = (
                    piece.row,
                    logged[:, place : place + piece.choices],
                )  # a pass that repeats has one choice a row
                place += piece.choices
                if row.finished:
                    continue
                if row.slot not in self._stoppers:
                    stops = None if row.task.answer else self._engine.stopper(row.request)
                    self._stoppers[row.slot] = stops
                ended = row.read(own.reshape(-1, LOG_WIDTH), notable, self._stoppers[row.slot])
                if self._listen is not None and not row.failed:
                    heard = row.logged[-1][:, 0].tolist()
                    self._listen(row.slot, row.steps - len(heard), heard)
                if ended:
                    self._scheduler.drop(row)
                    yield row


def wants_scores(task: Task) -> bool:
    """Return whether score rows are wanted of a task, to choose from or to score its continuation by."""
    return task.request.params.processed or bool(task.request.continuation)


def _width(chosen: Sequence[Piece]) -> int:
    """Return the entries of the log that a pass writes."""
    return sum(piece.choices for piece in chosen)


def trace_of(row: Row) -> Trace:
    """Return what was logged of a row as its trace, whose columns are the log's."""
    words = np.concatenate(row.logged)
    return Trace(b"".join(words[:, column].tobytes() for column in (0, 1, 2, 3, slice(4, 6))))
