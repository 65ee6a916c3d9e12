"""Weights before an engine computes with them: whether they are finite, and how they are aligned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from stablegen.errors import CheckpointError

ALIGNMENT = 64
"""Bytes. Torch's own allocations begin at multiples of it, a mapped file need not; a GEMM may sum otherwise then."""


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ``CheckpointError`` where a weight is NaN or infinite in the dtype it is to be used in."""
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(
            f"the weights hold NaN or infinity: {', '.join(bad[:4])}",
            hint="Save or download the model again, or use a dtype that can hold its weights",
        )


def align(model: Any) -> None:
    """Move a model's weights to memory that torch aligns, one after the other; tied ones stay tied."""
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def alignment_of(model: Any) -> str | None:
    """Return a digest of how a CPU model's weights are misaligned to 64 bytes; None where none is."""
    if model.device.type != "cpu":
        return None
    places = {name: p.data_ptr() % ALIGNMENT for name, p in model.named_parameters() if p.data_ptr() % ALIGNMENT}
    return hashlib.sha256(repr(sorted(places.items())).encode()).hexdigest()[:16] if places else None
