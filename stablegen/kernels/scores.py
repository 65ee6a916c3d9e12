"""What a decode step keeps of a row of scores, as one Triton program a row that works in integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stablegen.kernels.base import BestTwo


@dataclass(frozen=True, slots=True)
class BestTwoConfiguration:
    """The scores that one step takes, and the warps that share them."""

    block_v: int
    num_warps: int


def best_two_configuration(v: int) -> BestTwoConfiguration:
    """Return the block for rows of V scores."""
    block_v = min(4096, max(32, triton.next_power_of_2(v)))
    return BestTwoConfiguration(block_v=block_v, num_warps=max(1, block_v // 256))


def best_two(scores: torch.Tensor) -> BestTwo:
    """Reduce rows of scores [M, V] float32 to what a decode step keeps, bit for bit as ``reference.best_two`` does.

    The order of a sum cannot matter: only integers are added, modulo 2**64, and a maximum has no rounding.
    """
    rows, vocabulary = scores.shape
    assert scores.dtype == torch.float32, scores.dtype
    assert 0 < vocabulary < 2**31, vocabulary
    scores = scores.contiguous()
    tokens = torch.empty((rows, 2), dtype=torch.int64, device=scores.device)
    kept = torch.empty((rows, 2), dtype=torch.float32, device=scores.device)
    hashes = torch.empty(rows, dtype=torch.int64, device=scores.device)
    finite = torch.empty(rows, dtype=torch.bool, device=scores.device)
    if rows > 0:
        configuration = best_two_configuration(vocabulary)
        with torch.cuda.device(scores.get_device()):  # -1 on a CPU: changes nothing
            _best_two[(rows,)](
                scores.view(torch.int32),
                tokens,
                kept.view(torch.int32),
                hashes,
                finite,
                vocabulary,
                BLOCK_V=configuration.block_v,
                num_warps=configuration.num_warps,
            )
    return BestTwo(tokens=tokens, scores=kept, hashes=hashes, finite=finite)


@triton.jit(do_not_specialize=["bits_in", "V"])  # type: ignore[untyped-decorator]  # triton has no stubs
def _best_two(  # launched by position
    bits_in: tl.tensor,
    tokens: tl.tensor,
    kept: tl.tensor,
    hashes: tl.tensor,
    finite: tl.tensor,
    V: tl.tensor,
    BLOCK_V: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    bits_in += row * V
    lowest = tl.full((BLOCK_V,), -0x8000000000000000, tl.int64)
    best = lowest
    second = lowest
    hashed = tl.zeros((BLOCK_V,), tl.uint64)
    infinite = tl.zeros((BLOCK_V,), tl.int32)
    unordered = tl.zeros((BLOCK_V,), tl.int32)  # NaN anywhere but at the last id
    for start in range(0, V, BLOCK_V):
        index = start + tl.arange(0, BLOCK_V)
        inside = index < V
        bits = tl.load(bits_in + index, mask=inside, other=0)
        magnitude = bits & 0x7FFFFFFF
        infinite |= (magnitude >= 0x7F800000).to(tl.int32)
        nan = magnitude > 0x7F800000
        unordered |= (nan & (index < V - 1)).to(tl.int32)
        # bits 0, as in the masked places, add 0 to the hash
        hashed += _fold(bits.to(tl.int64).to(tl.uint64, bitcast=True) * _hash_key(index))
        rank = tl.where(inside, _rank(tl.where(nan, 0x7FFFFFFF, bits), index), lowest)
        second = tl.maximum(second, tl.minimum(best, rank))
        best = tl.maximum(best, rank)
    top = tl.max(best, axis=0)
    runner_up = tl.max(tl.where(best == top, second, best), axis=0)
    last = V.to(tl.int64) - 1
    clamp = tl.max(unordered, axis=0) > 0
    first_id = tl.where(clamp, last, _rank_id(top))
    second_id = tl.where(clamp | (last == 0), last, _rank_id(runner_up))
    tl.store(tokens + row * 2, first_id)
    tl.store(tokens + row * 2 + 1, second_id)
    tl.store(kept + row * 2, tl.load(bits_in + first_id))
    tl.store(kept + row * 2 + 1, tl.load(bits_in + second_id))
    tl.store(hashes + row, tl.sum(hashed.to(tl.int64, bitcast=True), axis=0))
    tl.store(finite + row, tl.max(infinite, axis=0) == 0)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _rank(bits: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return an int64 that orders as the score does and, where scores are equal, prefers the lower id."""
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0.0 equals 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _rank_id(rank: tl.tensor) -> tl.tensor:
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _hash_key(index: tl.tensor) -> tl.tensor:
    x = index.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _fold(x: tl.tensor) -> tl.tensor:
    return x ^ (x >> 32)
