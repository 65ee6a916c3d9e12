"""The head in Triton: scores, the two best and the hash of each row without writing the row, then the end of the step.

**Why no batch can move a bit.** A score is one chain of ``mma.sync`` steps (see ``linear``). All that follows is
exact: a maximum has no rounding, and the hash adds integers modulo 2**64, in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stablegen.kernels import log as layout
from stablegen.kernels.base import PAGE, Cache, Linear, Placed, Rows
from stablegen.kernels.launch import launch, launch_next, wait_for_previous
from stablegen.kernels.product import place, product
from stablegen.kernels.tiles import Tile, compiled, linear_plan

LOWEST = tl.constexpr(-0x8000000000000000)
"""Ranks below every score."""
FOUND = tl.constexpr(4)
"""What a tile finds of a row, int64: best rank, second-best rank, sum of the hash, whether a score is not finite."""
TOKEN = tl.constexpr(layout.TOKEN)
RUNNER_UP = tl.constexpr(layout.RUNNER_UP)
SCORE = tl.constexpr(layout.SCORE)
RUNNER_UP_SCORE = tl.constexpr(layout.RUNNER_UP_SCORE)
HASH = tl.constexpr(layout.HASH)
FINITE = tl.constexpr(layout.FINITE)
WIDTH = tl.constexpr(layout.WIDTH)


def choose(
    x: torch.Tensor,  # [R, E]
    layer: Linear,
    rows: Rows,
    placed: Placed,
    cache: Cache,
    scores: torch.Tensor | None,  # [R, V] float32
    tile: Tile | None = None,
) -> None:
    """Score the vocabulary, log the two best and the hash of each row, and advance the rows' slots.

    The order of a sum cannot depend on the batch: one program adds up all blocks of K in their order, and what is made
    of the scores is exact.
    """
    count = x.shape[-2]
    plan = linear_plan(layer.n, layer.k)
    tile = tile or _tile(layer, count)
    tiles_n = triton.cdiv(layer.n, tile.block_n)
    found = torch.empty((count, tiles_n, FOUND.value), dtype=torch.int64, device=x.device)
    launch(
        _score,
        (triton.cdiv(count, tile.block_m) * tiles_n,),
        x.device,
        x,
        layer.weight,
        found,
        scores,
        count,
        layer.n,
        layer.k,
        SLICES=plan.splits,
        **compiled(layer, plan, tile),
    )
    launch(
        _advance,
        (count,),
        x.device,
        found,
        rows.last,
        rows.tick,
        rows.slots,
        placed.positions,
        cache.newest,
        cache.lengths,
        cache.log,
        cache.log.shape[0],
        cache.log.shape[1],
        len(cache.newest) - 1,
        cache.table.shape[1] * PAGE - 1,
        V=layer.n,
        TILES=tiles_n,
        BLOCK=triton.next_power_of_2(tiles_n),
        num_warps=8,
    )


def _tile(layer: Linear, rows: int) -> Tile:
    if rows <= 16:
        return Tile(16, 32, 2, 4) if layer.paired else Tile(16, 64, 4, 3)
    if layer.paired:
        return Tile(64, 32, 2, 4) if rows <= 64 else Tile(32, 128, 4, 3)
    return Tile(64, 64, 2, 3) if rows <= 256 else Tile(64, 128, 2, 3)


@triton.jit(do_not_specialize=["M", "scores"])  # type: ignore[untyped-decorator]  # triton has no stubs
def _score(  # launched by position
    x: tl.tensor,
    weight: tl.tensor,
    found: tl.tensor,
    scores: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRED: tl.constexpr,
    UNIT: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    rows, columns = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    launch_next(EARLY)
    total = product(
        x,
        weight,
        None,
        rows,
        columns,
        0,
        M,
        N,
        K,
        0,
        False,
        SLICES,
        SLICE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        AHEAD,
        PAIRED,
        UNIT,
        WIDEN,
        EARLY,
    )
    row_ok = rows < M
    inside = (columns < N)[None, :]
    if scores is not None:
        tl.store(scores + rows.to(tl.int64)[:, None] * N + columns[None, :], total, mask=row_ok[:, None] & inside)
    bits = total.to(tl.int32, bitcast=True)
    hashed = _fold(bits.to(tl.int64).to(tl.uint64, bitcast=True) * _hash_key(columns)[None, :])
    hashed = tl.sum(tl.where(inside, hashed.to(tl.int64, bitcast=True), 0), axis=1)
    magnitude = bits & 0x7FFFFFFF
    infinite = tl.max(tl.where(inside & (magnitude >= 0x7F800000), 1, 0), axis=1)
    rank = _rank(tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, bits), columns[None, :])
    rank = tl.where(inside, rank, LOWEST)
    best = tl.max(rank, axis=1)
    second = tl.max(tl.where(rank == best[:, None], LOWEST, rank), axis=1)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    to = found + (rows.to(tl.int64) * tiles_n + tl.min(columns, axis=0) // BLOCK_N) * FOUND
    tl.store(to, best, mask=row_ok)
    tl.store(to + 1, second, mask=row_ok)
    tl.store(to + 2, hashed, mask=row_ok)
    tl.store(to + 3, infinite.to(tl.int64), mask=row_ok)


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no stubs
    do_not_specialize=["last", "tick", "slots", "positions", "TICKS", "ROWS", "SPARE", "LAST"]
)
def _advance(  # launched by position
    found: tl.tensor,
    last: tl.tensor,
    tick: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    newest: tl.tensor,
    lengths: tl.tensor,
    log: tl.tensor,
    TICKS: tl.tensor,
    ROWS: tl.tensor,
    SPARE: tl.tensor,
    LAST: tl.tensor,
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    launch_next(EARLY)
    wait_for_previous(EARLY)
    index = tl.arange(0, BLOCK)
    there = index < TILES
    at = found + (row.to(tl.int64) * TILES + index) * FOUND
    best = tl.load(at, mask=there, other=LOWEST)
    second = tl.load(at + 1, mask=there, other=LOWEST)
    hashed = tl.sum(tl.load(at + 2, mask=there, other=0), axis=0)
    infinite = tl.max(tl.load(at + 3, mask=there, other=0), axis=0)
    top = tl.max(best, axis=0)
    runner_up = tl.max(tl.where(best == top, second, best), axis=0)
    if V == 1:  # a lone token is its own runner-up
        runner_up = top
    token = _rank_id(top, V)
    now = tl.load(tick + row)
    entry = log + ((now % TICKS).to(tl.int64) * ROWS + row) * WIDTH
    tl.store(entry + TOKEN, token)
    tl.store(entry + RUNNER_UP, _rank_id(runner_up, V))
    tl.store(entry + SCORE, _rank_bits(top))
    tl.store(entry + RUNNER_UP_SCORE, _rank_bits(runner_up))
    tl.store(entry + HASH, hashed.to(tl.int32))
    tl.store(entry + HASH + 1, (hashed >> 32).to(tl.int32))
    tl.store(entry + FINITE, (infinite == 0).to(tl.int32))
    tl.store(entry + WIDTH - 1, 0)
    tl.store(tick + row, now + 1)
    of = tl.load(last + row)
    slot = tl.load(slots + of)
    position = tl.minimum(tl.load(positions + of) + 1, LAST)
    tl.store(newest + slot, token)
    # the spare slot, which fills a batch up, starts at 0 each time: it must not grow
    tl.store(lengths + slot, tl.where(slot == SPARE, 0, position))


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _rank(bits: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return an int64 that orders as the score does and, where scores are equal, prefers the lower id."""
    bits = tl.where(bits == -0x80000000, 0, bits)  # -0.0 equals 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _rank_id(rank: tl.tensor, V: tl.constexpr) -> tl.tensor:
    return tl.minimum(0x7FFFFFFF - (rank & 0x7FFFFFFF), V - 1).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _rank_bits(rank: tl.tensor) -> tl.tensor:
    ordered = (rank >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _hash_key(index: tl.tensor) -> tl.tensor:
    x = index.to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _fold(x: tl.tensor) -> tl.tensor:
    return x ^ (x >> 32)
