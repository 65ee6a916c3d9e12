"""The kernel set for NVIDIA GPUs, Ampere and newer; with ``TRITON_INTERPRET=1`` it also runs on CPU tensors."""

from __future__ import annotations

import torch

from stablegen.kernels import attention, linear, norm, scores
from stablegen.kernels.base import Cache, Linear, Norm, Placed, Rows, Spans
from stablegen.kernels.tiles import few


class TritonKernels:
    """The operations as Triton kernels, each beside its launcher and what fixes the order of its sums."""

    name = "triton"
    version = 2
    tile = attention.TILE
    paired = True

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Lay a weight [K, N] out as [N, K]; float32 as pairs of float16."""
        return linear.prepare(weight, bias)

    def graph_key(self, spans: Spans) -> Spans:
        """Return that passes of one size can replay each other."""
        return ()

    def embed(
        self, rows: Rows, cache: Cache, tokens: Linear, positions: torch.Tensor, following: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, Placed]:
        """Return the residual stream [T, E] float32, its layer norm, and where the tokens are."""
        return norm.embed(rows, cache, tokens, positions, following)

    def qkv(self, x: torch.Tensor, layer: Linear, cache: Cache, index: int, rows: Rows, placed: Placed) -> torch.Tensor:
        """Return queries, their keys and values in the cache; of few newest tokens, summands of all three."""
        first = index == 0
        if rows.tile == 1 and few(layer, len(rows.tokens)):
            return linear.partial(x, layer, first=first)
        return linear.qkv(x, layer, cache.keys[index], cache.values[index], placed.places, first=first)

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
        """Return causal attention [T, E] over layer ``index``, summed over keys in fixed absolute blocks."""
        return attention.attention(query, layer, cache, index, rows, placed, scale)

    def partial(self, x: torch.Tensor, layer: Linear, before: Linear | None = None) -> torch.Tensor:
        """Return ``x @ weight`` as summands [P, T, N] float32."""
        return linear.partial(x, layer, before if x.dtype == torch.float32 else None)

    def add_norm(
        self, x: torch.Tensor, partial: torch.Tensor, layer: Linear, following: Norm, select: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x + (sum(partial) + bias)`` and its layer norm."""
        assert layer.bias is not None
        return norm.add_norm(x, partial, layer.bias, following, select)

    def gelu(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """Return ``gelu_new(x @ weight + bias)`` [T, N]; of few tokens, summands of what gelu_new is taken of."""
        return linear.partial(x, layer) if few(layer, x.shape[-2]) else linear.gelu(x, layer)

    def choose(
        self, x: torch.Tensor, layer: Linear, rows: Rows, placed: Placed, cache: Cache, into: torch.Tensor | None
    ) -> None:
        """Score the vocabulary, log what a step keeps, and advance the slots."""
        scores.choose(x, layer, rows, placed, cache, into)
