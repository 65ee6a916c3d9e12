"""Causal attention over the paged KV cache in Triton, a program a tile of tokens and head.

**Why no batch can move a bit.** A token's keys come in blocks that begin at multiples of ``BLOCK_KEYS`` positions, in
ascending order, from 0 to its own block; within a block its scores, the sum of its weights and the weighted values are
chains of ``mma.sync`` steps, and a maximum has no rounding. A tile only puts tokens of one slot beside each other, as
other rows of the same instructions; a block of later positions only multiplies by one and adds zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stablegen.kernels.base import Cache, Linear, Placed, Rows
from stablegen.kernels.launch import launch, launch_next, prefetch, wait_for_previous
from stablegen.kernels.operand import EXPONENT, block_product, load_pair, lone_row, operand, pair, store_operand

BLOCK_KEYS = {False: 128, True: 64}
"""Keys that one step takes, an absolute block of positions: of 16-bit numbers, and of pairs."""
TILE = 32
"""Tokens of one slot in one program at most."""
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """The rows of one program, and how it is compiled: rows and warps are a matter of speed alone."""

    rows: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        assert self.rows < 64 or self.num_warps < 4, self


def attention(
    query: torch.Tensor,  # [T, E], or pairs [2, T, E], or summands [P, T, 3 E] of queries, keys and values, float32
    layer: Linear,
    cache: Cache,
    index: int,
    rows: Rows,
    placed: Placed,
    scale: float,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """Return causal attention [T, E] as an operand; positions after a token's own weigh zero.

    Where ``query`` comes as summands of ``layer``, they are added up and biased here, and key and value are stored.
    The order of a sum cannot depend on the batch: keys come in absolute blocks in ascending order, and a tile's rows
    are rows of the same instructions, whatever and however many they are.

    For newest tokens, slots, lengths, table and earlier keys are read while the kernels before this one still run: they
    must be older than the pass, which begins with ``embed`` and a ``first`` product.
    """
    keys, values = cache.keys[index], cache.values[index]
    _, heads, page, size = keys.shape[-4:]
    paired = keys.dim() == 5
    count = query.shape[-2]
    summands = query.dtype == torch.float32
    assert rows.tile == 1 or not summands
    out = operand((count, heads * size), torch.float32 if paired else keys.dtype, query.device)
    tile = tile or _tile(rows.tile, paired)
    launch(
        _attention,
        (len(rows.tile_first), heads),
        query.device,
        query,
        layer.bias,
        keys,
        values,
        cache.table,
        cache.lengths,
        cache.table.shape[1],
        rows.slots,
        placed.positions,
        rows.tile_first,
        rows.tile_count,
        out,
        # pairs of queries and keys are 2**EXPONENT times as large, those of values as those of the result
        scale * _LOG2_E * (2.0 ** (-2 * EXPONENT) if paired else 1.0),
        count,
        keys.stride(0),
        HEADS=heads,
        D=size,
        PAGE=page,
        ROWS=tile.rows,
        BLOCK_D=max(16, triton.next_power_of_2(size)),
        BLOCK_KEYS=BLOCK_KEYS[paired],
        NEWEST=rows.tile == 1,
        PARTS=len(query) if summands else 0,
        PAIRED=paired,
        WIDEN=keys.dtype == torch.bfloat16 and not query.is_cuda,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _tile(count: int, paired: bool) -> AttentionTile:
    return AttentionTile(16 if count == 1 else TILE, 4, 1 if count == 1 else 2)


@triton.jit(  # type: ignore[untyped-decorator]  # triton has no stubs
    do_not_specialize=["PAGES", "slots", "positions", "tile_first", "tile_count", "T", "SIZE"]
)
def _attention(  # launched by position
    query: tl.tensor,
    bias: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    PAGES: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    tile_first: tl.tensor,
    tile_count: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    T: tl.tensor,
    SIZE: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NEWEST: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    E: tl.constexpr = HEADS * D
    head = tl.program_id(1)
    row = tl.arange(0, ROWS)
    feature = tl.arange(0, BLOCK_D)
    inside = feature < D
    column = head * D + feature
    offset = tl.arange(0, BLOCK_KEYS)
    size = SIZE.to(tl.int64)
    low = T.to(tl.int64) * E
    launch_next(EARLY)
    if NEWEST:
        # Each tile is one slot's newest token. Its position and all keys before its own were written by the pass
        # before: the first block is on its way before this kernel waits for the query.
        first = tl.program_id(0)
        count = 1
        slot = tl.load(slots + first)
        position = tl.load(lengths + slot)
        there = offset < position
        spot = _spot(table, slot, offset, there, head, PAGES, HEADS, D, PAGE)
        k_high, k_low = _load_keys(keys, spot, there, feature, inside, size, PAIRED)
        v_high, v_low = _load_values(values, spot, there, feature, inside, size, PAIRED)
        if EARLY:  # what the second step takes is not in the cache either
            further = _spot(
                table, slot, offset + BLOCK_KEYS, offset + BLOCK_KEYS < position, head, PAGES, HEADS, D, PAGE
            )
            prefetch(keys + further)
            prefetch(values + further)
            if PAIRED:
                prefetch(keys + size + further)
                prefetch(values + size + further)
        own = _spot(table, slot, position + tl.zeros_like(feature), inside, head, PAGES, HEADS, D, PAGE) + feature
        if PARTS > 0:
            q_bias = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            k_bias = tl.load(bias + E + column, mask=inside, other=0.0).to(tl.float32)
            v_bias = tl.load(bias + 2 * E + column, mask=inside, other=0.0).to(tl.float32)
            wait_for_previous(EARLY)
            at_row = query + first.to(tl.int64) * (3 * E) + column
            q_sum = _add_parts(at_row, inside, T, 3 * E, PARTS) + q_bias
            k_sum = _add_parts(at_row + E, inside, T, 3 * E, PARTS) + k_bias
            v_sum = _add_parts(at_row + 2 * E, inside, T, 3 * E, PARTS) + v_bias
            kh, kl = pair(k_sum, keys.dtype.element_ty, PAIRED)
            vh, vl = pair(v_sum, keys.dtype.element_ty, PAIRED)
            tl.store(keys + own, kh, mask=inside)
            tl.store(values + own, vh, mask=inside)
            if PAIRED:
                tl.store(keys + own + size, kl, mask=inside)
                tl.store(values + own + size, vl, mask=inside)
            q_high, q_low = lone_row(q_sum, row, inside, keys.dtype.element_ty, PAIRED)
        else:
            wait_for_previous(EARLY)
            kh, kl = load_pair(keys + own, inside, size, PAIRED)
            vh, vl = load_pair(values + own, inside, size, PAIRED)
        newest = offset == position
        k_high = tl.where(newest[None, :], kh[:, None], k_high)
        v_high = tl.where(newest[:, None], vh[None, :], v_high)
        if PAIRED:
            k_low = tl.where(newest[None, :], kl[:, None], k_low)
            v_low = tl.where(newest[:, None], vl[None, :], v_low)
        else:
            k_low = k_high
            v_low = v_high
    else:
        wait_for_previous(EARLY)
        first = tl.load(tile_first + tl.program_id(0))
        count = tl.load(tile_count + tl.program_id(0))
        slot = tl.load(slots + first)
        position = tl.load(positions + first)
        there = offset < position + count
        spot = _spot(table, slot, offset, there, head, PAGES, HEADS, D, PAGE)
        k_high, k_low = _load_keys(keys, spot, there, feature, inside, size, PAIRED)
        v_high, v_low = _load_values(values, spot, there, feature, inside, size, PAIRED)
    at = (first + row).to(tl.int64)[:, None] * E + column[None, :]
    held = (row < count)[:, None] & inside[None, :]
    if PARTS == 0:
        q_high = tl.load(query + at, mask=held, other=0.0)
        q_low = tl.load(query + low + at, mask=held, other=0.0) if PAIRED else q_high
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS, 16), tl.float32)  # the sum of a row's weights, in each of 16 columns
    result = tl.zeros((ROWS, BLOCK_D), tl.float32)
    reach = (position + row)[:, None]
    q = (q_high, q_low)
    seen = offset[None, :] <= reach
    best, weight, result = _take(q, (k_high, k_low), (v_high, v_low), seen, best, weight, result, scale, PAIRED, WIDEN)
    for start in range(BLOCK_KEYS, position + count, BLOCK_KEYS):
        key = start + offset
        there = key < position + count
        spot = _spot(table, slot, key, there, head, PAGES, HEADS, D, PAGE)
        if PARTS > 0:  # its own key, which other threads have just stored, comes from where it was made
            there = key < position
        k_high, k_low = _load_keys(keys, spot, there, feature, inside, size, PAIRED)
        v_high, v_low = _load_values(values, spot, there, feature, inside, size, PAIRED)
        if PARTS > 0:
            newest = key == position
            k_high = tl.where(newest[None, :], kh[:, None], k_high)
            v_high = tl.where(newest[:, None], vh[None, :], v_high)
            if PAIRED:
                k_low = tl.where(newest[None, :], kl[:, None], k_low)
                v_low = tl.where(newest[:, None], vl[None, :], v_low)
            else:
                k_low = k_high
                v_low = v_high
        seen = key[None, :] <= reach
        best, weight, result = _take(
            q, (k_high, k_low), (v_high, v_low), seen, best, weight, result, scale, PAIRED, WIDEN
        )
    total = tl.max(weight, axis=1)  # all 16 are equal
    result = result / total[:, None]
    if PAIRED:
        result = result * 16.0  # values came as 2**EXPONENT of themselves, and are paired again
    store_operand(out + at, result, held, low, PAIRED)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _take(
    q: tl.tensor,
    k: tl.tensor,  # [D, keys], high and low
    v: tl.tensor,  # [keys, D], high and low
    seen: tl.tensor,
    best: tl.tensor,
    weight: tl.tensor,
    result: tl.tensor,
    scale: tl.tensor,
    PAIRED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Take one block of keys into a tile's running maximum, weights and weighted values."""
    zero = tl.zeros((q[0].shape[0], k[0].shape[1]), dtype=tl.float32)
    score = tl.where(seen, block_product(q, k, zero, PAIRED, WIDEN) * scale, float("-inf"))
    now = tl.maximum(best, tl.max(score, axis=1))  # position 0 is always seen, so this is no -inf
    fade = tl.exp2(best - now)[:, None]
    share = tl.exp2(score - now[:, None])
    dtype: tl.constexpr = v[0].dtype
    high = share.to(dtype)
    low = ((share - high.to(tl.float32)) * 2048.0).to(dtype) if PAIRED else high
    ones = tl.full((v[0].shape[0], 16), 1.0, dtype)
    weight = block_product((high, low), (ones, ones * 0.0), weight * fade, PAIRED, WIDEN)
    return now, weight, block_product((high, low), v, result * fade, PAIRED, WIDEN)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _add_parts(
    pointers: tl.tensor, mask: tl.tensor, T: tl.tensor, WIDTH: tl.constexpr, PARTS: tl.constexpr
) -> tl.tensor:
    total = tl.load(pointers, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(pointers + part * T.to(tl.int64) * WIDTH, mask=mask, other=0.0)
    return total


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _spot(
    table: tl.tensor,
    slot: tl.tensor,
    key: tl.tensor,
    there: tl.tensor,
    head: tl.tensor,
    PAGES: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
) -> tl.tensor:
    """Return where in a layer the keys of these positions begin."""
    page = tl.load(table + slot * PAGES + key // PAGE, mask=there, other=0).to(tl.int64)
    return ((page * HEADS + head) * PAGE + key % PAGE) * D


# Both load zeros in place of what is not seen, for a weight of zero does not silence a NaN.
@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _load_keys(
    keys: tl.tensor,
    spot: tl.tensor,
    there: tl.tensor,
    feature: tl.tensor,
    inside: tl.tensor,
    size: tl.tensor,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    return load_pair(keys + spot[None, :] + feature[:, None], there[None, :] & inside[:, None], size, PAIRED)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _load_values(
    values: tl.tensor,
    spot: tl.tensor,
    there: tl.tensor,
    feature: tl.tensor,
    inside: tl.tensor,
    size: tl.tensor,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    return load_pair(values + spot[:, None] + feature[None, :], there[:, None] & inside[None, :], size, PAIRED)
