"""How an affine layer's sums are ordered, and which outputs a program computes.

The order of a sum, ``LinearPlan``, is fixed by N and K; a ``Tile`` is a matter of speed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stablegen.kernels.base import Linear
from stablegen.kernels.launch import FEW_SHARED, MANY_SHARED
from stablegen.kernels.operand import EXPONENT

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


def few(layer: Linear, rows: int) -> bool:
    """Return whether so few rows are at work that each slice of a sum gets a program of its own."""
    return rows <= FEW_ROWS[layer.paired]


def linear_tile(layer: Linear, rows: int) -> Tile:
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
