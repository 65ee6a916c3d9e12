"""Affine layers in Triton: sums of tensor-core steps whose order is fixed by dtype, N and K.

**Why no batch can move a bit.** K is cut into ``splits`` slices and these into blocks of ``block_k``. A slice is a
chain of ``mma.sync`` steps over ascending k that begins at zero, of pairs (see ``operand``) a sum of such chains, one a
block, in their order; slices are added up in their order, outside of the tensor cores. ``tiles.linear_plan`` fixes all
of this from N and K. The number of rows decides only which outputs a program computes (``tiles.linear_tile``), when it
fetches what it needs, and whether the slices of an output meet in one program or in the kernel that reads its summands.
A tile of 64 rows or more never has four warps or more, for then Triton would choose ``wgmma`` on Hopper, an instruction
of another shape.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from stablegen.kernels.base import Linear
from stablegen.kernels.launch import launch, launch_next
from stablegen.kernels.operand import operand, store_operand
from stablegen.kernels.product import gelu_new, place, product
from stablegen.kernels.tiles import Tile, compiled, linear_plan, linear_tile


def prepare(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Lay a weight [K, N] out as [N, K], where a column's numbers lie side by side; float32 as pairs [2, N, K]."""
    k, n = weight.shape
    weight = weight.t().contiguous()
    if weight.dtype != torch.float32:
        return Linear(weight, bias, k, n)
    # the largest number comes close to the end of float16's range, so that the small ones stay far from its beginning
    exponent = min(14 - math.frexp(weight.abs().max().item())[1], 100)
    pair, rows = torch.empty((2, n, k), dtype=torch.float16, device=weight.device), max(1, 2**24 // k)
    for start in range(0, n, rows):  # in pieces: memory for the whole of it may be short
        part = torch.ldexp(weight[start : start + rows], torch.tensor(exponent, device=weight.device))
        pair[0, start : start + rows] = part
        pair[1, start : start + rows] = (part - pair[0, start : start + rows].float()) * 2.0**11
    return Linear(pair, bias, k, n, exponent=exponent)


def partial(
    x: torch.Tensor, layer: Linear, before: Linear | None = None, tile: Tile | None = None, *, first: bool = False
) -> torch.Tensor:
    """Return ``x @ weight`` [P, M, N] float32, to be added up in order; P is 1 where a program added all slices.

    With ``before``, x is what ``partial`` returned for that layer, and is added up, biased and put through gelu_new as
    it is read. ``first``: of a pass; see ``qkv``. The order of a sum cannot depend on the batch: it is the plan's, and
    both ways add the same slices in it.
    """
    rows = x.shape[-2]
    plan = linear_plan(layer.n, layer.k)
    tile = tile or linear_tile(layer, rows)
    programs = plan.splits if tile.split_programs else 1
    out = torch.empty((programs, rows, layer.n), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(layer.n, tile.block_n)
    assert before is None or (tile.ahead and programs == plan.splits), tile
    launch(
        _partial,
        (tiles, programs),
        x.device,
        x,
        layer.weight,
        out,
        None if before is None else before.bias,
        rows,
        layer.n,
        layer.k,
        PARTS=0 if before is None else len(x),
        ONE=rows == 1,
        FIRST=first,
        SLICES=plan.splits // programs,
        **compiled(layer, plan, tile),
    )
    return out


def gelu(x: torch.Tensor, layer: Linear, tile: Tile | None = None) -> torch.Tensor:
    """Return ``gelu_new(x @ weight + bias)`` [M, N] as an operand.

    The order of a sum cannot depend on the batch: one program adds up all slices in their order.
    """
    rows = x.shape[-2]
    plan = linear_plan(layer.n, layer.k)
    tile = tile or linear_tile(layer, rows)
    out = operand((rows, layer.n), torch.float32 if layer.paired else x.dtype, x.device)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(layer.n, tile.block_n)
    launch(
        _gelu,
        (tiles,),
        x.device,
        x,
        layer.weight,
        layer.bias,
        out,
        rows,
        layer.n,
        layer.k,
        SLICES=plan.splits,
        **compiled(layer, plan, tile),
    )
    return out


def qkv(
    x: torch.Tensor,
    layer: Linear,
    keys: torch.Tensor,  # [pages, H, PAGE, D], one layer of the cache, or pairs of it
    values: torch.Tensor,
    places: torch.Tensor,  # [M] int32
    tile: Tile | None = None,
    *,
    first: bool = False,
) -> torch.Tensor:
    """Return queries [M, E] as an operand; each row's key and value go to its place in the cache.

    ``first``: whether it is the first product of a pass. No later kernel begins before such a one has its rows, so
    all that came before ``embed`` is done by then, and need not be waited for. The order of a sum cannot depend on the
    batch: one program adds up all slices in their order.
    """
    rows = x.shape[-2]
    _, heads, page, size = keys.shape[-4:]
    plan = linear_plan(layer.n, layer.k)
    tile = tile or linear_tile(layer, rows)
    out = operand((rows, layer.n // 3), torch.float32 if layer.paired else x.dtype, x.device)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(layer.n, tile.block_n)
    launch(
        _qkv,
        (tiles,),
        x.device,
        x,
        layer.weight,
        layer.bias,
        out,
        keys,
        values,
        places,
        rows,
        layer.n,
        layer.k,
        keys.stride(0),
        HEADS=heads,
        D=size,
        PAGE=page,
        FIRST=first,
        SLICES=plan.splits,
        **compiled(layer, plan, tile),
    )
    return out


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]  # triton has no stubs
def _partial(  # launched by position
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    bias: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ONE: tl.constexpr,
    FIRST: tl.constexpr,
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
    split = tl.program_id(1)
    rows, columns = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    start = split * (SLICES * SLICE)
    if not FIRST:
        launch_next(EARLY)
    total = product(
        x,
        weight,
        bias,
        rows,
        columns,
        start,
        M,
        N,
        K,
        PARTS,
        ONE,
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
    if FIRST:
        launch_next(EARLY)
    to = out + (split.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
    tl.store(to, total, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]  # triton has no stubs
def _gelu(  # launched by position
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
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
        bias,
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
    total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    to = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    store_operand(to, gelu_new(total), mask, M.to(tl.int64) * N, PAIRED)


@triton.jit(do_not_specialize=["M", "places", "SIZE"])  # type: ignore[untyped-decorator]  # triton has no stubs
def _qkv(  # launched by position
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    FIRST: tl.constexpr,
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
    if not FIRST:
        launch_next(EARLY)
    total = product(
        x,
        weight,
        bias,
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
    if FIRST:
        launch_next(EARLY)
    total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    E: tl.constexpr = HEADS * D
    row_ok = (rows < M)[:, None]
    to_query = query + rows.to(tl.int64)[:, None] * E + columns[None, :]
    store_operand(to_query, total, row_ok & (columns < E)[None, :], M.to(tl.int64) * E, PAIRED)
    spot = tl.load(places + rows, mask=rows < M, other=0).to(tl.int64)
    feature = columns % E
    offset = ((spot // PAGE * HEADS * PAGE + spot % PAGE) * D)[:, None]
    offset += (feature // D * (PAGE * D) + feature % D)[None, :]
    size = SIZE.to(tl.int64)
    store_operand(keys + offset, total, row_ok & ((columns >= E) & (columns < 2 * E))[None, :], size, PAIRED)
    store_operand(values + offset, total, row_ok & ((columns >= 2 * E) & (columns < N))[None, :], size, PAIRED)
