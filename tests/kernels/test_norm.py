"""Embedding, residual sums and layer norm of both kernel sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from kernel_subjects import (
    FEWER,
    HAS_GPU,
    TOLERANCE,
    Layer,
    Subject,
    add_up,
    error,
    moved_rows,
    overflows,
    subjects,
    take,
)

from stablegen.engine.invariant.kv_cache import KVCache
from stablegen.kernels.base import PAGE, Linear, Norm, Placed, Rows
from stablegen.kernels.triton import TritonKernels

pytestmark = pytest.mark.usefixtures("chained_products")


def layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    weight, bias = norm.weight.cpu().double(), norm.bias.cpu().double()
    return torch.nn.functional.layer_norm(x.cpu().double(), (x.shape[1],), weight, bias, norm.eps)


@dataclass(frozen=True)
class Embedding:
    """A model's two embeddings, and a cache that says where two slots stand."""

    subject: Subject
    tokens: Layer
    positions: torch.Tensor
    cache: KVCache

    @classmethod
    def of(cls, subject: Subject, e: int) -> Embedding:
        cache = subject.cache(3)
        cache.newest[:3] = torch.tensor([11, 22, 33])
        cache.lengths[:3] = torch.tensor([5, 64, 130])
        positions = subject.normal(256, e, seed=2).to(subject.device)
        return cls(subject, Layer.of(subject, subject.normal(e, 67, seed=1)), positions, cache)

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, Placed]:
        device, e = self.subject.device, self.positions.shape[1]
        ids, at, places = (torch.tensor(part, dtype=torch.int32, device=device) for part in (tokens, slots, positions))
        nothing = ids[:0]
        rows = Rows(ids, at, places, nothing, nothing, nothing, nothing, tile=1)
        return self.subject.kernels.embed(rows, self.cache, self.tokens.prepared, self.positions, self.subject.norm(e))


@subjects()
@pytest.mark.parametrize("e", [5, 320, 768] if HAS_GPU else [5, 320])
def test_embed_finds_what_tokens_and_positions_mean(subject: Subject, e: int) -> None:
    embedding = Embedding.of(subject, e)
    # -1: the newest token of the slot, the next position of the slot
    x, normed, placed = embedding.run([3, 66, -1, 0, -1, 9], [0, 1, 1, 2, 2, 0], [0, 63, 64, -1, -1, 255])
    ids, at = [3, 66, 22, 0, 33, 9], [0, 63, 64, 130, 130, 255]
    expected = embedding.tokens.weight.t()[ids] + embedding.positions.cpu().double()[at]
    assert error(x, expected) < 2e-7
    assert error(subject.read(normed), layer_norm(x, subject.norm(e))) < TOLERANCE[subject.dtype]
    assert placed.slots.tolist() == [0, 1, 1, 2, 2, 0]
    assert placed.positions.tolist() == at
    table = embedding.cache.table.tolist()
    spots = [(0, 0, 0), (1, 0, 63), (1, 1, 0), (2, 2, 2), (2, 2, 2), (0, 3, 63)]
    assert placed.places.tolist() == [table[slot][page] * PAGE + offset for slot, page, offset in spots]


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("e", [101, 768])
def test_embed_is_invariant(subject: Subject, e: int) -> None:
    embedding = Embedding.of(subject, e)
    count = 17
    ids = [-1 if i % 5 == 0 else 2 * i for i in range(count)]

    def run(index: torch.Tensor) -> torch.Tensor:
        chosen = index.tolist()
        slots, positions = [i % 3 for i in chosen], [-1 if i % 4 == 0 else 3 * i for i in chosen]
        x, normed, _ = embedding.run([ids[i] for i in chosen], slots, positions)
        return torch.cat([x.cpu().double(), subject.read(normed)], dim=1).float()

    assert moved_rows(run, count) == []


