"""What comes between the matrix products, in Triton: embedding, residual sums and layer norm, a program a row.

**Why no batch can move a bit.** A row is summed by one program whose block and warps are fixed by E, and summands that
arrive separately are added in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stablegen.kernels.base import PAGE, Cache, Linear, Norm, Placed, Rows
from stablegen.kernels.launch import launch, launch_next, wait_for_previous
from stablegen.kernels.operand import operand, store_operand


@dataclass(frozen=True, slots=True)
class RowConfiguration:
    """The block that holds a whole row, and the warps that share it."""

    block_e: int
    num_warps: int


def row_configuration(e: int) -> RowConfiguration:
    """Return the block for rows of E features."""
    block_e = triton.next_power_of_2(e)
    return RowConfiguration(block_e=block_e, num_warps=min(8, max(1, block_e // 256)))


def embed(
    rows: Rows, cache: Cache, tokens: Linear, positions: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor, Placed]:
    """Return the residual stream [T, E] float32, its layer norm [T, E], and where the tokens are.

    The order of a sum cannot depend on the batch: a row is one program's, whose block is fixed by E.
    """
    count, e, device = len(rows.tokens), tokens.k, positions.device
    x = torch.empty((count, e), dtype=torch.float32, device=device)
    normed = operand((count, e), positions.dtype, device)
    at, places = torch.empty((2, count), dtype=torch.int32, device=device)
    configuration = row_configuration(e)
    launch(
        _embed,
        (count,),
        x.device,
        rows.tokens,
        rows.slots,
        rows.positions,
        cache.newest,
        cache.lengths,
        cache.table,
        cache.table.shape[1],
        tokens.weight,
        positions,
        norm.weight,
        norm.bias,
        x,
        normed,
        at,
        places,
        norm.eps,
        E=e,
        V=tokens.n,
        PAGE=PAGE,
        PAIRED=tokens.paired,
        UNIT=2.0**-tokens.exponent if tokens.exponent is not None else 1.0,
        BLOCK_E=configuration.block_e,
        num_warps=configuration.num_warps,
    )
    return x, normed, Placed(rows.slots, at, places)


def add_norm(
    x: torch.Tensor,  # [T, E] float32
    partial: torch.Tensor,  # [P, T, E] float32
    bias: torch.Tensor,  # [E]
    norm: Norm,
    select: torch.Tensor | None = None,  # [R] int32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + (sum(partial) + bias)`` and its layer norm, [T, E] or [R, E]; the sum is float32.

    The order of a sum cannot depend on the batch: summands come in their order, and a row is one program's, whose block
    is fixed by E.
    """
    count, e = x.shape if select is None else (len(select), x.shape[1])
    result = torch.empty((count, e), dtype=torch.float32, device=x.device)
    normed = operand((count, e), norm.weight.dtype, x.device)
    configuration = row_configuration(e)
    launch(
        _add_norm,
        (count,),
        x.device,
        x,
        partial,
        bias,
        select,
        norm.weight,
        norm.bias,
        result,
        normed,
        norm.eps,
        len(x),
        E=e,
        PARTS=len(partial),
        PAIRED=norm.weight.dtype == torch.float32,
        BLOCK_E=configuration.block_e,
        num_warps=configuration.num_warps,
    )
    return result, normed


# Addresses differ from batch to batch. The compiler would specialise by them how threads share a row, and with it the
# order of the row's sums: it must not.
_BY_BATCH = ["tokens", "slots", "positions", "PAGES", "x", "partial", "select", "T"]


@triton.jit(do_not_specialize=_BY_BATCH)  # type: ignore[untyped-decorator]  # triton has no stubs
def _embed(  # launched by position
    tokens: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    newest: tl.tensor,
    lengths: tl.tensor,
    table: tl.tensor,
    PAGES: tl.tensor,
    token_embedding: tl.tensor,
    position_embedding: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    x: tl.tensor,
    normed: tl.tensor,
    at: tl.tensor,
    places: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    V: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    by = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    add = tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    launch_next(EARLY)
    wait_for_previous(EARLY)
    slot = tl.load(slots + index)
    token = tl.load(tokens + index)
    position = tl.load(positions + index)
    if token < 0:
        token = tl.load(newest + slot)
    if position < 0:
        position = tl.load(lengths + slot)
    page = tl.load(table + slot * PAGES + position // PAGE)
    tl.store(at + index, position)
    tl.store(places + index, page * PAGE + position % PAGE)
    entry = token_embedding + token.to(tl.int64) * E + column
    content = tl.load(entry, mask=inside, other=0.0).to(tl.float32)
    if PAIRED:
        low = tl.load(entry + V * E, mask=inside, other=0.0).to(tl.float32)
        content = (content + low * 0.00048828125) * UNIT  # 2**-11
    content += tl.load(position_embedding + position.to(tl.int64) * E + column, mask=inside, other=0.0).to(tl.float32)
    _finish(content, by, add, x, normed, index, tl.num_programs(0), eps, E, BLOCK_E, PAIRED)


@triton.jit(do_not_specialize=_BY_BATCH[4:])  # type: ignore[untyped-decorator]  # triton has no stubs
def _add_norm(  # launched by position
    x: tl.tensor,
    partial: tl.tensor,
    bias: tl.tensor,
    select: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    result: tl.tensor,
    normed: tl.tensor,
    eps: tl.tensor,
    T: tl.tensor,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    index = tl.program_id(0)
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    launch_next(EARLY)
    shift_by = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    add = tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)
    row = index if select is None else tl.load(select + index)
    row = row.to(tl.int64)
    content = tl.load(partial + row * E + column, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        content += tl.load(partial + (part * T.to(tl.int64) + row) * E + column, mask=inside, other=0.0)
    content = tl.load(x + row * E + column, mask=inside, other=0.0) + (content + shift_by)
    _finish(content, by, add, result, normed, index, tl.num_programs(0), eps, E, BLOCK_E, PAIRED)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _finish(
    content: tl.tensor,
    gain: tl.tensor,
    shift: tl.tensor,
    result: tl.tensor,
    normed: tl.tensor,
    index: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAIRED: tl.constexpr,
) -> None:
    """Store a row and its layer norm: mean and biased variance in float32, two passes."""
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    at = index.to(tl.int64) * E + column
    tl.store(result + at, content, mask=inside)
    mean = tl.sum(content, axis=0) / E
    centred = tl.where(inside, content - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / E
    # rounded correctly: the approximate square root and quotient differ between architectures
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    store_operand(normed + at, centred * scale * gain + shift, inside, count.to(tl.int64) * E, PAIRED)
