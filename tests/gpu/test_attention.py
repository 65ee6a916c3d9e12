"""The one attention kernel of ``single`` and ``padded:N``, on a GPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stablegen.engine.transformers import attention
from stablegen.engine.transformers.attention import OneKernel

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operands(
    dtype: torch.dtype, queries: int, keys: int, heads: int = 12
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((4, 12, queries, 64), (4, heads, keys, 64), (4, heads, keys, 64))
    q, k, v = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    return q, k, v


def expected_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> torch.Tensor:
    """Return what torch computes when this kernel alone is allowed."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(q, k, v, **named)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_torchs_own_kernel(dtype: torch.dtype) -> None:
    for queries, keys in ((1, 100), (1, 256), (77, 77), (1, 1), (1, 1021)):
        q, k, v = operands(dtype, queries, keys)
        seen = torch.rand(4, 1, queries, keys, generator=torch.Generator().manual_seed(1)).cuda() > 0.3
        seen[..., 0] = True
        added = torch.zeros(seen.shape, dtype=dtype, device="cuda").masked_fill(~seen, -1e4)
        for named in ({}, {"attn_mask": seen}, {"attn_mask": added}, {"scale": 0.2}, {"is_causal": queries > 1}):
            with torch.inference_mode(), OneKernel():
                found = scaled_dot_product_attention(q, k, v, **named)
            assert torch.equal(found, expected_of(q, k, v, **named)), (queries, keys, list(named))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_share_keys_are_told_apart(dtype: torch.dtype) -> None:
    q, k, v = operands(dtype, 5, 40, heads=4)
    with torch.inference_mode(), OneKernel():
        found = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.equal(found, expected_of(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))


def test_another_thread_keeps_torchs_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    operand = operands(torch.bfloat16, 1, 1024)
    attended: list[str] = []
    inner = attention._attend

    def attend(*args: Any, **named: Any) -> torch.Tensor:
        attended.append(threading.current_thread().name)
        return inner(*args, **named)

    monkeypatch.setattr(attention, "_attend", attend)
    with OneKernel():
        scaled_dot_product_attention(*operand)
        thread = threading.Thread(target=scaled_dot_product_attention, args=operand)
        thread.start()
        thread.join()
    assert attended == [threading.current_thread().name]
