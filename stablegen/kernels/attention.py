"""Causal attention over the KV cache as one Triton program a token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class AttentionConfiguration:
    """The block of keys that one step takes, the padded head size, and the warps that share them."""

    block_keys: int
    block_d: int
    num_warps: int


def attention_configuration(d: int) -> AttentionConfiguration:
    """Return the blocks for heads of size D; a block of keys begins at a multiple of its size in every run."""
    return AttentionConfiguration(block_keys=64, block_d=triton.next_power_of_2(d), num_warps=4)


def attention(
    query: torch.Tensor,  # [T, H, D]
    keys: torch.Tensor,  # [S, H, C, D]
    values: torch.Tensor,  # [S, H, C, D]
    *,
    slots: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
    scale: float,
) -> torch.Tensor:
    """Return causal attention [T, H, D] in the query's dtype; what lies behind a token's position is never read.

    The order of a sum cannot depend on the batch: one program adds a token's keys in absolute blocks from position 0
    to its own, and neither the number of tokens, slots or cached positions is known when it is compiled.
    """
    tokens, heads, d = query.shape
    assert keys.shape == values.shape == (keys.shape[0], heads, keys.shape[2], d), (
        query.shape,
        keys.shape,
        values.shape,
    )
    assert keys.stride() == values.stride(), (keys.stride(), values.stride())
    # Strides travel in heads (units of D): the compiler then knows how they are aligned, whatever C is.
    assert keys.stride(3) == 1, keys.stride()
    assert all(stride % d == 0 for stride in keys.stride()[:3]), keys.stride()
    # A view of the cache that began at an odd address would be another binary, with threads placed in another way.
    assert keys.data_ptr() % 16 == 0, "a KV cache begins at an aligned address"
    assert values.data_ptr() % 16 == 0, "a KV cache begins at an aligned address"
    assert keys.dtype == values.dtype == query.dtype, (query.dtype, keys.dtype, values.dtype)
    assert slots.shape == positions.shape == (tokens,), (slots.shape, positions.shape)
    assert slots.dtype == positions.dtype == torch.int64, (slots.dtype, positions.dtype)
    assert query.device == keys.device == values.device == slots.device == positions.device, query.device
    slots, positions = slots.contiguous(), positions.contiguous()
    if query.stride(2) != 1 or query.stride(1) != d or query.stride(0) % d:
        query = query.contiguous()
    out = torch.empty((tokens, heads, d), dtype=query.dtype, device=query.device)
    if tokens == 0:
        return out
    configuration = attention_configuration(d)
    with torch.cuda.device(query.get_device()):  # -1 on a CPU: changes nothing
        _attention[(tokens, heads)](
            query,
            keys,
            values,
            slots,
            positions,
            out,
            scale,
            query.stride(0) // d,
            keys.stride(0) // d,
            keys.stride(1) // d,
            keys.stride(2) // d,
            D=d,
            BLOCK_D=configuration.block_d,
            BLOCK_KEYS=configuration.block_keys,
            num_warps=configuration.num_warps,
        )
    return out


# Where the batch's tensors begin, and the cache's strides, which grow with its capacity and slots, differ from run
# to run: one binary must serve them all.
@triton.jit(  # type: ignore[untyped-decorator]  # triton has no stubs
    do_not_specialize=["query", "slots", "positions", "query_token", "cache_slot", "cache_head", "cache_position"]
)
def _attention(  # launched by position
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    query_token: tl.tensor,
    cache_slot: tl.tensor,
    cache_head: tl.tensor,
    cache_position: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + token).to(tl.int32)
    first = (tl.load(slots + token) * cache_slot + head * cache_head) * D
    feature = tl.arange(0, BLOCK_D)
    q = tl.load(query + (token * query_token + head) * D + feature, mask=feature < D, other=0.0).to(tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, position + 1, BLOCK_KEYS):
        place = start + tl.arange(0, BLOCK_KEYS)
        seen = place <= position
        inside = seen[:, None] & (feature < D)[None, :]
        offset = first + place.to(tl.int64)[:, None] * cache_position * D + feature[None, :]
        # zeros in place of what is not seen: a weight of zero does not silence a NaN
        k = tl.load(keys + offset, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + offset, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * q[None, :], axis=1) * scale, float("-inf"))
        best_now = tl.maximum(best, tl.max(score, axis=0))  # position 0 is always seen, so this is no -inf
        fade = tl.exp(best - best_now)
        share = tl.exp(score - best_now)
        total = total * fade + tl.sum(share, axis=0)
        result = result * fade + tl.sum(share[:, None] * v, axis=0)
        best = best_now
    place_out = (token * tl.num_programs(1) + head) * D + feature
    tl.store(out + place_out, (result / total).to(out.dtype.element_ty), mask=feature < D)
