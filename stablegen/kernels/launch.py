"""What all launches share: the device, and Hopper's overlap of one kernel's beginning with another's end."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FEW_SHARED, MANY_SHARED = 50, 75
"""Percent of a multiprocessor's fast memory that its programs share, the rest being L1 cache: where rows are few, and
for products of many. A multiprocessor must run empty before it can divide its memory anew, so only kernels that ask for
the same overlap; the driver would ask for what each of them needs. They suit an H100; no bit depends on them."""
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_configured: set[int] = set()


@cache
def overlaps(device: torch.device) -> bool:
    """Return whether kernels on the device may begin before their predecessor ends (compute capability >= 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,
    shared: int = FEW_SHARED,
    **named: Any,
) -> None:
    """Launch a kernel on a device's current stream; ``shared`` in percent of a multiprocessor's fast memory.

    Products and sums are never fused into one rounding unless the source says so: whether the compiler would fuse them
    may differ between two compilations of one expression.
    """
    early = overlaps(device)
    pdl = {"launch_pdl": True} if early else {}
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1 changes nothing
        made = kernel[grid](*arguments, EARLY=early, enable_fp_fusion=False, **pdl, **named)
    if device.type == "cuda" and made.function not in _configured:
        _configured.add(made.function)
        # a preference, which moves no bit
        _driver().cuFuncSetAttribute(ctypes.c_void_p(made.function), _CARVEOUT, shared)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def wait_for_previous(EARLY: tl.constexpr) -> None:
    """Wait until all kernels before this one are done; what a kernel does before it may only be hints."""
    if EARLY:
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def launch_next(EARLY: tl.constexpr) -> None:
    """Let the next kernel be set up: it waits in ``wait_for_previous`` until this one is done."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def prefetch(pointers: tl.tensor) -> None:
    """Ask for the 128-byte lines that the pointers point to, to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
