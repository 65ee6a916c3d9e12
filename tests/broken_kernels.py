"""Kernels that break the promise, each in its own way: negative controls for the tests of invariance."""

from __future__ import annotations

import torch

from stablegen.kernels.base import Cache, Linear, Placed, Rows
from stablegen.kernels.reference import ReferenceKernels


class SplitByBatch(ReferenceKernels):
    """Sums in two halves where the batch has 8 rows or more, as a library does that picks split-K by M."""

    rows = 8

    def linear(self, x: torch.Tensor, layer: Linear, *, gelu: bool = False) -> torch.Tensor:
        if len(x) < self.rows or gelu:
            return super().linear(x, layer, gelu=gelu)
        return self._split(x, layer)

    def _split(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        half = layer.k // 2
        first = Linear(layer.weight[:half], layer.bias, half, layer.n)
        second = Linear(layer.weight[half:], None, layer.k - half, layer.n)
        return super().linear(x[:, :half], first) + super().linear(x[:, half:], second)


class SplitBySlot(SplitByBatch):
    """Sums in two halves in the rows behind the first eight, as a library does at the end of its tile."""

    def linear(self, x: torch.Tensor, layer: Linear, *, gelu: bool = False) -> torch.Tensor:
        out = ReferenceKernels.linear(self, x, layer, gelu=gelu)
        if len(x) > 8 and not gelu:
            out[8:] = self._split(x[8:], layer)
        return out


class SplitByLargeBatch(SplitByBatch):
    """Sums in two halves in large batches only."""

    rows = 300


class ScaledOtherwise(ReferenceKernels):
    """Scales the queries, not their products, where ``applies`` says so: another order of rounding."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        raise NotImplementedError

    def attention(
        self,
        query: torch.Tensor,
        layer: Linear,
        cache: Cache,
        index: int,
        rows: Rows,
        placed: Placed,
        scale: float,
    ) -> torch.Tensor:
        if self.applies(query, cache, rows, placed):
            query, scale = (query.float() * 3).to(query.dtype), scale / 3
        return super().attention(query, layer, cache, index, rows, placed, scale)


class AttentionByTokens(ScaledOtherwise):
    """Differs where there are 24 tokens or more, as another attention kernel would."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return len(query) >= 24


class AttentionByPages(ScaledOtherwise):
    """Differs where the keys lie far behind in the cache."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return int(cache.table[rows.slots.long(), 0].max()) > 6


class LoneDecode(ScaledOtherwise):
    """Differs where one token is decoded behind the first block of keys."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return len(query) == 1 and int(placed.positions[0]) >= 64


class ManyRowsDecode(ScaledOtherwise):
    """Differs where more than 64 rows decode together."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return rows.tile == 1 and len(query) > 64
