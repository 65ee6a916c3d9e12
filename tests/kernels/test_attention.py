"""Causal attention over the paged KV cache, of both kernel sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from kernel_subjects import (
    FEWER,
    HAS_GPU,
    LENGTH,
    SIZES,
    TOLERANCE,
    Layer,
    Subject,
    attend,
    bits,
    error,
    make_rows,
    newest_rows,
    of_triton,
    place,
    sequence,
    subjects,
    take,
)

from stablegen.engine.invariant.kv_cache import KVCache
from stablegen.kernels import attention, linear
from stablegen.kernels.base import PAGE

pytestmark = pytest.mark.usefixtures("chained_products")


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of ``LENGTH`` tokens, the attention of each of them, and what they were made of."""

    subject: Subject
    x: torch.Tensor
    layer: Layer
    query: torch.Tensor
    keys: torch.Tensor  # [..., H, C, D], with NaN behind the last
    values: torch.Tensor
    result: torch.Tensor

    @classmethod
    def of(cls, subject: Subject, size: int = 64, heads: int = 1) -> Tokens:
        x = subject.normal(LENGTH, 40)
        layer = subject.layer(40, 3 * heads * size)
        cache = subject.cache(1, heads=heads, size=size, context=-(-LENGTH // PAGE) * PAGE)
        rows = make_rows(subject, [(0, range(LENGTH))])
        placed = place(rows, cache)
        query = subject.kernels.qkv(subject.write(x), layer.prepared, cache, 0, rows, placed)
        result = subject.kernels.attention(query, layer.prepared, cache, 0, rows, placed, size**-0.5)
        return cls(subject, x, layer, query, sequence(cache.keys, cache, 0), sequence(cache.values, cache, 0), result)

    def cache(self, lengths: Sequence[int], *, context: int = 320, seed: int = 7) -> KVCache:
        """Return a cache in which each slot knows so many of the tokens, and NaN lies everywhere else."""
        heads, _, size = self.keys.shape[-3:]
        cache = self.subject.cache(len(lengths), heads=heads, size=size, context=context, seed=seed)
        cache.lengths[: len(lengths)] = torch.tensor(lengths)
        for source, target in ((self.keys, cache.keys), (self.values, cache.values)):
            for slot, length in enumerate(lengths):
                for at in range(0, length, PAGE):
                    count = min(PAGE, length - at)
                    page = int(cache.table[slot, at // PAGE])
                    target[0][..., page, :, :count, :] = source[..., at : at + count, :]
        if cache.keys.is_cuda:
            torch.cuda.synchronize()  # a pass begins with `embed`, which lets no later kernel begin before all this
        return cache

    def exact(self) -> torch.Tensor:
        heads, _, size = self.keys.shape[-3:]
        query = self.subject.read(self.query).view(LENGTH, heads, size).transpose(0, 1)
        keys, values = (self.subject.read(kept)[:, :LENGTH] for kept in (self.keys, self.values))
        weight = query @ keys.transpose(1, 2) * size**-0.5
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        exact: torch.Tensor = weight.where(seen, -torch.inf).softmax(-1) @ values
        return exact.transpose(0, 1).flatten(1)


EDGES = (0, 1, 15, 16, 31, 32, 62, 63, 64, 65, 126, 127, 128, 129, 137, 138, LENGTH - 1)
"""Positions on both sides of pages and blocks: more than a launcher calls few."""


@subjects()
@pytest.mark.parametrize("size", SIZES)
def test_attention_is_accurate(subject: Subject, size: int) -> None:
    tokens = Tokens.of(subject, size, heads=2)
    exact, result = tokens.exact(), subject.read(tokens.result)
    assert error(result, exact) < TOLERANCE[subject.dtype]
    for position in EDGES:
        assert error(result[position], exact[position]) < 3 * TOLERANCE[subject.dtype], position


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("size", SIZES if HAS_GPU else SIZES[:1])
def test_attention_of_newest_tokens_is_that_of_tiles(subject: Subject, size: int) -> None:
    tokens = Tokens.of(subject, size)
    assert len(EDGES) == 17
    # Few rows bring summands, more bring queries whose keys are stored. Neither may read its own position before it is
    # written, a later one ever, nor another slot's.
    for edges in (EDGES[:1], EDGES[3:11:2], EDGES) if not HAS_GPU else (EDGES[:1], EDGES[9:10], EDGES[:16], EDGES):
        cache = tokens.cache(edges)
        rows = newest_rows(subject, range(len(edges)))
        found = attend(subject, cache, tokens.x[list(edges)], tokens.layer, rows)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.tensor(edges)))), edges
        for slot, position in enumerate(edges):
            for source, target in ((tokens.keys, cache.keys), (tokens.values, cache.values)):
                stored = sequence(target, cache, slot)
                assert torch.equal(stored[..., : position + 1, :], source[..., : position + 1, :])
                assert stored[..., position + 1 :, :].isnan().all()


@of_triton(dtypes=FEWER)
def test_attention_of_newest_tokens_is_the_same_from_summands_and_from_queries(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    edges = [2, 64, 130]
    rows = newest_rows(subject, range(3))
    results = []
    for summands in (True, False):
        cache = tokens.cache(edges)
        placed, x = place(rows, cache), subject.write(tokens.x[edges])
        layer = tokens.layer.prepared
        if summands:
            query = linear.partial(x, layer)
        else:
            query = linear.qkv(x, layer, cache.keys[0], cache.values[0], placed.places)
        assert (query.dtype == torch.float32) == summands
        results.append(bits(attention.attention(query, layer, cache, 0, rows, placed, 0.125)))
    assert torch.equal(*results)


@subjects(dtypes=FEWER)
def test_attention_does_not_see_how_tokens_are_cut_into_tiles(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    expected = bits(tokens.result)
    start = 50
    for cut in ([1, 5, 17, 9], [31, 1], [3, 29]):
        stop = start + sum(cut)
        cache = tokens.cache([stop])
        rows = make_rows(subject, [(0, range(start, stop))], cut)
        found = attend(subject, cache, tokens.x[start:stop], tokens.layer, rows)
        assert torch.equal(bits(found), expected[..., start:stop, :]), cut


@of_triton(dtypes=FEWER)
def test_attention_does_not_see_how_many_rows_a_program_has(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    cache, rows = tokens.cache([LENGTH]), make_rows(subject, [(0, range(60, 72))])
    query = take(tokens.query, torch.arange(60, 72)).contiguous()
    for tile in [attention.AttentionTile(*sizes) for sizes in ((16, 4, 2), (32, 4, 2), (64, 2, 2))]:
        layer, placed = tokens.layer.prepared, place(rows, cache)
        found = attention.attention(query, layer, cache, 0, rows, placed, 0.125, tile=tile)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.arange(60, 72)))), tile


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("context", [LENGTH, 512, 1024])
def test_attention_does_not_see_where_pages_lie_nor_how_many_there_are(subject: Subject, context: int) -> None:
    tokens = Tokens.of(subject)
    cache = tokens.cache([0, LENGTH, 0], context=context, seed=context)
    for position in (63, LENGTH - 1):
        rows = make_rows(subject, [(1, range(position, position + 1))])
        found = attend(subject, cache, tokens.x[position : position + 1], tokens.layer, rows)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.tensor([position]))))


@subjects(dtypes=FEWER)
def test_attention_does_not_see_other_slots(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    runs = [(2, range(60, 70)), (0, range(1)), (3, range(120, 140)), (1, range(5))]
    order = torch.cat([torch.arange(run.start, run.stop) for _, run in runs])
    found = attend(subject, tokens.cache([140] * 4), tokens.x[order], tokens.layer, make_rows(subject, runs))
    assert torch.equal(bits(found), bits(take(tokens.result, order)))


@subjects(dtypes=FEWER)
def test_attention_never_reads_behind_the_position(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    for position in (0, 63, 64):
        cache = tokens.cache([position])
        rows = make_rows(subject, [(0, range(position, position + 1))])
        found = attend(subject, cache, tokens.x[position : position + 1], tokens.layer, rows)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.tensor([position]))))
