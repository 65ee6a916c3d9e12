"""Affine layers in Triton: sums of tensor-core steps whose order is fixed by dtype, N and K.

**Why no batch can move a bit.** K is cut into ``splits`` slices and these into blocks of ``block_k``. A slice is a
chain of ``mma.sync`` steps over ascending k that begins at zero, of pairs (see ``operand``) a sum of such chains, one a
block, in their order; slices are added up in their order, outside of the tensor cores. ``linear_plan`` fixes all of
this from N and K. The number of rows decides only which outputs a program computes (``_tile``), when it fetches what it
needs, and whether the slices of an output meet in one program or in the kernel that reads its summands. A tile of 64
rows or more never has four warps or more, for then Triton would choose ``wgmma`` on Hopper, an instruction of another
shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from stablegen.kernels.base import Linear
from stablegen.kernels.launch import FEW_SHARED, MANY_SHARED, begin, invite, launch, prefetch
from stablegen.kernels.operand import EXPONENT, block_product, load_pair, lone_row, operand, pair, store_operand

BLOCK_K = 64
"""Elements of K in a block."""
FEW_ROWS = {False: 32, True: 16}
"""Rows up to which each slice of a sum gets a program of its own: of 16-bit numbers, and of pairs."""


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """How an output is summed: K in ``splits`` slices of ``slice_k``, each in blocks of ``block_k``."""

    splits: int
    slice_k: int
    block_k: int


@dataclass(frozen=True, slots=True)
class Tile:
    """The outputs that one program computes, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_programs: bool = False
    """Whether each slice has a program of its own."""
    ahead: bool = False
    """Whether a program holds its whole weights before it waits for its rows."""
    group: int = 8
    """Row tiles that take turns on one column tile."""

    def __post_init__(self) -> None:
        assert self.block_m < 64 or self.num_warps < 4, self


