"""Decoding at fixed shapes: a KV cache of fixed length, and a step that a CUDA graph replays.

A step works on the same memory every time: the newest token of each row, the place in the KV cache where its key goes,
and a log of what was chosen. It hands its winners to the next step by itself, so the host waits for nothing: it reads
the log a few steps later, and what a row did beyond its end is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from stablegen.core.policy import Batch, capacity_for
from stablegen.engine.base import Generated, Observer
from stablegen.engine.cuda_graph import Recorder
from stablegen.engine.sampling import Choosers
from stablegen.engine.transformers.attention import OneKernel
from stablegen.engine.transformers.decode import Answers, cpu_threads, run_on
from stablegen.kernels.base import BestTwo

STEPS = 8
"""Steps between two looks at the log."""
UNREAD = 2
"""Looks that may be under way before the host waits for the first of them."""
KEPT = 8
"""Shapes whose KV cache and graph are kept at most."""
KEPT_BYTES = 2 * 2**30
"""Bytes of the KV caches that are kept at most, where they are more than one."""
LOG_WIDTH = 6
"""int64 words that the log keeps of a row: best, runner-up, their scores' bits, the hash, finite."""

_T = TypeVar("_T")


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """One layer's keys and values [S, H, C, D]: prompts fill them from the left, a step writes at the cursor."""

    def __init__(self, capacity: int, cursor: torch.Tensor) -> None:
        super().__init__()
        self.capacity = capacity
        self.cursor = cursor
        self.filling = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate keys and values for rows, heads and sizes such as these."""

        def zeros(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(like.shape[0], like.shape[1], self.capacity, like.shape[3])

        self.keys, self.values = zeros(key_states), zeros(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values [S, H, N, D]; return those to attend to: the prompts' own, or the whole cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.filling:
            width = key_states.shape[2]
            self.keys[:, :, :width].copy_(key_states)
            self.values[:, :, :width].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, self.cursor, key_states)
        self.values.index_copy_(2, self.cursor, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys are attended to, and the first of them."""
        return (query_length if self.filling else self.capacity), 0

    def get_seq_length(self) -> int:
        """Return how far the cache is filled; a step is told its positions and its mask, and does not ask."""
        return 0 if self.filling else self.capacity

    def get_max_length(self) -> int:
        """Return the capacity."""
        return self.capacity


class _Decoder:
    """One shape's memory and step: S rows, a KV cache of C tokens, a vocabulary of V."""

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        *,
        context: int,
        best_two: Callable[[torch.Tensor], BestTwo],
        recorder: Recorder,
    ) -> None:
        device = model.device
        pinned = device.type == "cuda"
        self._model = model
        self._context = context
        self._best_two = best_two
        self._newest = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        # of each row, the place of its prompt's first token
        self._first = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        # of all rows, the place where the next key goes
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(capacity, device=device)
        self._log = torch.zeros(UNREAD * STEPS, rows, LOG_WIDTH, dtype=torch.int64, device=device)
        self._entry = torch.zeros(1, dtype=torch.int64, device=device)
        self._read = torch.zeros(UNREAD, STEPS, rows, LOG_WIDTH, dtype=torch.int64, pin_memory=pinned)
        self._cache = Cache(layers=[_Layer(capacity, self._cursor) for _ in range(model.config.num_hidden_layers)])
        self._dtype = torch.bool  # of masks: which numbers attention is computed in is known after a step
        self.scores = self._step()  # allocates keys and values, and what libraries and the hash set up once
        self._dtype = self._cache.layers[0].keys.dtype
        self._captured = recorder.record(self._step)

    @property
    def bytes(self) -> int:
        """Return the size of the KV cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Begin with prompts [S, W] padded on the left, as ``mask`` says; choose and log their first tokens."""
        width = ids.shape[1]
        ids, mask = ids.to(self._newest.device), mask.to(self._newest.device)
        for layer in self._cache.layers:
            # weights of exactly zero would still carry a NaN over from an earlier batch
            layer.keys.zero_()
            layer.values.zero_()
            layer.filling = True
        try:
            scores = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        finally:
            for layer in self._cache.layers:
                layer.filling = False
        self._first.copy_(width - mask.sum(1, keepdim=True))
        self._cursor.fill_(width)
        self._entry.zero_()
        self.scores = self._choose(scores)

    def advance(self, entry: int, count: int) -> _Look:
        """Run the steps that write ``count`` entries of the log from ``entry`` on; the prefill wrote entry 0."""
        for _ in range(count - (entry == 0)):
            if self._captured is None:
                self.scores = self._step()
            else:
                graph, self.scores = self._captured
                graph.replay()
        start = entry % len(self._log)
        read = self._read[entry // STEPS % UNREAD, :count]
        read.copy_(self._log[start : start + count], non_blocking=True)
        return _Look(read, on_its_way=read.device != self._log.device)

    def feed(self, slots: list[int], tokens: list[int]) -> None:
        """Let these tokens be the newest of their slots, in place of those chosen."""
        device = self._newest.device
        self._newest[torch.tensor(slots, device=device), 0] = torch.tensor(tokens, device=device)

    def _step(self) -> torch.Tensor:
        """Feed each row its newest token; return the scores [S, V] float32. Nothing here looks at a value."""
        seen = (self._places >= self._first) & (self._places <= self._cursor)  # [S, C]
        mask = seen
        if self._dtype.is_floating_point:  # or every layer would turn truth into numbers again
            # half the lowest number: kernels that multiply it stay finite, and its weight is exactly zero all the same
            hidden = torch.finfo(self._dtype).min / 2
            mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device).masked_fill_(~seen, hidden)
        # rows that have finished run on, shapes being fixed; their positions must stay inside the context
        positions = (self._cursor - self._first).clamp(max=self._context - 1)  # [S, 1]
        scores = self._forward(self._newest, mask[:, None, None], positions)
        self._cursor.add_(1)
        return self._choose(scores)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with OneKernel():
            out = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        scores: torch.Tensor = out.logits[:, -1].float()  # [S, V]
        return scores

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Log what a step keeps of its scores, and make the best tokens the newest; return the scores."""
        best = self._best_two(scores)
        bits = best.scores.view(torch.int32)
        words = torch.cat([best.tokens, bits, best.hashes[:, None], best.finite[:, None]], dim=1)  # [S, LOG_WIDTH]
        self._log.index_copy_(0, self._entry, words[None])
        self._entry.add_(1).remainder_(len(self._log))
        self._newest.copy_(best.tokens[:, :1])
        return scores


class _Look:
    """Entries of the log on their way to the host, [N, S, LOG_WIDTH]."""

    def __init__(self, entries: torch.Tensor, *, on_its_way: bool) -> None:
        self._entries = entries
        self._arrived: torch.cuda.Event | None = None
        if on_its_way:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> Iterator[BestTwo]:
        """Yield what each of the steps kept, [S] each, when they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        for words in self._entries:
            yield BestTwo(
                tokens=words[:, :2],
                scores=words[:, 2:4].to(torch.int32).view(torch.float32),
                hashes=words[:, 4],
                finite=words[:, 5] != 0,
            )


