"""One batch on its way through the batch-invariant engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stablegen.core.request import Request
from stablegen.engine.base import Listener, Observer, Stopper
from stablegen.engine.compute import computing, cpu_threads
from stablegen.engine.cuda_graph import StreamOrder
from stablegen.engine.invariant.kv_cache import TICKS, KVCache
from stablegen.engine.invariant.model import Model
from stablegen.engine.invariant.packed import PackedPasses
from stablegen.engine.invariant.scheduler import Piece, Row, Scheduler, Task
from stablegen.engine.invariant.steps import Steps
from stablegen.engine.sampling import GraphedSampler, TokenSampler, upload
from stablegen.kernels import log
from stablegen.kernels.reference import log_probs

READ_EVERY = 8
"""Passes after which the log is fetched."""
UNREAD = 3
"""Fetches that may be under way before the host waits for the first of them."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine allocates once: the KV cache, and the passes that work on it."""

    cache: KVCache
    steps: Steps
    packed: PackedPasses


@dataclass(frozen=True, slots=True)
class Tools:
    """What every batch of an engine runs with: its model and sampler, and a CPU's threads.

    ``order`` puts work on several streams in order; ``stopper_of`` makes what ends a request's answer besides its end
    tokens and its length.
    """

    model: Model
    sampler: GraphedSampler
    threads: int | None
    order: StreamOrder
    stopper_of: Callable[[Request], Stopper | None]


