"""One fixed shape: a KV cache of fixed length, and a step over it that a CUDA graph replays.

A step works on the same memory every time: the newest token of each row, the place in the KV cache where its key goes,
and a log of what was chosen. It hands its winners to the next step by itself, so the host need not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

from stablegen.engine.cuda_graph import Recorder
from stablegen.engine.private import cache_layer_class
from stablegen.engine.transformers.attention import OneKernel
from stablegen.kernels import log
from stablegen.kernels.base import RowSummary

STEPS = 8
"""Steps after which the log is fetched."""
UNREAD = 2
"""Fetches that may be under way before the host waits for the first of them."""


class _Layer(cache_layer_class()):  # type: ignore[misc]  # transformers is untyped here
    """One layer's keys and values [S, H, C, D]: prompts fill them from the left, a step writes at the cursor."""

    def __init__(self, capacity: int, cursor: torch.Tensor) -> None:
        super().__init__()
        self.capacity = capacity
        self.cursor = cursor
        self.filling = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate keys and values for the rows, heads and sizes of these."""

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
        """Return how far the cache is filled; a step is given its positions and its mask, and does not ask."""
        return 0 if self.filling else self.capacity

    def get_max_length(self) -> int:
        """Return the capacity."""
        return self.capacity


class Decoder:
    """One shape's memory and step: S rows, a KV cache of C tokens, a vocabulary of V.

    ``context``: the longest sequence in tokens. ``summarise`` reduces score rows [S, V] to what a step keeps.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        *,
        context: int,
        summarise: Callable[[torch.Tensor], RowSummary],
        recorder: Recorder,
    ) -> None:
        device = model.device
        pinned = device.type == "cuda"
        self._model = model
        self._context = context
        self._summarise = summarise
        self._newest = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        # of each row, the place of its prompt's first token
        self._first = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        # of all rows, the place where the next key goes
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(capacity, device=device)
        self._log = torch.zeros(UNREAD * STEPS, rows, log.WIDTH, dtype=torch.int32, device=device)
        self._entry = torch.zeros(1, dtype=torch.int64, device=device)
        self._fetched = torch.zeros(UNREAD, STEPS, rows, log.WIDTH, dtype=torch.int32, pin_memory=pinned)
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

    def advance(self, entry: int, count: int) -> PendingLog:
        """Run the steps that write ``count`` entries of the log from ``entry`` on, and send for those entries.

        The prefill wrote entry 0.
        """
        for _ in range(count - (entry == 0)):
            if self._captured is None:
                self.scores = self._step()
            else:
                graph, self.scores = self._captured
                graph.replay()
        start = entry % len(self._log)
        fetched = self._fetched[entry // STEPS % UNREAD, :count]
        fetched.copy_(self._log[start : start + count], non_blocking=True)
        return PendingLog(fetched, on_its_way=fetched.device != self._log.device)

    def feed(self, slots: list[int], tokens: list[int]) -> None:
        """Let these tokens be the newest of their slots, in place of those chosen."""
        device = self._newest.device
        self._newest[torch.tensor(slots, device=device), 0] = torch.tensor(tokens, device=device)

    def _step(self) -> torch.Tensor:
        """Feed each row its newest token; return the scores [S, V] float32. The host reads no value in it."""
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
        summary = self._summarise(scores)
        self._log.index_copy_(0, self._entry, log.pack(summary)[None])
        self._entry.add_(1).remainder_(len(self._log))
        self._newest.copy_(summary.tokens[:, :1])
        return scores


class PendingLog:
    """Entries of the log on their way to the host, [N, S, WIDTH] int32."""

    def __init__(self, entries: torch.Tensor, *, on_its_way: bool) -> None:
        self._entries = entries
        self._arrived: torch.cuda.Event | None = None
        if on_its_way:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> Iterator[RowSummary]:
        """Yield what each of the steps kept of S rows, when the entries are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        for words in self._entries:
            yield log.unpack(words)
