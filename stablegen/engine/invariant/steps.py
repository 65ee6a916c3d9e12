"""One-token passes, with one CUDA graph for each bucket of rows; rows that fill a bucket up use the spare slot."""

from __future__ import annotations

from functools import partial

import torch

from stablegen.engine.cuda_graph import Recorder
from stablegen.engine.invariant.kv_cache import KVCache, copy_in
from stablegen.engine.invariant.model import Model
from stablegen.kernels.base import Rows

BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows of a graph; each is recorded when it is first needed."""


def buckets(rows: int) -> tuple[int, ...]:
    """Return the bucket sizes for at most so many rows."""
    return (*(size for size in BUCKETS if size < rows), rows)


class Steps:
    """Runs one-token passes over any rows: replayed where CUDA can record them, launched one by one where not."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        recorder: Recorder,
        *,
        rows: int,
    ) -> None:
        device = model.device
        self._model = model
        self._cache = cache
        self._device = device
        self._sizes = buckets(rows)
        self._spare = spare = cache.spare
        self._recorder = recorder
        self._recorded: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor | None]] = {}
        # written by the host when rows come or go: slots, log entries
        self._control = torch.full((2, rows), spare, dtype=torch.int32, device=device)
        self._newest = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._index = torch.arange(rows, dtype=torch.int32, device=device)
        self._ones = torch.ones(rows, dtype=torch.int32, device=device)
        self._current: tuple[tuple[int, ...], int] | None = None

    def run(self, slots: tuple[int, ...], tick: int, vocabulary: int | None = None) -> torch.Tensor | None:
        """Run one pass over the slots, logging at ``tick``; with ``vocabulary`` return the score rows [R, V]."""
        size = len(slots)
        if self._recorder.enabled:
            size = next(bucket for bucket in self._sizes if bucket >= len(slots))
        graph = self._recorded.get((size, vocabulary is not None))
        if graph is None and self._recorder.enabled:
            self._record(size, tick, vocabulary)
            graph = self._recorded.get((size, vocabulary is not None))
        if self._current != (slots, tick):
            padded = [*slots, *[self._spare] * (size - len(slots))]
            copy_in(torch.tensor([padded, [tick] * size], dtype=torch.int32), self._control[:, :size])
        self._current = (slots, tick + 1)  # each pass moves the log's entry on by itself
        if graph is not None:
            graph[0].replay()
            return graph[1]
        return self._eager(size, vocabulary)

    def forget(self) -> None:
        """Let the next pass upload its rows, whatever ran before."""
        self._current = None

    def _rows(self, size: int) -> Rows:
        slots, tick = self._control[:, :size]
        newest, index = self._newest[:size], self._index[:size]
        return Rows(newest, slots, newest, index, self._ones[:size], index, tick, tile=1)

    def _eager(self, size: int, vocabulary: int | None) -> torch.Tensor | None:
        scores = None
        if vocabulary is not None:
            scores = torch.empty(size, vocabulary, dtype=torch.float32, device=self._device)
        self._model.forward(self._rows(size), self._cache, scores)
        return scores

    def _record(self, size: int, tick: int, vocabulary: int | None) -> None:
        """Record a bucket's graph, after a pass that compiles and loads what it launches."""
        self._current = None
        self._control[0, :size] = self._spare
        self._control[1, :size] = tick  # the entry that the next pass writes
        self._eager(size, vocabulary)
        made = self._recorder.record(partial(self._eager, size, vocabulary))
        if made is not None:
            self._recorded[size, vocabulary is not None] = made
