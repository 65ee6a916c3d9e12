"""Measure memory: how much an arm needs, how fast the device copies it, and how much of it a decode step reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stablegen.lab.device import free_memory, synchronise
from stablegen.lab.reports.bench import Bandwidth, Spread

COPIES = 10
"""Copies of each measurement on a GPU."""
GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 28
"""Bytes of each copy, by device, where that much is free."""
Clock = Callable[[], float]


class Gauge:
    """Tracks the GPU memory that one arm holds, and the most that it needs, beside the others; nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._held = 0
        self.peak: int | None = None

    @contextmanager
    def phase(self, *, counts: bool = True) -> Iterator[None]:
        """Measure the memory that the arm alone takes inside; the peak only if it ``counts``."""
        if not self.device.startswith("cuda"):
            yield
            return
        others = torch.cuda.memory_allocated(self.device) - self._held
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if counts:
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(self.device) - others)
        self._held = torch.cuda.memory_allocated(self.device) - others


def measure_bandwidth(device: str, clock: Clock = time.perf_counter, *, size: int | None = None) -> Bandwidth:
    """Return how fast the device copies its own memory; ``size`` in bytes, one that suits the device if None."""
    cuda = device.startswith("cuda")
    if size is None:
        size = min(GPU_BYTES, torch.cuda.mem_get_info(device)[0] // 4) if cuda else CPU_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = COPIES if cuda else 1
    times = []
    for repeat in range(6):
        target.copy_(source)
        synchronise(device)
        before = clock()
        for _ in range(copies):
            target.copy_(source)
        synchronise(device)
        if repeat:  # the first one warms up
            times.append((clock() - before) / copies)
    del source, target
    free_memory(device)
    seconds = Spread.of(times)
    return Bandwidth(bytes_copied=size, seconds=seconds, bytes_per_second=2 * size / seconds.median)


def step_bytes(model: Any) -> int:
    """Return the bytes of weights that a decode step reads in full: all but the tables it looks rows up in."""
    head = model.get_output_embeddings()
    looked_up = {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.data_ptr() not in looked_up)


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
