"""What matrix products take: numbers of 16 bits, or float32 as pairs of float16.

A pair is ``x = 2**-e * (high + low * 2**-11)``, 22 bits and a sign, so that three products of halves on tensor cores,
high * high + (high * low + low * high) * 2**-11, are as good as float32's own (Ootomo and Yokota, "Recovering single
precision accuracy from Tensor Cores", 2022). Weights are paired when they are loaded, [2, N, K], in the bytes that
float32 takes; activations where they are made, [2, M, K].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

EXPONENT = -4
"""Activations are paired as ``x * 2**EXPONENT``: up to a million in size, to the last bit of a float32 near one."""


def operand(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory for activations [M, K]: those of float32 are pairs, [2, M, K] float16."""
    if dtype == torch.float32:
        return torch.empty((2, *shape), dtype=torch.float16, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


def as_pairs(x: torch.Tensor) -> torch.Tensor:
    """Return float32 activations [M, K] as pairs, [2, M, K] float16, as the kernels themselves write them."""
    scaled = x * 2.0**EXPONENT
    high = scaled.half()
    return torch.stack([high, ((scaled - high.float()) * 2.0**11).half()])


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def load_pair(pointers: tl.tensor, mask: tl.tensor, size: tl.tensor, PAIRED: tl.constexpr) -> tl.tensor:
    """Return what the pointers point to and, of pairs, the lower halves ``size`` elements further on; else it twice."""
    if mask is None:
        high = tl.load(pointers)
        low = tl.load(pointers + size) if PAIRED else high
    else:
        high = tl.load(pointers, mask=mask, other=0.0)
        low = tl.load(pointers + size, mask=mask, other=0.0) if PAIRED else high
    return high, low


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def pair(x: tl.tensor, dtype: tl.constexpr, PAIRED: tl.constexpr) -> tl.tensor:
    """Return float32 activations as operands: rounded to ``dtype``, or as the halves of a pair of float16."""
    if PAIRED:
        x = x * 0.0625  # 2**EXPONENT
        high = x.to(tl.float16)
        return high, ((x - high.to(tl.float32)) * 2048.0).to(tl.float16)
    high = x.to(dtype)
    return high, high


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def lone_row(x: tl.tensor, rows: tl.tensor, there: tl.tensor, dtype: tl.constexpr, PAIRED: tl.constexpr) -> tl.tensor:
    """Return one float32 row as the operand of a tile; its other rows, and what is not ``there``, are zero."""
    high, low = pair(x, dtype, PAIRED)
    here = (rows == 0)[:, None] & there[None, :]
    high = tl.where(here, high[None, :], 0.0).to(dtype)
    return high, tl.where(here, low[None, :], 0.0).to(dtype) if PAIRED else high


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def store_operand(to: tl.tensor, x: tl.tensor, mask: tl.tensor, size: tl.tensor, PAIRED: tl.constexpr) -> None:
    """Store float32 activations as operands; the lower halves of pairs go ``size`` elements further on."""
    high, low = pair(x, to.dtype.element_ty, PAIRED)
    tl.store(to, high, mask=mask)
    if PAIRED:
        tl.store(to + size, low, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def block_product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PAIRED: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """Return ``total + a @ b`` in float32; both are (high, low).

    In 16 bits ``total`` is where the chain of ``mma.sync`` steps begins; a block of pairs is a chain of its own. Each
    chain says what it begins with, for the compiler would make any sum with one that begins at zero its beginning.
    """
    a_high, a_low = a
    b_high, b_low = b
    if PAIRED:
        small = tl.dot(a_low, b_high, tl.dot(a_high, b_low)) * 0.00048828125  # 2**-11
        return total + tl.dot(a_high, b_high, small)
    if WIDEN:
        a_high = a_high.to(tl.float32)
        b_high = b_high.to(tl.float32)
    return tl.dot(a_high, b_high, total)
