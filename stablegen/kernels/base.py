"""The interface of a kernel set: every operation that GPT-2 needs, each invariant to what shares its batch.

A kernel set promises that row ``i`` of each result depends on row ``i`` of the operands alone: not on how many
rows there are, nor on their order, nor on their content. It keeps that promise by choosing tiles and the order
of its sums from dtype, N, K and head size only, never from M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

Activation = Literal["none", "gelu_new"]


@dataclass(frozen=True, slots=True)
class Linear:
    """One affine layer: ``weight`` [K, N] of any strides, ``bias`` [N] or None, both in the model's dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class BestTwo:
    """What a decode step keeps of a row of scores.

    ``tokens`` [M, 2] int64: the best and the second-best token, the lower id first where scores are equal.
    ``scores`` [M, 2] float32: theirs. ``hashes`` [M] int64: a 64-bit hash of the whole row's bits.
    ``finite`` [M] bool: whether every score of the row is finite.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    hashes: torch.Tensor
    finite: torch.Tensor


class KernelSet(Protocol):
    """The operations; M and T count rows (tokens), E, K and N features, H heads, D a head's size, V tokens."""

    name: str
    """Goes into ``Numerics`` with ``version``: results of another set or version are other bits."""
    version: int

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Lay out one affine layer as ``linear`` wants it, once, when the model is loaded."""
        ...

    def linear(
        self,
        x: torch.Tensor,  # [M, K], the model's dtype
        layer: Linear,
        *,
        activation: Activation = "none",
        residual: torch.Tensor | None = None,  # [M, N], float32
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return ``activation(x @ weight + bias) + residual`` [M, N], accumulated in float32, rounded once."""
        ...

    def layer_norm(
        self,
        x: torch.Tensor,  # [M, E], float32
        weight: torch.Tensor,  # [E]
        bias: torch.Tensor,  # [E]
        *,
        eps: float,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the rows' layer norm [M, E]; mean and biased variance in float32, two passes."""
        ...

    def attention(
        self,
        query: torch.Tensor,  # [T, H, D], the model's dtype
        keys: torch.Tensor,  # [S, H, C, D], the cache: S slots of C positions
        values: torch.Tensor,  # [S, H, C, D]
        *,
        slots: torch.Tensor,  # [T] int64: the slot of the cache each token belongs to
        positions: torch.Tensor,  # [T] int64: its absolute position; it sees positions 0..itself of its slot
        scale: float,
    ) -> torch.Tensor:
        """Return causal attention [T, H, D] in the query's dtype; keys are summed in fixed absolute blocks.

        Positions behind a token's own may hold anything finite: their weight is exactly zero.
        """
        ...

    def best_two(self, scores: torch.Tensor) -> BestTwo:
        """Reduce rows of scores [M, V] float32 to what a decode step keeps."""
        ...
