"""Affine layers as one Triton kernel whose tiles are fixed by dtype, N and K."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stablegen.kernels.base import Activation


@dataclass(frozen=True, slots=True)
class LinearConfiguration:
    """The tile of one program (rows, columns, depth of one step of the sum) and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def linear_configuration(dtype: torch.dtype, n: int, k: int) -> LinearConfiguration:
    """Return the tile of a layer [K, N]; M is no argument, so no batch can change it.

    ``block_m`` is 16 for every layer: one row and a thousand run the same MMA instructions.
    """
    block_k = 32 if dtype == torch.float32 else 64
    return LinearConfiguration(
        block_m=16,
        block_n=32 if n <= 1024 else 64,  # narrow layers have few columns to spread over the processors
        block_k=min(block_k, max(16, triton.next_power_of_2(k))),
        num_warps=4,
        num_stages=3,
    )


def linear(
    x: torch.Tensor,  # [M, K] fp32, fp16 or bf16
    weight: torch.Tensor,  # [K, N] of any strides, x's dtype
    bias: torch.Tensor | None,  # [N], x's dtype
    *,
    activation: Activation = "none",
    residual: torch.Tensor | None = None,  # [M, N] float32
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``activation(x @ weight + bias) + residual`` [M, N], accumulated in float32, rounded once.

    The order of a sum cannot depend on the batch: each output is summed by one program over all of K in steps whose
    size, like the binary that runs, is fixed by dtype, N, K and the weight's strides.
    """
    rows, k = x.shape
    n = weight.shape[1]
    assert weight.shape[0] == k, (x.shape, weight.shape)
    assert weight.dtype == x.dtype, (x.dtype, weight.dtype)
    assert weight.device == x.device, (x.device, weight.device)
    assert bias is None or (bias.shape == (n,) and bias.is_contiguous() and bias.device == x.device), bias
    assert residual is None or (residual.shape == (rows, n) and residual.dtype == torch.float32), residual
    # Where the rows begin in memory is the batch's doing, and Triton compiles another binary for an unaligned
    # pointer. Copies move no bit, so they take the choice away.
    x = _aligned(x.contiguous())
    residual = None if residual is None else residual.contiguous()
    out = torch.empty((rows, n), dtype=out_dtype, device=x.device)
    if rows == 0:
        return out
    tile = linear_configuration(x.dtype, n, k)
    # Neighbouring programs share columns, so that a block of the weight is read from memory once.
    grid = (triton.cdiv(rows, tile.block_m), triton.cdiv(n, tile.block_n))
    with torch.cuda.device(x.get_device()):  # -1 on a CPU: changes nothing
        _linear[grid](
            x,
            weight,
            bias,
            residual,
            out,
            rows,
            n,
            k,
            weight.stride(0),
            weight.stride(1),
            GELU=activation == "gelu_new",
            WIDEN=x.dtype == torch.bfloat16 and not x.is_cuda,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


# M and the residual's address come with the batch: specialised on, M = 1 or 16 would run another binary than M = 2.
@triton.jit(do_not_specialize=["M", "residual"])  # type: ignore[untyped-decorator]  # triton has no stubs
def _linear(  # launched by position
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    GELU: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # 64 bits: M * N and V * K pass 2**31
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_ok = rows[:, None] < M
    column_ok = columns[None, :] < N
    x_block = x + rows[:, None] * K + depth[None, :]
    weight_block = weight + depth[:, None].to(tl.int64) * stride_k + columns[None, :] * stride_n
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        depth_ok = depth < K - start
        a = tl.load(x_block, mask=row_ok & depth_ok[None, :], other=0.0)
        b = tl.load(weight_block, mask=depth_ok[:, None] & column_ok, other=0.0)
        if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16; the products are the same in float32
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_block += BLOCK_K
        weight_block += BLOCK_K * stride_k
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = _gelu_new(total)
    place = rows[:, None] * N + columns[None, :]
    inside = row_ok & column_ok
    if residual is not None:
        total += tl.load(residual + place, mask=inside, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def _gelu_new(x: tl.tensor) -> tl.tensor:
    # 0.5 * (1 + tanh(z)) is the logistic function of 2z; written with exp(-|2z|) it neither overflows nor cancels.
    z = 1.5957691216057308 * (x + 0.044715 * (x * x * x))  # 2 * sqrt(2 / pi)
    small = tl.exp(-tl.abs(z))
    return x * tl.where(z >= 0, 1.0, small) / (1.0 + small)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()
