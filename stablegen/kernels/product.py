"""One tile of a matrix product in Triton: what it loads, and the chain of steps that sums it (see ``linear``)."""

from __future__ import annotations

import triton
import triton.language as tl

from stablegen.kernels.launch import prefetch, wait_for_previous
from stablegen.kernels.operand import block_product, load_pair, lone_row, pair


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
        wait_for_previous(EARLY)
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
        wait_for_previous(EARLY)
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
    """Return the end of a chain unchanged: else the compiler would start the chain with what is added to its end."""
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
    EVEN: tl.constexpr,  # whether no block reaches beyond K
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
        return lone_row(gelu_new(content), rows, depth < K, like.dtype.element_ty, PAIRED)
    pointers = x + rows.to(tl.int64)[:, None] * K + depth[None, :]
    mask = (rows < M)[:, None] & (depth < K)[None, :]
    content = tl.load(pointers, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        content += tl.load(pointers + part * M.to(tl.int64) * K, mask=mask, other=0.0)
    content += tl.load(bias + depth, mask=depth < K, other=0.0).to(tl.float32)[None, :]
    return pair(tl.where(mask, gelu_new(content), 0.0), like.dtype.element_ty, PAIRED)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def gelu_new(x: tl.tensor) -> tl.tensor:
    """Return GELU in its tanh form, as ``NewGELUActivation`` of transformers computes it."""
    # 0.5 * (1 + tanh(z)) is the logistic function of 2z; written with exp(-|2z|) it neither overflows nor cancels.
    z = 1.5957691216057308 * (x + 0.044715 * (x * x * x))  # 2 * sqrt(2 / pi)
    small = tl.exp(-tl.abs(z))
    return x * tl.where(z >= 0, 1.0, small) / (1.0 + small)
