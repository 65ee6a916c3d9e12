"""Layer norm as one Triton program a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class LayerNormConfiguration:
    """The block that holds a whole row, and the warps that share it."""

    block_e: int
    num_warps: int


def layer_norm_configuration(e: int) -> LayerNormConfiguration:
    """Return the block for rows of E features."""
    block_e = triton.next_power_of_2(e)
    return LayerNormConfiguration(block_e=block_e, num_warps=min(8, max(1, block_e // 256)))


def layer_norm(
    x: torch.Tensor,  # [M, E] float32
    weight: torch.Tensor,  # [E]
    bias: torch.Tensor,  # [E]
    *,
    eps: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return the rows' layer norm [M, E]; mean and biased variance in float32, two passes.

    The order of a sum cannot depend on the batch: a row is reduced by one program whose block and warps, like the
    binary that runs, are fixed by E.
    """
    rows, e = x.shape
    assert x.dtype == torch.float32, x.dtype
    assert weight.shape == bias.shape == (e,), (x.shape, weight.shape, bias.shape)
    assert weight.device == bias.device == x.device, (x.device, weight.device, bias.device)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    out = torch.empty((rows, e), dtype=out_dtype, device=x.device)
    if rows == 0:
        return out
    configuration = layer_norm_configuration(e)
    with torch.cuda.device(x.get_device()):  # -1 on a CPU: changes nothing
        _layer_norm[(rows,)](
            x,
            weight,
            bias,
            out,
            e,
            eps,
            BLOCK_E=configuration.block_e,
            num_warps=configuration.num_warps,
        )
    return out


# The address of the rows comes with the batch, and how threads share a row, so the order of its sums, follows from
# what the compiler knows of the address.
@triton.jit(do_not_specialize=["x"])  # type: ignore[untyped-decorator]  # triton has no stubs
def _layer_norm(  # launched by position
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    E: tl.tensor,
    eps: tl.tensor,
    BLOCK_E: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * E
    column = tl.arange(0, BLOCK_E)
    inside = column < E
    features = tl.load(x + row + column, mask=inside, other=0.0)
    mean = tl.sum(features, axis=0) / E
    centred = tl.where(inside, features - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / E
    # rounded correctly: the approximate square root and quotient differ between architectures
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (centred * scale * gain + shift).to(out.dtype.element_ty), mask=inside)
