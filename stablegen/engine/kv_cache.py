"""The keys and values of a batch, one slot a request."""

from __future__ import annotations

import torch

BLOCK = 64
"""Slots hold a multiple of this many positions, so that equal requests allocate equal shapes."""


class KVCache:
    """Keys and values [layers, slots, heads, capacity, head size], zeroed; positions are absolute."""

    def __init__(
        self,
        layers: int,
        slots: int,
        heads: int,
        capacity: int,
        size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, slots, heads, -(-capacity // BLOCK) * BLOCK, size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def write(
        self,
        layer: int,
        slots: torch.Tensor,  # [T]
        positions: torch.Tensor,  # [T]
        keys: torch.Tensor,  # [T, H, D]
        values: torch.Tensor,  # [T, H, D]
    ) -> None:
        """Store the keys and values of T tokens where their slot and position say."""
        self.keys[layer, slots, :, positions] = keys
        self.values[layer, slots, :, positions] = values