class StaticDecoding:
    """Decodes batches of a model at fixed shapes; keeps what the last few shapes need.

    ``context``: tokens. ``threads``: a CPU's; None on a GPU. ``graphs``: whether steps are replayed; it moves no bit.
    """

    def __init__(
        self,
        model: Any,
        *,
        context: int,
        threads: int | None,
        best_two: Callable[[torch.Tensor], BestTwo],
        graphs: bool,
    ) -> None:
        self._device: torch.device = model.device
        self._threads = threads
        recorder = Recorder(self._device, wanted=graphs)
        self._new = partial(_Decoder, model, context=context, best_two=best_two, recorder=recorder)
        # the shape used last comes last; one in use is not here
        self._idle: dict[tuple[int, int], _Decoder] = {}
        self._done: torch.cuda.Event | None = None

    def decode(
        self,
        batch: Batch,
        ids: torch.Tensor,
        mask: torch.Tensor,
        made: Callable[..., Answers],
        choosers: Choosers,
        observe: Observer | None = None,
    ) -> Generator[Generated, None, None]:
        """Yield each request of a batch, its prompts [S, W] padded on the left, a few steps after it finishes.

        ``made`` makes the answers, of a KV cache's capacity; where somebody else chooses or looks, after every step.
        """
        rows, width = ids.shape
        longest = max(request.params.max_new_tokens for _, request in batch.requests)
        capacity = batch.capacity or capacity_for(width + longest)
        assert width + longest - 1 <= capacity  # the last token is never fed
        answers = made(capacity=capacity)
        fed = bool(choosers) or answers.led
        count, unread = (1, 1) if observe is not None or fed else (STEPS, UNREAD)
        looks: deque[_Look] = deque()
        entries = 0
        with self._borrow(batch, rows, capacity) as decoder:
            self._run(batch, partial(self._with_room, partial(decoder.prefill, ids, mask)))
            while answers.live:
                while entries < longest and len(looks) < unread:
                    size = min(count, longest - entries)
                    if fed and entries:
                        self._run(batch, partial(decoder.feed, answers.live, answers.newest()))
                    looks.append(self._run(batch, partial(decoder.advance, entries, size)))
                    entries += size
                for logged in looks.popleft().wait():
                    best = logged
                    if choosers:
                        slots = [slot if slot in answers.live else None for slot in range(rows)]
                        best = self._run(batch, partial(_refined, choosers, best, decoder.scores, slots, entries - 1))
                    if observe is not None:
                        scores = self._run(batch, decoder.scores.clone)
                        for slot in answers.live:
                            observe(slot, scores[slot])
                    yield from answers.add(range(rows), best)
        answers.check()

    @contextmanager
    def _borrow(self, batch: Batch, rows: int, capacity: int) -> Iterator[_Decoder]:
        """Lend a shape's decoder; whoever asks for the same shape meanwhile gets another."""
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

    def _keep(self, rows: int, capacity: int, decoder: _Decoder) -> None:
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
    choosers: Choosers, best: BestTwo, scores: torch.Tensor, slots: Sequence[int | None], step: int
) -> BestTwo:
    """Return what rows chose at a step, by their slots' own choosers where they have one, on the scores' device."""
    columns = (best.tokens, best.scores, best.hashes, best.finite)
    on_device = BestTwo(*(column.to(scores.device) for column in columns))
    return choosers.refine(on_device, scores, slots, step)