def linear_plan(n: int, k: int) -> LinearPlan:
    """Return the order of the sums of a layer [K, N]; the number of rows is no argument."""
    # A layer of few columns is cut so that its programs occupy every processor, any layer so that a program can hold
    # the weights of its slice in registers; a head has columns enough.
    splits = 1 if n > 16384 else max(-(-k // 512), min(-(-k // 256), -(-9216 // n)))
    slice_k = -(-k // (splits * BLOCK_K)) * BLOCK_K
    return LinearPlan(-(-k // slice_k), slice_k, BLOCK_K)


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
    tile = tile or _tile(layer, rows)
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
    tile = tile or _tile(layer, rows)
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
    whatever came before ``embed`` is done by then, and need not be waited for. The order of a sum cannot depend on the
    batch: one program adds up all slices in their order.
    """
    rows = x.shape[-2]
    _, heads, page, size = keys.shape[-4:]
    plan = linear_plan(layer.n, layer.k)
    tile = tile or _tile(layer, rows)
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


def few(layer: Linear, rows: int) -> bool:
    """Return whether so few rows are at work that each slice of a sum gets a program of its own."""
    return rows <= FEW_ROWS[layer.paired]


def _tile(layer: Linear, rows: int) -> Tile:
    """Return which outputs a program computes: a matter of speed alone."""
    if few(layer, rows):
        plan = linear_plan(layer.n, layer.k)
        # what a program holds ahead must fit into its registers, and there should be a program for each processor
        most = 1536 // (plan.slice_k // BLOCK_K * (4 if layer.paired else 2))
        columns = 64 if most >= 64 and layer.n * plan.splits >= 64 * 96 and not layer.paired else 32
        return Tile(16, columns if columns <= most else 16, 4, 3, split_programs=True, ahead=True)
    wide = layer.n >= 2048  # columns enough for every processor
    if rows <= 64:
        if layer.paired:
            return Tile(32, 64, 4, 3, split_programs=True)
        return Tile(32, 32, 4, 4) if wide else Tile(64, 32, 2, 4, split_programs=True)
    if rows > 512:
        return Tile(32, 128, 4, 3) if layer.paired else Tile(64, 64, 2, 3)
    return Tile(32, 64 if layer.paired else 128, 4, 3) if wide else Tile(64, 32, 2, 3, split_programs=True)


def compiled(layer: Linear, plan: LinearPlan, tile: Tile) -> dict[str, Any]:
    """Return the compile-time arguments of a product."""
    weight = layer.weight
    return {
        "SLICE": plan.slice_k,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": plan.block_k,
        "GROUP": tile.group,
        "AHEAD": tile.ahead,
        "PAIRED": layer.paired,
        # what the sums of pairs are to be multiplied with: a power of two, so nothing is rounded
        "UNIT": 1.0 if layer.exponent is None else 2.0 ** (-layer.exponent - EXPONENT),
        # the interpreter multiplies the bit patterns of bfloat16; the products are the same in float32
        "WIDEN": weight.dtype == torch.bfloat16 and not weight.is_cuda,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "shared": FEW_SHARED if tile.block_m <= 16 else MANY_SHARED,
    }


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def place(
    M: tl.tensor, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """Return the rows and columns of this program's tile: row tiles take turns, so that they share columns in L2."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    rows = (first + inside % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = inside // size * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, columns


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _prefetch_weight(
    weight: tl.tensor,  # [N, K]
    columns: tl.tensor,
    start: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
) -> None:
    """Bring ``LENGTH`` of K from ``start`` on, of these columns, into the L2 cache; the last line may be missing."""
    step: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # elements in 128 bytes
    lines: tl.constexpr = triton.next_power_of_2((LENGTH + step - 1) // step)
    at = tl.minimum(start + tl.arange(0, lines) * step, K - 1)
    prefetch(weight + tl.minimum(columns, N - 1)[:, None].to(tl.int64) * K + at[None, :])


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def product(
    x: tl.tensor,  # [M, K], or pairs [2, M, K], or with PARTS summands [PARTS, M, K] float32
    weight: tl.tensor,  # [N, K], or pairs [2, N, K]
    bias: tl.tensor,  # [K], of the summands
    rows: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,  # where the first slice begins
    M: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ONE: tl.constexpr,  # whether there is but one row
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRED: tl.constexpr,
    UNIT: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
) -> tl.tensor:
    """Return ``SLICES`` slices of ``x @ weight.T`` for a tile, added up in order; waits for the rows by itself."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if AHEAD and SLICES == 1:
        # all weights are on their way before the kernel waits for its rows
        EVEN_SLICE: tl.constexpr = K % SLICE == 0
        held = ()
        for block in tl.static_range(SLICE // BLOCK_K):
            k = start + block * BLOCK_K
            held = held + (_load_weight(weight, columns, k, N, K, BLOCK_N, BLOCK_K, EVEN_SLICE, PAIRED),)  # type: ignore[assignment]
        begin(EARLY)
        read = ()
        for block in tl.static_range(SLICE // BLOCK_K):
            k = start + block * BLOCK_K
            if PARTS > 0:
                read = read + (_load_summands(x, bias, rows, k, M, K, PARTS, ONE, BLOCK_K, PAIRED, weight),)  # type: ignore[assignment]
            else:
                read = read + (_load_rows(x, rows, k, M, K, BLOCK_K, EVEN_SLICE, PAIRED),)  # type: ignore[assignment]
        for block in tl.static_range(SLICE // BLOCK_K):
            total = block_product(read[block], held[block], total, PAIRED, WIDEN)
        total = _settled(total, rows, M)
    else:
        if EARLY and BLOCK_M <= 32:
            _prefetch_weight(weight, columns, start, N, K, SLICES * SLICE)
            if PAIRED:
                _prefetch_weight(weight + N * K, columns, start, N, K, SLICES * SLICE)
        begin(EARLY)
        EVEN: tl.constexpr = K % BLOCK_K == 0
        part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for block in range(tl.cdiv(tl.minimum(K - start, SLICES * SLICE), BLOCK_K)):
            k = start + block * BLOCK_K
            if SLICES > 1:
                if block % (SLICE // BLOCK_K) == 0:
                    total += _settled(part, rows, M)
                    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            b = _load_weight(weight, columns, k, N, K, BLOCK_N, BLOCK_K, EVEN, PAIRED)
            a = _load_rows(x, rows, k, M, K, BLOCK_K, EVEN, PAIRED)
            part = block_product(a, b, part, PAIRED, WIDEN)
        total += _settled(part, rows, M)
    return total * UNIT if PAIRED else total


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _settled(x: tl.tensor, rows: tl.tensor, M: tl.tensor) -> tl.tensor:
    """Return the end of a chain as it is: the compiler would begin the chain with whatever is added to its end."""
    return tl.where((rows < M)[:, None], x, 0.0)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _load_weight(
    weight: tl.tensor,
    columns: tl.tensor,
    k: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # whether no block reaches behind K
    PAIRED: tl.constexpr,
) -> tl.tensor:
    """Return a block of the weight, [BLOCK_K, BLOCK_N], and the lower half of its pair."""
    depth = tl.arange(0, BLOCK_K)
    pointers = weight + columns.to(tl.int64)[None, :] * K + (k + depth)[:, None]
    mask = None
    if not EVEN:
        mask = (columns < N)[None, :] & (depth < K - k)[:, None]
    elif N % BLOCK_N != 0:
        mask = (columns < N)[None, :] & (depth >= 0)[:, None]
    return load_pair(pointers, mask, N * K, PAIRED)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _load_rows(
    x: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    M: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    """Return a block of rows, [BLOCK_M, BLOCK_K], and the lower half of its pair."""
    depth = tl.arange(0, BLOCK_K)
    pointers = x + rows.to(tl.int64)[:, None] * K + (k + depth)[None, :]
    if EVEN:
        mask = (rows < M)[:, None] & (depth >= 0)[None, :]
    else:
        mask = (rows < M)[:, None] & (depth < K - k)[None, :]
    return load_pair(pointers, mask, M.to(tl.int64) * K, PAIRED)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _load_summands(
    x: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    M: tl.tensor,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRED: tl.constexpr,
    like: tl.tensor,
) -> tl.tensor:
    """Return a block of rows made of summands: added up, biased, through gelu_new, and rounded as ``_gelu`` does."""
    depth = k + tl.arange(0, BLOCK_K)
    if ONE:  # the same, without the fifteen rows that are not there
        content = tl.load(x + depth, mask=depth < K, other=0.0)
        for part in tl.static_range(1, PARTS):
            content += tl.load(x + part * K + depth, mask=depth < K, other=0.0)
        content += tl.load(bias + depth, mask=depth < K, other=0.0).to(tl.float32)
        return lone_row(_gelu_new(content), rows, depth < K, like.dtype.element_ty, PAIRED)
    pointers = x + rows.to(tl.int64)[:, None] * K + depth[None, :]
    mask = (rows < M)[:, None] & (depth < K)[None, :]
    content = tl.load(pointers, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        content += tl.load(pointers + part * M.to(tl.int64) * K, mask=mask, other=0.0)
    content += tl.load(bias + depth, mask=depth < K, other=0.0).to(tl.float32)[None, :]
    return pair(tl.where(mask, _gelu_new(content), 0.0), like.dtype.element_ty, PAIRED)


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
        invite(EARLY)
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
        invite(EARLY)
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
    invite(EARLY)
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
    store_operand(to, _gelu_new(total), mask, M.to(tl.int64) * N, PAIRED)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _gelu_new(x: tl.tensor) -> tl.tensor:
    # 0.5 * (1 + tanh(z)) is the logistic function of 2z; written with exp(-|2z|) it neither overflows nor cancels.
    z = 1.5957691216057308 * (x + 0.044715 * (x * x * x))  # 2 * sqrt(2 / pi)
    small = tl.exp(-tl.abs(z))
    return x * tl.where(z >= 0, 1.0, small) / (1.0 + small)


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
        invite(EARLY)
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
        invite(EARLY)
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
