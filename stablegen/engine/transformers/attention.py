"""One attention kernel for all that policies which promise equal bits compute on a GPU.

Left alone, torch chooses a kernel by shape, mask and GPU, and on Hopper it prefers one of cuDNN's, whose 16-bit results
under a mask were seen to change from run to run. The memory-efficient kernel repeats itself. It is chosen call by call
in the thread that computes; torch's own switches would change the kernel in every thread of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as _attention_of_torch
from torch.overrides import TorchFunctionMode


class OneKernel(TorchFunctionMode):
    """A context in which the thread's attention goes through the memory-efficient kernel wherever that can run it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or the kernel in place of torch's choice."""
        kwargs = kwargs or {}
        if func is _attention_of_torch and args[0].is_cuda and args[0].shape[-1] % 8 == 0:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    query: torch.Tensor,  # [S, H, M, D]
    key: torch.Tensor,  # [S, H or a divisor of it, N, D]
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,  # broadcast to [S, H, M, N], bool or added to the scores
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return what ``scaled_dot_product_attention`` does, without dropout: the model computes no gradients."""
    rows, heads, length, _ = query.shape
    if enable_gqa:
        key, value = (kept.repeat_interleave(heads // kept.shape[1], 1) for kept in (key, value))
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        keys = bias.shape[-1]
        if keys % 8:  # its rows must begin at multiples of 16 bytes
            bias = pad(bias, (0, -keys % 8))[..., :keys]
        bias = bias.expand(rows, heads, length, keys)
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, False, is_causal=is_causal, scale=scale
    )[0]
    return result
