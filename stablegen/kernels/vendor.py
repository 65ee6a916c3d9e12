"""The same operations through cuBLAS and scaled_dot_product_attention: what `invariant` is measured against.

It promises nothing: libraries choose the order of their sums from the shape of the whole batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from stablegen.kernels.base import Cache, Linear, Norm, Placed, Rows, RowSummary, Spans
from stablegen.kernels.reference import advance


class VendorKernels:
    """The kernel set of torch's own libraries, as fast as they allow inside the same engine.

    Keys and values are kept in contiguous tensors of its own, as libraries need them. One-token passes take row ``i``
    for slot ``i`` and attend to ``reach`` positions.
    """

    name = "vendor"
    version = 1
    tile = 1024
    paired = False

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Keep the weight as it is."""
        return Linear(weight, bias, *weight.shape)

    def graph_key(self, spans: Spans) -> Spans | None:
        """Return the spans of whole prompts of one length; what is taken slot by slot cannot be recorded."""
        return spans if _even(spans) else None

    def embed(
        self, rows: Rows, cache: Cache, tokens: Linear, positions: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, Placed]:
        """Return the residual stream [T, E] in the model's dtype, its layer norm, and where the tokens are."""
        ids = torch.where(rows.tokens < 0, cache.newest[rows.slots], rows.tokens)
        at = torch.where(rows.positions < 0, cache.lengths[rows.slots], rows.positions)
        x = tokens.weight.t()[ids] + positions[at]
        return x, _norm(x, norm), Placed(rows.slots, at, at)

    def qkv(self, x: torch.Tensor, layer: Linear, cache: Cache, index: int, rows: Rows, placed: Placed) -> torch.Tensor:
        """Return queries [T, E]; keys and values are kept."""
        _, heads, _, size = cache.keys[index].shape
        if index not in self._kept:
            shape = (2, len(cache.newest), heads, self.reach, size)
            with torch.inference_mode(False):  # made in inference mode, a graph's recording could not write to it
                kept = torch.zeros(shape, dtype=x.dtype, device=x.device)
            self._kept[index] = (kept[0], kept[1])
        keys, values = self._kept[index]
        assert layer.bias is not None
        result = torch.addmm(layer.bias, x, layer.weight).view(len(x), 3, heads, size)
        keys[placed.slots, :, placed.positions] = result[:, 1]
        values[placed.slots, :, placed.positions] = result[:, 2]
        return result[:, 0].reshape(len(x), heads * size)

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
        """Return causal attention [T, E]: in one call where rows or prompts are of one length, else slot by slot."""
        keys, values = self._kept[index]
        count, (_, heads, reach, size) = len(query), keys.shape
        if rows.tile == 1:
            seen = torch.arange(reach, device=query.device)[None, :] <= placed.positions[:, None]
            q = query.view(count, heads, 1, size)
            out = functional.scaled_dot_product_attention(
                q, keys[:count], values[:count], attn_mask=seen[:, None, None], scale=scale
            )
            return out.reshape(count, heads * size)
        slots = placed.slots.long()
        if _even(rows.spans):
            length = rows.spans[0][1]
            starts = slots[::length]
            k, v = (kept[starts, :, :length] for kept in (keys, values))
            q = query.view(len(starts), length, heads, size).transpose(1, 2)
            result = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            return result.transpose(1, 2).reshape(count, heads * size)
        pieces = []
        for first, length, position in rows.spans:
            slot, stop = slots[first], position + length
            k, v = keys[slot, :, :stop][None], values[slot, :, :stop][None]
            seen = torch.ones(length, stop, dtype=torch.bool, device=query.device).tril(position)
            q = query[first : first + length].view(1, length, heads, size).transpose(1, 2)
            result = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
            pieces.append(result.transpose(1, 2).reshape(length, heads * size))
        return torch.cat(pieces)

    def partial(self, x: torch.Tensor, layer: Linear, before: Linear | None = None) -> torch.Tensor:
        """Return ``x @ weight + bias`` [1, T, N] in the model's dtype."""
        assert layer.bias is not None
        return torch.addmm(layer.bias, x, layer.weight)[None]

    def add_norm(
        self, x: torch.Tensor, partial: torch.Tensor, layer: Linear, norm: Norm, select: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x + partial`` and its layer norm."""
        result = x + partial[0]
        if select is not None:
            result = result[select.long()]
        return result, _norm(result, norm)

    def gelu(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """Return ``gelu_new(x @ weight + bias)`` [T, N]."""
        assert layer.bias is not None
        return functional.gelu(torch.addmm(layer.bias, x, layer.weight), approximate="tanh")

    def choose(
        self, x: torch.Tensor, layer: Linear, rows: Rows, placed: Placed, cache: Cache, into: torch.Tensor | None
    ) -> None:
        """Score the vocabulary, log the two best, and advance the slots; no hash, which is not the libraries' work."""
        scores = x @ layer.weight
        if into is not None:
            into.copy_(scores)
        values, tokens = scores.topk(2, dim=1)
        finite = torch.isfinite(values[:, 0])
        hashes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        advance(RowSummary(tokens, values.float(), hashes, finite), rows, placed, cache)


def _norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _even(spans: Spans) -> bool:
    """Return whether spans are prompts of one length from their beginnings."""
    return len({length for _, length, _ in spans}) == 1 and all(position == 0 for *_, position in spans)