@dataclass(frozen=True, slots=True)
class _PendingLog:
    """A part of the log on its way to the host: ``words`` [passes, choices, WIDTH], and what chose in each pass."""

    words: torch.Tensor
    chosen: list[list[Piece]]
    done: torch.cuda.Event | None

    def arrived(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> npt.NDArray[Any]:
        if self.done is not None:
            self.done.synchronize()
        return self.words.numpy()


class Run:
    """One batch on its way through the engine."""

    def __init__(
        self,
        tools: Tools,
        scheduler: Scheduler,
        memory: Memory,
        observe: Observer | None,
        listen: Listener | None,
    ) -> None:
        self._tools = tools
        self._model = tools.model
        self._scheduler = scheduler
        self._cache = memory.cache
        self._steps = memory.steps
        self._packed = memory.packed
        self._observe = observe
        self._listen = listen
        self._samplers: dict[int, TokenSampler] = {}
        self._stoppers: dict[int, Stopper | None] = {}
        self._tick = 0
        self._logged: list[list[Piece]] = []  # what chose in each pass whose log was not fetched yet
        self._pending: deque[_PendingLog] = deque()
        self._steps.forget()

    def __iter__(self) -> Iterator[Row]:
        """Yield rows as they are read to their end."""
        scheduler = self._scheduler
        while scheduler.busy or self._logged or self._pending:
            self._tools.order.wait_for_last()
            with computing(self._model.device), cpu_threads(self._tools.threads):
                if scheduler.busy:
                    scheduler.admit()
                    self._advance()
                if len(self._logged) >= (1 if self._observe else READ_EVERY) or not scheduler.busy:
                    self._fetch_log()
            while self._pending and (len(self._pending) > UNREAD or not scheduler.busy or self._pending[0].arrived()):
                yield from self._read(self._pending.popleft())

    def close(self) -> None:
        """Give back what rows hold that have not finished."""
        self._scheduler.close()

    def _advance(self) -> None:
        """Run the next pass, as often as it may repeat before the log is fetched."""
        self._cache.upload()
        pieces, times = self._scheduler.compose()
        chosen = [piece for piece in pieces if piece.choices]
        shown = self._observe is not None or any(wants_scores(piece.row.task) for piece in chosen)
        vocabulary = self._model.vocabulary if shown else None
        if _width(chosen) > self._cache.slots:
            assert not shown, "a pass that shows its scores logs where the others do"
            self._run_wide(pieces, chosen)
            self._scheduler.count(pieces, 1)
            return
        if any(piece.start >= 0 for piece in pieces):
            times = 1
            scores = self._packed.run(pieces, self._tick, vocabulary)
            self._steps.forget()
        else:
            times = 1 if shown else min(times, READ_EVERY - len(self._logged))
            slots = tuple(piece.row.lease.slot for piece in chosen)
            for i in range(times):
                scores = self._steps.run(slots, self._tick + i, vocabulary)
        if shown and scores is not None:
            self._consume_scores(scores, chosen)
        self._scheduler.count(pieces, times)
        if chosen:
            self._logged += [chosen] * times
            self._tick += times

    def _consume_scores(self, scores: torch.Tensor, chosen: list[Piece]) -> None:
        """Use the pass's score rows [R, V]: show them to the observer, score continuations, sample tokens."""
        samplers: list[TokenSampler] = []
        steps: list[int] = []
        places: list[int] = []
        fed: list[int] = []  # of the places, those whose token is the slot's newest
        slots: list[int] = []
        first = 0
        for piece in chosen:
            row, request, own = piece.row, piece.row.request, scores[first : first + piece.choices]
            if self._observe is not None:
                for row_scores in own:
                    self._observe(request, row_scores)
            if request.continuation:
                tokens = request.continuation[row.scheduled : row.scheduled + piece.choices]
                row.logprobs.append(log_probs(own, upload(tokens, scores.device)))
            elif request.params.processed:
                if row.slot not in self._samplers:
                    self._samplers[row.slot] = TokenSampler(request, scores.device, row.task.answer, row.task.begun)
                begun = len(row.task.begun) + row.scheduled
                if not row.task.answer:
                    fed.append(len(places))
                    slots.append(row.lease.slot)
                samplers += [self._samplers[row.slot]] * piece.choices
                steps += range(begun, begun + piece.choices)
                places += range(first, first + piece.choices)
            first += piece.choices
        if samplers:
            at = upload(places, scores.device)
            logged = self._cache.log[self._tick % TICKS]
            hashes = log.unpack_hashes(logged[at])
            summary = self._tools.sampler.sample(samplers, scores[at], steps, hashes)
            logged.index_copy_(0, at, log.pack(summary))
            if fed:
                newest = summary.tokens[upload(fed, scores.device), 0]
                self._cache.newest.index_copy_(0, upload(slots, scores.device), newest.int())

    def _run_wide(self, pieces: Sequence[Piece], chosen: list[Piece]) -> None:
        """Run a pass that chooses more tokens than the log has rows, and so logs elsewhere."""
        self._fetch_log()  # of the passes before, which are read before this one
        self._packed.run(pieces, 0)
        self._steps.forget()
        self._fetch(self._packed.log[:, : _width(chosen)], [chosen])

    def _fetch_log(self) -> None:
        """Send for what was logged since the last fetch."""
        count = len(self._logged)
        if not count:
            return
        width = max(map(_width, self._logged))
        first = (self._tick - count) % TICKS
        rows = self._cache.log[:, :width]
        part = (
            rows[first : first + count]
            if first + count <= TICKS
            else torch.cat([rows[first:], rows[: first + count - TICKS]])
        )
        self._fetch(part, self._logged)
        self._logged = []

    def _fetch(self, part: torch.Tensor, chosen: list[list[Piece]]) -> None:
        """Send for a part of a log; it is copied to the host when the device gets there."""
        done = None
        if part.is_cuda:
            words = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            words.copy_(part, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        else:
            words = part.clone()
        self._pending.append(_PendingLog(words, chosen, done))

    def _read(self, pending: _PendingLog) -> Iterator[Row]:
        """Give the rows what was logged of them; yield those that end with it."""
        words = pending.wait()
        first = 0
        for _, repeated in groupby(pending.chosen, key=id):
            chosen, *again = repeated
            logged = words[first : first + 1 + len(again), : _width(chosen)]  # other passes may be wider
            first += len(logged)
            ends = {token for piece in chosen for token in piece.row.ends}
            may_end = ((logged[..., log.FINITE] == 0) | np.isin(logged[..., log.TOKEN], list(ends))).any()
            place = 0
            for piece in chosen:
                # a pass that repeats has one choice a row
                row, own = piece.row, logged[:, place : place + piece.choices]
                place += piece.choices
                if row.finished:
                    continue
                if row.slot not in self._stoppers:
                    stops = None if row.task.answer else self._tools.stopper_of(row.request)
                    self._stoppers[row.slot] = stops
                ended = row.read(own.reshape(-1, log.WIDTH), may_end, self._stoppers[row.slot])
                if self._listen is not None and not row.failed:
                    heard = row.logged[-1][:, log.TOKEN].tolist()
                    self._listen(row.request, row.steps - len(heard), heard)
                if ended:
                    self._scheduler.drop(row)
                    yield row


def wants_scores(task: Task) -> bool:
    """Return whether a task needs score rows, to sample from or to score its continuation by."""
    return task.request.params.processed or bool(task.request.continuation)


def _width(chosen: Sequence[Piece]) -> int:
    """Return the entries of the log that a pass writes."""
    return sum(piece.choices for piece in chosen)
