"""Decoding at fixed shapes: the host fetches the log a few steps later, and drops what a row did beyond its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from stablegen.core.policy import Batch, Shape, capacity_for
from stablegen.engine.base import Generated, Observer
from stablegen.engine.compute import cpu_threads, run_on
from stablegen.engine.cuda_graph import Recorder
from stablegen.engine.sampling import BatchSampler
from stablegen.engine.transformers.answers import GrowingAnswers
from stablegen.engine.transformers.static_cache import STEPS, UNREAD, Decoder, PendingLog
from stablegen.kernels.base import RowSummary

KEPT = 8
"""Shapes whose KV cache and graph are kept at most."""
KEPT_BYTES = 2 * 2**30
"""Bytes of the KV caches that are kept at most, where they are more than one."""

_T = TypeVar("_T")


class StaticDecoding:
    """Decodes batches of a model at fixed shapes; keeps what the last few shapes need.

    ``context``: the longest sequence in tokens. ``threads``: a CPU's; None on a GPU. ``summarise`` reduces score rows.
    ``graphs``: whether steps are replayed; it moves no bit.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: int,
        threads: int | None,
        summarise: Callable[[torch.Tensor], RowSummary],
        graphs: bool,
    ) -> None:
        self._device: torch.device = model.device
        self._threads = threads
        recorder = Recorder(self._device, enabled=graphs)
        self._new = partial(Decoder, model, context=context, summarise=summarise, recorder=recorder)
        # the shape used last comes last; one in use is not here
        self._idle: dict[tuple[int, int], Decoder] = {}
        self._done: torch.cuda.Event | None = None
        self._closed = False

    def decode(
        self,
        batch: Batch,
        ids: torch.Tensor,
        mask: torch.Tensor,
        start: Callable[[Shape], GrowingAnswers],
        sampler: BatchSampler,
        observe: Observer | None = None,
    ) -> Generator[Generated, None, None]:
        """Yield each request of a batch, its prompts [S, W] padded on the left, a few steps after it finishes.

        ``start`` makes the answers, of the shape in which they run. Where tokens are sampled or given, or scores are
        observed, the log is fetched after every step.
        """
        rows, width = ids.shape
        longest = max(request.params.max_new_tokens for _, request in batch.requests)
        capacity = batch.shape.capacity or capacity_for(width + longest)
        assert width + longest - 1 <= capacity  # the last token is never fed
        answers = start(Shape(batch.shape.width, capacity))
        fed = bool(sampler) or answers.teacher_forced
        count, unread = (1, 1) if observe is not None or fed else (STEPS, UNREAD)
        pending: deque[PendingLog] = deque()
        entries = 0
        with self._borrow(batch, rows, capacity) as decoder:
            self._run(batch, partial(self._with_room, partial(decoder.prefill, ids, mask)))
            while answers.live:
                while entries < longest and len(pending) < unread:
                    size = min(count, longest - entries)
                    if fed and entries:
                        self._run(batch, partial(decoder.feed, answers.live, answers.newest()))
                    pending.append(self._run(batch, partial(decoder.advance, entries, size)))
                    entries += size
                for logged in pending.popleft().wait():
                    summary = logged
                    if sampler:
                        slots = [slot if slot in answers.live else None for slot in range(rows)]
                        refine = partial(_refined, sampler, summary, decoder.scores, slots, entries - 1)
                        summary = self._run(batch, refine)
                    if observe is not None:
                        scores = self._run(batch, decoder.scores.clone)
                        for slot in answers.live:
                            observe(answers.request(slot), scores[slot])
                    yield from answers.add(range(rows), summary)
        answers.check()

    def close(self) -> None:
        """Release the KV caches and graphs of all shapes; of one that is in use, when its batch is done."""
        self._closed = True
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # steps beyond the last row's end may still run
        self._idle.clear()

    @contextmanager
    def _borrow(self, batch: Batch, rows: int, capacity: int) -> Iterator[Decoder]:
        """Lend a shape's decoder; another batch of the same shape meanwhile gets another."""
        decoder = self._idle.pop((rows, capacity), None)
        if decoder is None:
            decoder = self._run(batch, partial(self._with_room, partial(self._new, rows, capacity)))
        if self._done is not None:
            # the batch before may have run on another stream, and all graphs share their memory
            torch.cuda.current_stream(self._device).wait_event(self._done)
        try:
            yield decoder
        except Exception:
            decoder = None
            raise
        finally:
            if decoder is not None:
                self._keep(rows, capacity, decoder)

    def _keep(self, rows: int, capacity: int, decoder: Decoder) -> None:
        if self._device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(self._device))
        self._idle.pop((rows, capacity), None)
        self._idle[rows, capacity] = decoder
        held = sum(kept.bytes for kept in self._idle.values())
        while len(self._idle) > KEPT or (len(self._idle) > 1 and held > KEPT_BYTES):
            if self._done is not None:
                self._done.synchronize()  # steps beyond the last row's end may still run
            held -= self._idle.pop(next(iter(self._idle))).bytes
        if self._closed:
            self.close()

    def _with_room(self, action: Callable[[], _T]) -> _T:
        """Run an action; where memory is short, once more without the shapes that are not in use."""
        try:
            return action()
        except torch.OutOfMemoryError:
            if not self._idle:
                raise
        if self._done is not None:
            self._done.synchronize()
        self._idle.clear()
        return action()

    def _run(self, batch: Batch, action: Callable[[], _T]) -> _T:
        with cpu_threads(self._threads):
            return run_on(self._device, batch, action)


def _refined(
    sampler: BatchSampler, summary: RowSummary, scores: torch.Tensor, slots: Sequence[int | None], step: int
) -> RowSummary:
    """Return what rows choose at a step, by their slots' own samplers where they have one, on the scores' device."""
    columns = (summary.tokens, summary.scores, summary.hashes, summary.finite)
    on_device = RowSummary(*(column.to(scores.device) for column in columns))
    return sampler.refine(on_device, scores, slots, step)
