"""The operations in torch, invariant on a CPU by construction: no library call ever sees the batch.

A matrix product is one vector times the matrix, a row at a time: with more rows in one call, vendor libraries give a
row other bits at another place (MKL with 16 threads does so even inside a tile of fixed shape). Attention runs in
tiles of fixed shape in which absolute positions alone decide a row's place. Sums are trees fixed by their length.
"""

from __future__ import annotations

import torch

from stablegen.kernels.base import PAGE, Cache, Linear, Norm, Placed, Rows, RowSummary, Spans
from stablegen.kernels.log import pack

QUERY_BLOCK = 16
KEY_BLOCK = 64

_GOLDEN = 0x9E3779B97F4A7C15
_GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi), as in Hugging Face's NewGELUActivation


class ReferenceKernels:
    """The kernel set for a CPU; also the reference that the Triton kernels are tested against."""

    name = "reference"
    version = 1
    tile = 1024
    paired = False

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Keep float32 copies: products of 16-bit numbers are exact in float32, sums are kept there.

        Always copies, into memory that torch aligns: a mapped file may be aligned otherwise, and alignment can change
        the order in which a matrix is summed.
        """
        own = weight.to(torch.float32, copy=True)
        return Linear(own, None if bias is None else bias.to(torch.float32, copy=True), *weight.shape)

    def graph_key(self, spans: Spans) -> Spans:
        """Return that passes of one size can replay each other."""
        return ()

    def embed(
        self, rows: Rows, cache: Cache, tokens: Linear, positions: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, Placed]:
        """Return the residual stream [T, E] float32, its layer norm, and where the tokens are."""
        slots = rows.slots.long()
        ids = torch.where(rows.tokens < 0, cache.newest[slots], rows.tokens)
        at = torch.where(rows.positions < 0, cache.lengths[slots], rows.positions)
        places = cache.table[slots, at.long() // PAGE] * PAGE + at % PAGE
        x = tokens.weight.t()[ids.long()] + positions[at.long()].float()
        return x, layer_norm(x, norm, positions.dtype), Placed(rows.slots, at, places)

    def qkv(self, x: torch.Tensor, layer: Linear, cache: Cache, index: int, rows: Rows, placed: Placed) -> torch.Tensor:
        """Return queries [T, E]; keys and values go into layer ``index`` of the cache."""
        _, heads, page, size = cache.keys[index].shape
        result = self.linear(x, layer).to(x.dtype).view(len(x), 3, heads, size)
        pages, offsets = placed.places.long() // page, placed.places.long() % page
        cache.keys[index][pages, :, offsets] = result[:, 1]
        cache.values[index][pages, :, offsets] = result[:, 2]
        return result[:, 0].reshape(len(x), heads * size)

    def attention(
        self,
        query: torch.Tensor,
        layer: Linear,
        cache: Cache,
        index: int,
        rows: Rows,
        placed: Placed,
        scale: float,
    ) -> torch.Tensor:
        """Return causal attention [T, E]; a query sits in its tile where its absolute position puts it.

        Queries of one slot share a tile of ``QUERY_BLOCK`` absolute positions, keys come in absolute blocks of
        ``KEY_BLOCK``: shape and place of every product are functions of the position alone.
        """
        _, heads, _, size = cache.keys[index].shape
        query = query.view(len(query), heads, size)
        out = torch.empty_like(query)
        positions = placed.positions.long()
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (slot, position) in enumerate(zip(rows.slots.tolist(), positions.tolist(), strict=True)):
            groups.setdefault((slot, position // QUERY_BLOCK), []).append(row)
        for (slot, block), members in groups.items():
            chosen = torch.tensor(members)
            places = positions[chosen] - block * QUERY_BLOCK
            tile = torch.zeros(heads, QUERY_BLOCK, size, dtype=torch.float32)
            tile[:, places] = query[chosen].float().transpose(0, 1)
            pages = cache.table[slot, : (block * QUERY_BLOCK + QUERY_BLOCK - 1) // PAGE + 1].long()
            keys, values = (
                kept[index][pages].transpose(0, 1).flatten(1, 2) for kept in (cache.keys, cache.values)
            )  # [H, C, D]
            # behind a position the cache may hold anything, and zero times NaN is not zero
            known = torch.arange(keys.shape[1])[:, None] <= int(positions[chosen].max())
            keys, values = keys.where(known, 0.0), values.where(known, 0.0)
            result = _attend(tile, block * QUERY_BLOCK, keys, values, scale)
            out[chosen] = result[:, places].transpose(0, 1).to(out.dtype)
        return out.flatten(1)

    def partial(self, x: torch.Tensor, layer: Linear, before: Linear | None = None) -> torch.Tensor:
        """Return ``x @ weight`` [1, T, N] float32."""
        return self.linear(x, Linear(layer.weight, None, layer.k, layer.n))[None]

    def add_norm(
        self, x: torch.Tensor, partial: torch.Tensor, layer: Linear, norm: Norm, select: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x + (partial + bias)`` and its layer norm."""
        assert layer.bias is not None
        result = x + (partial[0] + layer.bias)
        if select is not None:
            result = result[select.long()]
        return result, layer_norm(result, norm, norm.weight.dtype)

    def gelu(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        """Return ``gelu_new(x @ weight + bias)`` [T, N]."""
        return self.linear(x, layer, gelu=True).to(x.dtype)

    def choose(
        self, x: torch.Tensor, layer: Linear, rows: Rows, placed: Placed, cache: Cache, into: torch.Tensor | None
    ) -> None:
        """Score the vocabulary, log what a step keeps, and advance the slots."""
        scores = self.linear(x, layer)
        if into is not None:
            into.copy_(scores)
        advance(summarise_rows(scores), rows, placed, cache)

    def linear(self, x: torch.Tensor, layer: Linear, *, gelu: bool = False) -> torch.Tensor:
        """Return ``x @ weight + bias`` [M, N] float32; every product is [K] x [K, N], aligned the same."""
        result = torch.empty(x.shape[0], layer.n, dtype=torch.float32)
        transposed = layer.weight.t()
        # one buffer for all rows: their own addresses may be aligned differently
        operand = torch.empty(x.shape[1], dtype=torch.float32)
        for row in range(x.shape[0]):
            operand.copy_(x[row])
            y = torch.mv(transposed, operand)
            if layer.bias is not None:
                y += layer.bias
            # tanh is a library call too, whose vectorised body and tail may round differently: it has one shape, [N]
            result[row] = _gelu_new(y) if gelu else y
        return result


def layer_norm(x: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows' layer norm; both sums are trees of additions fixed by E alone."""
    width = x.shape[1]
    centred = x - (tree_sum(x) / width)[:, None]
    variance = tree_sum(centred * centred) / width
    # sqrt and division are correctly rounded everywhere; rsqrt is not.
    normed = centred * (1.0 / torch.sqrt(variance + norm.eps))[:, None]
    return (normed * norm.weight.float() + norm.bias.float()).to(dtype)


def advance(summary: RowSummary, rows: Rows, placed: Placed, cache: Cache) -> None:
    """Log what a step keeps, and advance the rows' slots."""
    ticks = cache.log.shape[0]
    words = pack(summary)
    count = len(words)
    cache.log[(rows.tick[:count] % ticks).long(), torch.arange(count, device=words.device)] = words
    rows.tick.add_(1)
    last = rows.last.long()
    slots = rows.slots[last].long()
    cache.newest[slots] = summary.tokens[:, 0].int()
    end = cache.table.shape[1] * PAGE - 1
    lengths = (placed.positions[last] + 1).clamp(max=end)
    # the spare slot, which fills a batch up, starts at 0 each time: it must not grow
    cache.lengths[slots] = torch.where(slots == len(cache.newest) - 1, 0, lengths).int()


def _attend(
    query: torch.Tensor,  # [H, QUERY_BLOCK, D] float32; row i is at position first + i
    first: int,
    keys: torch.Tensor,  # [H, C, D]
    values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    heads, rows, size = query.shape
    capacity = keys.shape[1]
    blocks = (first + rows - 1) // KEY_BLOCK + 1
    position = torch.arange(first, first + rows)[:, None]
    weights: list[torch.Tensor] = []
    content: list[torch.Tensor] = []
    for block in range(blocks):
        start = block * KEY_BLOCK
        stop = min(start + KEY_BLOCK, capacity)
        key = torch.zeros(heads, KEY_BLOCK, size, dtype=torch.float32)
        value = torch.zeros(heads, KEY_BLOCK, size, dtype=torch.float32)
        key[:, : stop - start] = keys[:, start:stop]
        value[:, : stop - start] = values[:, start:stop]
        seen = torch.arange(start, start + KEY_BLOCK)[None, :] <= position
        weights.append(torch.where(seen, torch.bmm(query, key.transpose(1, 2)) * scale, float("-inf")))
        content.append(value)
    best = torch.stack([w.amax(-1) for w in weights]).amax(0)[..., None]  # a maximum has no rounding
    total = torch.zeros(heads, rows, dtype=torch.float32)
    result = torch.zeros(heads, rows, size, dtype=torch.float32)
    for weight, value in zip(weights, content, strict=True):
        share = torch.exp(weight - best)
        total = total + tree_sum(share)
        result = result + torch.bmm(share, value)
    return result / total[..., None]


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum the last axis by halving it; only elementwise additions, so the order is fixed by its length."""
    width = x.shape[-1]
    size = 1 << (width - 1).bit_length()
    if size != width:
        x = torch.nn.functional.pad(x, (0, size - width))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_GELU_SCALE * (x + 0.044715 * (x * x * x))))


def summarise_rows(scores: torch.Tensor) -> RowSummary:
    """Reduce rows of scores [M, V] float32 to what a decode step keeps; exact on every device.

    The hash of a row is ``sum_i fold(bits_i * key_i) mod 2**64`` with ``fold(x) = x ^ (x >> 32)`` and the odd keys
    ``splitmix64(i) | 1``. Integer addition is associative, so any order, on any device, gives the same value.
    """
    tokens = top2_ids(scores)
    bits = scores.contiguous().view(torch.int32).to(torch.int64)
    product = bits * _hash_keys(scores.shape[1], scores.device)
    folded = product ^ ((product >> 32) & 0xFFFFFFFF)
    return RowSummary(
        tokens=tokens,
        scores=scores.gather(1, tokens) + 0.0,  # a zero has no sign
        hashes=folded.sum(1),
        finite=torch.isfinite(scores).all(1),
    )


def top2_ids(scores: torch.Tensor) -> torch.Tensor:
    """Return the best and the second-best token [M, 2] int64 of rows [M, V], the lower id first where equal."""
    vocabulary = scores.shape[1]
    index = torch.arange(vocabulary, device=scores.device)
    first = _lowest_best(scores, index)
    rest = scores.scatter(1, first[:, None], float("-inf"))
    # the winner cannot be its own runner-up, even where all others are -inf
    second = _lowest_best(rest, torch.where(index == first[:, None], vocabulary, index))
    return torch.stack([first, second], dim=1)


def log_probs(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability [M] float32 of one token [M] int64 a row of scores [M, V] float32.

    The sum is a tree fixed by V, and all else is elementwise, so no row's bits depend on the others; on a CPU row by
    row, for its vectorised loops and their tails may round differently.
    """
    if len(scores) > 1 and not scores.is_cuda:
        rows = range(len(scores))
        return torch.cat([log_probs(scores[row : row + 1], tokens[row : row + 1]) for row in rows])
    best = scores.amax(1, keepdim=True)
    total = tree_sum(torch.exp(scores - best))
    return scores.gather(1, tokens[:, None])[:, 0] - best[:, 0] - torch.log(total)


def _lowest_best(scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    best = scores.amax(1, keepdim=True)
    # a row of NaN has no best: the index is clamped, and the row is reported as not finite
    return torch.where(scores == best, index, scores.shape[1]).amin(1).clamp(max=scores.shape[1] - 1)


_COUNTERS: dict[tuple[int, torch.device], torch.Tensor] = {}
_KEYS: dict[tuple[int, torch.device], torch.Tensor] = {}


def _hash_keys(count: int, device: torch.device) -> torch.Tensor:
    keys = _KEYS.get((count, device))
    if keys is None:
        keys = _KEYS[count, device] = mix(torch.arange(count, dtype=torch.int64, device=device) * _signed(_GOLDEN)) | 1
    return keys


def counters(count: int, device: torch.device) -> torch.Tensor:
    """Return what SplitMix64 adds to its state by each of its first ``count`` steps, [count] int64."""
    steps = _COUNTERS.get((count, device))
    if steps is None:
        steps = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
        _COUNTERS[count, device] = steps
    return steps


def mix(x: torch.Tensor) -> torch.Tensor:
    """Return SplitMix64's output function of int64 states, elementwise and exact on every device."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
