"""The interface of a kernel set: every operation of a forward pass, each invariant to what shares its batch.

A kernel set promises that row ``i`` of each result depends on row ``i`` of the operands alone (and attention on the
keys and values of its own slot): not on how many rows there are, nor on their order, nor on their content. It keeps
that promise by choosing the order of its sums from dtype, N, K and head size only, never from the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

PAGE = 64
"""Positions in a page of the KV cache."""
Spans = tuple[tuple[int, int, int], ...]
"""On the host, each slot's first token in a pass, how many it has there, and the position of the first."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One affine layer [K, N] as its kernel set laid it out; ``weight`` and ``bias`` are the set's own.

    ``exponent``: where ``weight`` holds pairs of float16 in place of float32, they are those of
    ``weight * 2**exponent``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    k: int
    n: int
    exponent: int | None = None

    @property
    def paired(self) -> bool:
        """Return whether ``weight`` holds pairs of float16 in place of float32."""
        return self.exponent is not None


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm's gain and shift [E], and what is added to the variance."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rows:
    """What one forward pass works on: T packed tokens, Q tiles of them, R tokens whose scores are needed; all int32.

    ``tokens`` [T]: ids, or -1 for the newest token of its slot. ``slots`` [T]. ``positions`` [T]: absolute, or -1 for
    the next one of its slot. ``tile_first``, ``tile_count`` [Q]: each tile is a run of at most ``tile`` tokens of one
    slot at consecutive positions; a ``tile`` of 1 says that every token is its slot's newest, -1. ``last`` [R]: the
    tokens whose scores are needed. ``tick`` [R]: the entry of the log to be written, one ahead after each pass.
    ``spans``: where a pass is not one token a slot.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    tile_first: torch.Tensor
    tile_count: torch.Tensor
    last: torch.Tensor
    tick: torch.Tensor
    tile: int
    spans: Spans = ()


class Cache(Protocol):
    """The state of all slots: paged keys and values, and how far each slot has come.

    ``keys``, ``values`` [layers, pages, H, PAGE, D] in the model's dtype. ``table`` [S, pages a slot] int32: the page
    of each run of ``PAGE`` positions. ``newest``, ``lengths`` [S] int32: each slot's newest token, and its position.
    ``log`` [ticks, rows, WIDTH] int32: what was chosen, as ``kernels.log`` lays it out.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    newest: torch.Tensor
    lengths: torch.Tensor
    log: torch.Tensor


class Placed(NamedTuple):
    """Where tokens are, [T] int32: slot, absolute position, and ``places``, ``page * PAGE + position % PAGE``."""

    slots: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class RowSummary:
    """What a decode step keeps of each of M rows of scores.

    ``tokens`` [M, 2] int64: the best and the second-best token, the lower id first where scores are equal.
    ``scores`` [M, 2] float32: their scores. ``hashes`` [M] int64: a 64-bit hash of the whole row's bits.
    ``finite`` [M] bool: whether every score of the row is finite.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    hashes: torch.Tensor
    finite: torch.Tensor


class KernelSet(Protocol):
    """The operations, in the order of a forward pass; T tokens, E features, H heads of D, V tokens.

    What they pass on to each other, besides the residual stream, each set lays out in its own way: in 16 bits, as
    pairs, as summands.
    """

    name: str
    """Part of ``Numerics``, with ``version``: another set or version gives other bits."""
    version: int
    tile: int
    """Tokens of one slot that attention computes together at most."""
    paired: bool
    """Whether float32 keys and values are kept as pairs of float16, [layers, 2, pages, H, PAGE, D]."""

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Lay out one affine layer, ``weight`` [K, N] of any strides and ``bias`` [N], once, when it is loaded."""
        ...

    def graph_key(self, spans: Spans) -> Spans | None:
        """Return the part of a graph's key that comes from a pass's ``spans`` (see ``Rows``).

        Passes of one size and equal keys can replay each other's graph. ``()`` where the kernels do not depend on the
        spans; None where no graph can replay the pass.
        """
        ...

    def embed(
        self, rows: Rows, cache: Cache, tokens: Linear, positions: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, Placed]:
        """Return the residual stream [T, E] float32, its layer norm, and where the tokens are.

        ``tokens`` is the embedding laid out as a head [E, V], and mostly is the head; ``positions`` [C, E].
        """
        ...

    def qkv(self, x: torch.Tensor, layer: Linear, cache: Cache, index: int, rows: Rows, placed: Placed) -> torch.Tensor:
        """Return the queries that ``attention`` takes; keys and values go into layer ``index`` of the cache."""
        ...

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
        """Return causal attention [T, E] over layer ``index``, summed over keys in fixed absolute blocks.

        ``layer`` is the one that made ``query``.
        """
        ...

    def partial(self, x: torch.Tensor, layer: Linear, before: Linear | None = None) -> torch.Tensor:
        """Return ``x @ weight`` as summands [P, T, N] float32, to be added up in order; no bias.

        ``before``: the layer whose ``gelu`` made x.
        """
        ...

    def add_norm(
        self, x: torch.Tensor, partial: torch.Tensor, layer: Linear, norm: Norm, select: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x + (sum(partial) + bias)`` [T, E] float32 and its layer norm; of ``select`` [R] rows only."""
        ...

    def gelu(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """Return ``gelu_new(x @ weight + bias)`` [T, N] as ``partial`` takes it."""
        ...

    def choose(
        self, x: torch.Tensor, layer: Linear, rows: Rows, placed: Placed, cache: Cache, scores: torch.Tensor | None
    ) -> None:
        """Score the vocabulary for R rows [R, E], log what a step keeps, and advance their slots.

        ``scores`` [R, V] float32 receives the full rows where it is given; the bits chosen from are the same.
        """
        ...