@dataclass(frozen=True)
class Sums:
    """What a residual sum takes: the stream, summands, and a layer whose bias is added."""

    subject: Subject
    x: torch.Tensor
    parts: torch.Tensor
    layer: Linear
    norm: Norm

    @classmethod
    def of(cls, subject: Subject, count: int, e: int) -> Sums:
        generator = torch.Generator().manual_seed(4)
        parts = 3 if isinstance(subject.kernels, TritonKernels) else 1  # the other's are whole
        x = 3 * torch.randn(count, e, generator=generator) + 5
        summands = torch.randn(parts, count, e, generator=generator)
        layer = subject.layer(1, e).prepared
        return cls(subject, x.to(subject.device), summands.to(subject.device), layer, subject.norm(e))

    def run(
        self, index: torch.Tensor | slice = slice(None), select: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, parts = self.x[index], self.parts[:, index].contiguous()
        return self.subject.kernels.add_norm(x, parts, self.layer, self.norm, select)

    def row_bits(self, index: torch.Tensor) -> torch.Tensor:
        result, normed = self.run(index)
        return torch.cat([result.cpu().double(), self.subject.read(normed)], dim=1).float()


@subjects()
@pytest.mark.parametrize("e", [5, 320, 768] if HAS_GPU else [5, 320])
def test_add_norm_adds_in_order(subject: Subject, e: int) -> None:
    sums = Sums.of(subject, 17, e)
    assert sums.layer.bias is not None
    result, normed = sums.run()
    expected = sums.x + (add_up(sums.parts) + sums.layer.bias.float())
    assert torch.equal(result, expected)
    assert error(subject.read(normed), layer_norm(result, sums.norm)) < TOLERANCE[subject.dtype]


@subjects()
def test_add_norm_selects_rows(subject: Subject) -> None:
    sums = Sums.of(subject, 17, 320)
    chosen = torch.tensor([16, 0, 3, 3], dtype=torch.int32, device=subject.device)
    result, normed = sums.run()
    found, found_normed = sums.run(select=chosen)
    assert torch.equal(found, result[chosen.long()])
    assert torch.equal(found_normed, take(normed, chosen.long()))


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("e", [101, 768])
def test_add_norm_is_invariant(subject: Subject, e: int) -> None:
    assert moved_rows(Sums.of(subject, 17, e).row_bits, 17) == []


@overflows
@subjects()
def test_add_norm_ignores_its_neighbours(subject: Subject) -> None:
    sums = Sums.of(subject, 5, 320)
    expected = sums.row_bits(torch.arange(5))[0]
    sums.x[1:3] = 1e30
    sums.parts[:, 3:] = float("nan")
    assert torch.equal(sums.row_bits(torch.arange(5))[0], expected)


@subjects()
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e15])
def test_norms_of_any_size_are_accurate(subject: Subject, scale: float) -> None:
    e = 320
    x = torch.randn(2, e, generator=torch.Generator().manual_seed(3)) * scale
    x[1, 7] = 1000 * scale  # one number that outweighs all others
    zeros = torch.zeros(e, dtype=subject.dtype, device=subject.device)
    nothing = Linear(x, zeros, 1, e)
    plain = Norm(zeros + 1, zeros, 1e-5)
    x = x.to(subject.device)
    _, normed = subject.kernels.add_norm(x, torch.zeros(1, 2, e, device=subject.device), nothing, plain)
    expected = layer_norm(x, plain)
    for found, exact in zip(subject.read(normed), expected, strict=True):
        assert error(found, exact) < TOLERANCE[subject.dtype]


@subjects()
def test_add_norm_ignores_where_its_rows_begin(subject: Subject) -> None:
    sums = Sums.of(subject, 5, 101)
    parts = sums.parts[:1]
    kernels = subject.kernels
    expected, _ = kernels.add_norm(sums.x, parts, sums.layer, sums.norm)
    for i in (1, 2, 3):  # views that begin at odd addresses
        found, _ = kernels.add_norm(sums.x[i:], parts[:, i:], sums.layer, sums.norm)
        assert torch.equal(found, expected[i:])
