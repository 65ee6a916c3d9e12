"""What the tests of the kernels share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def interpreted_bfloat16() -> None:
    """Teach older interpreters of triton a constant in bfloat16, which compiled kernels have in every version."""
    pytest.importorskip("triton", reason="triton is not installed")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    def get_bf16(builder: Any, value: float) -> Any:
        return builder.create_fp_trunc(builder.get_fp32(value), tl.bfloat16)

    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = get_bf16
