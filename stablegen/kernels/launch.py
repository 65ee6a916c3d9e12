"""What all launches share: the device, and Hopper's overlap of one kernel's beginning with another's end."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlaps(device: torch.device) -> bool:
    """Return whether kernels on the device may begin before their predecessor ends (compute capability >= 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def options(device: torch.device) -> dict[str, Any]:
    """Return the keywords of every launch on the device.

    Products and sums are never fused into one rounding behind the source's back: whether the compiler would do so may
    differ between two compilations of one expression.
    """
    early = overlaps(device)
    more = {"launch_pdl": True} if early else {}
    return {"EARLY": early, "enable_fp_fusion": False, **more}


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def begin(EARLY: tl.constexpr) -> None:
    """Wait until everything before this kernel is done; what comes before it in a kernel may only hint."""
    if EARLY:
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def invite(EARLY: tl.constexpr) -> None:
    """Let the next kernel be set up: it waits in ``begin`` until this one is done."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]  # triton has no stubs
def prefetch(pointers: tl.tensor) -> None:
    """Ask for the 128-byte lines behind the pointers to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
