"""Passes in which some rows compute tokens they are given: the tokens of all rows packed into one list.

A pass is recorded as a CUDA graph when one of its size comes again. What fills a recorded size up moves no row's bits:
tokens of the spare slot, tiles of no token, choices made twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from stablegen.engine.cuda_graph import Recorder
from stablegen.engine.invariant.kv_cache import KVCache, copy_in
from stablegen.engine.invariant.model import Model
from stablegen.engine.invariant.scheduler import Piece
from stablegen.engine.invariant.steps import buckets
from stablegen.kernels import log
from stablegen.kernels.base import Rows, Spans

RECORDED_SIZES = 32
"""Graphs kept at most; the one unused for longest makes way."""

_Size = tuple[int, int, int]
"""Tokens, tiles, choices."""


@dataclass(slots=True)
class Packed:
    """The tensors of a pass as lists: see ``kernels.base.Rows``."""

    tile: int
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Sequence[Piece], tile: int) -> Packed:
        """Return the pass that pieces make up, in their order."""
        packed = cls(tile)
        for piece in pieces:
            slot = piece.row.lease.slot
            if piece.start < 0:
                packed._add([-1], slot, [-1], piece.choices)
                packed.spans.append((len(packed.tokens) - 1, 1, piece.row.computed))
            else:
                given = piece.row.given[piece.start : piece.start + piece.count]
                packed.spans.append((len(packed.tokens), piece.count, piece.start))
                packed._add(given, slot, range(piece.start, piece.start + piece.count), piece.choices)
        return packed

    @property
    def size(self) -> _Size:
        """Return how many tokens, tiles and choices there are."""
        return len(self.tokens), len(self.first), len(self.last)

    def fill(self, size: _Size, spare: int, context: int) -> None:
        """Fill the pass up to a larger size with tokens of the ``spare`` slot."""
        run = min(self.tile, context)
        for at in range(len(self.tokens), size[0], run):
            count = min(run, size[0] - at)
            self._add([0] * count, spare, range(count), 0)
        tiles = size[1] - len(self.first)
        self.first += [0] * tiles
        self.counts += [0] * tiles  # of no token
        self.last += self.last[-1:] * (size[2] - len(self.last))  # made twice, a choice is written twice
        assert self.size == size, (self.size, size)

    def control(self, tick: int) -> torch.Tensor:
        """Return what the device reads of a pass, in one tensor [3 T + 2 Q + 2 R] int32."""
        parts = (self.tokens, self.slots, self.positions, self.first, self.counts, self.last, [tick] * len(self.last))
        return torch.from_numpy(np.concatenate([np.array(part, dtype=np.int32) for part in parts]))

    def _add(self, tokens: Sequence[int], slot: int, positions: Sequence[int], choices: int) -> None:
        begin, count = len(self.tokens), len(tokens)
        self.tokens += tokens
        self.slots += [slot] * count
        self.positions += positions
        for at in range(0, count, self.tile):
            self.first.append(begin + at)
            self.counts.append(min(self.tile, count - at))
        self.last += range(begin + count - choices, begin + count)


class _Key(NamedTuple):
    """The key of a graph: passes with equal keys can be replayed by it."""

    size: _Size
    spans: Spans
    vocabulary: int | None


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A pass of one size: what it reads when it is replayed, and where it puts its scores."""

    graph: torch.cuda.CUDAGraph
    control: torch.Tensor
    scores: torch.Tensor | None


class PackedPasses:
    """Runs packed passes: replayed where one of their size was recorded, launched one by one where not."""

    def __init__(self, model: Model, cache: KVCache, recorder: Recorder, *, choices: int) -> None:
        self._model = model
        self._cache = cache
        self._recorder = recorder
        self._buckets = (0, *buckets(cache.slots))
        # [1, choices at most, WIDTH]: the log of passes that choose more tokens than the cache's log has rows
        self.log = cache.log.new_zeros(1, _rounded(choices), log.WIDTH)
        self._wide = cache.logging_to(self.log)
        self._seen: set[_Key] = set()
        self._recorded: OrderedDict[_Key, _Recorded] = OrderedDict()

    def run(self, pieces: Sequence[Piece], tick: int, vocabulary: int | None = None) -> torch.Tensor | None:
        """Run a pass that logs at ``tick``; with ``vocabulary`` return the score rows [R, V], and maybe spare ones.

        A pass of more choices than the cache has slots logs in ``log``.
        """
        packed = Packed.of(pieces, self._model.kernels.tile)
        key = self._key(packed, vocabulary)
        if key is not None:
            packed.fill(key.size, self._cache.spare, self._model.context)
            graph = self._graph(key)
            if graph is not None:
                copy_in(packed.control(tick), graph.control)
                graph.graph.replay()
                return graph.scores
        control = torch.empty(_length(packed.size), dtype=torch.int32, device=self._model.device)
        copy_in(packed.control(tick), control)
        return self._forward(self._rows(control, packed.size, tuple(packed.spans)), vocabulary)

    def _key(self, packed: Packed, vocabulary: int | None) -> _Key | None:
        """Return the key of the graph that can replay a pass; None where the pass is launched kernel by kernel."""
        spans = tuple(packed.spans)
        key = self._model.kernels.graph_key(spans) if self._recorder.enabled else None
        if key is None:
            return None
        if key:
            return _Key(packed.size, key, vocabulary)
        tokens, tiles, choices = packed.size
        filled = _rounded(tokens)
        tiles += -(-(filled - tokens) // min(packed.tile, self._model.context))
        chosen = next((bucket for bucket in self._buckets if bucket >= choices), _rounded(choices))
        return _Key((filled, 1 << (tiles - 1).bit_length(), chosen), key, vocabulary)

    def _graph(self, key: _Key) -> _Recorded | None:
        """Return the graph of a key, recorded at its second pass: the first compiles and loads what it launches."""
        found = self._recorded.get(key)
        if found is not None:
            self._recorded.move_to_end(key)
            return found
        if key not in self._seen:
            self._seen.add(key)
            return None
        with torch.inference_mode(False):  # made in inference mode, it could not be written to in any other
            control = torch.zeros(_length(key.size), dtype=torch.int32, device=self._model.device)
        rows = self._rows(control, key.size, key.spans)
        made = self._recorder.record(partial(self._forward, rows, key.vocabulary))
        if made is None:
            return None
        found = self._recorded[key] = _Recorded(made[0], control, made[1])
        if len(self._recorded) > RECORDED_SIZES:
            self._recorded.popitem(last=False)
        return found

    def _forward(self, rows: Rows, vocabulary: int | None) -> torch.Tensor | None:
        cache = self._cache if len(rows.last) <= self._cache.slots else self._wide
        scores = None
        if vocabulary is not None and len(rows.last):
            scores = torch.empty(len(rows.last), vocabulary, dtype=torch.float32, device=self._model.device)
        self._model.forward(rows, cache, scores)
        return scores

    def _rows(self, control: torch.Tensor, size: _Size, spans: Spans) -> Rows:
        tokens, tiles, choices = size
        parts = torch.split(control, [tokens, tokens, tokens, tiles, tiles, choices, choices])
        ids, slots, positions, first, counts, last, ticks = parts
        return Rows(ids, slots, positions, first, counts, last, ticks, self._model.kernels.tile, spans)


def _rounded(count: int) -> int:
    """Return the least size for so many, of sizes that lie an eighth apart at most, or 32."""
    step = max(32, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _length(size: _Size) -> int:
    """Return how many numbers the device reads of a pass."""
    return 3 * size[0] + 2 * size[1] + 2 * size[2]
