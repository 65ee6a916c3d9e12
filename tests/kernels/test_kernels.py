"""Both kernel sets against float64, and bit for bit against themselves in other company.

Without a GPU the Triton kernels run in its interpreter (see conftest.py), on shapes that it gets through in a minute;
with one they are compiled, and there is more of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from stablegen.engine.invariant.kv_cache import TICKS, KVCache
from stablegen.kernels.base import LOG_WIDTH, PAGE, KernelSet, Linear, Norm, Placed, Rows
from stablegen.kernels.reference import ReferenceKernels, summarise_rows

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from stablegen.kernels import attention, linear, scores
from stablegen.kernels.operand import EXPONENT, as_pairs
from stablegen.kernels.triton import TritonKernels

pytestmark = pytest.mark.usefixtures("chained_products")

HAS_GPU = torch.cuda.is_available()
GPU = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of what is rounded to a dtype."""
SUM_TOLERANCE = 2e-6
"""Of sums in float32, whatever was multiplied."""

TILE_ROWS = (1, 2, 15, 16, 17, 33, 64, 65, 129, 513, 600)
"""Rows on both sides of each point where a launcher changes its tile."""
ROWS = TILE_ROWS if HAS_GPU else (1, 2, 16, 17, 33)
SHAPES = ((300, 20), (100, 67), (320, 960), (768, 768), (3072, 768)) if HAS_GPU else ((300, 20),)
"""(K, N): the first ends in the middle of a block, in the second of two slices; most N are no multiple of a tile."""
VOCABULARIES = (1, 2, 67, 1031, 50257) if HAS_GPU else (1, 2, 67, 1031)
FEWER = DTYPES if HAS_GPU else (torch.float32, torch.bfloat16)
"""The interpreter takes both 16-bit dtypes the same way."""
SIZES = (64, 80, 32)
"""Features of a head."""
LENGTH = 300 if HAS_GPU else 140
"""Tokens of one slot: its keys fill two blocks of 128, and begin another page."""


# --- what is tested, and how it is compared ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A kernel set, the device that it runs on, and the model's dtype."""

    kernels: KernelSet
    device: torch.device
    dtype: torch.dtype

    @property
    def paired(self) -> bool:
        return self.kernels.paired and self.dtype == torch.float32

    def normal(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Return numbers that the dtype holds, on the CPU."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def write(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations [M, K] as operations hand them to each other."""
        if not self.paired:
            return x.to(self.device, self.dtype)
        return as_pairs(x.float()).to(self.device)

    def read(self, operand: torch.Tensor) -> torch.Tensor:
        """Return what activations [M, K] are, in float64; also keys and values [..., D]."""
        operand = operand.cpu().double()
        return (operand[0] + operand[1] * 2.0**-11) * 2.0**-EXPONENT if self.paired else operand

    def layer(self, k: int, n: int, seed: int = 1) -> Layer:
        weight = self.normal(k, n, seed=seed).float() / k**0.5
        return Layer.of(self, weight, self.normal(n, seed=seed + 1))

    def norm(self, e: int) -> Norm:
        return Norm(self.normal(e, seed=8).to(self.device), self.normal(e, seed=9).to(self.device), 1e-5)

    def cache(self, slots: int, *, heads: int = 1, size: int = 16, context: int = 256, seed: int = 0) -> KVCache:
        """Return a cache full of NaN whose pages lie in no order."""
        each = -(-context // PAGE)
        shape = {"pages": slots * each, "slots": slots, "context": context}
        cache = KVCache(1, heads, size, **shape, dtype=self.dtype, device=self.device, paired=self.paired)
        order = torch.randperm(slots * each, generator=torch.Generator().manual_seed(seed)) + 1
        cache.table[:slots] = order.view(slots, each)
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        cache.log.fill_(-7)
        return cache


@dataclass(frozen=True)
class Layer:
    """A layer's weight and bias as they are, in float64, and as its kernel set laid them out."""

    weight: torch.Tensor
    bias: torch.Tensor
    prepared: Linear

    @classmethod
    def of(cls, subject: Subject, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Layer:
        n, dtype, device = weight.shape[1], subject.dtype, subject.device
        weight = weight.to(dtype)
        bias = torch.zeros(n, dtype=dtype) if bias is None else bias.to(dtype)
        prepared = subject.kernels.prepare(weight.to(device), bias.to(device))
        return cls(weight.double(), bias.double(), prepared)


def subjects(kernels: Sequence[str] = ("reference", "triton"), dtypes: Sequence[torch.dtype] = DTYPES) -> Callable:
    """Run a test with each of these kernel sets, in each of these dtypes."""
    chosen = [
        pytest.param(
            Subject(ReferenceKernels(), torch.device("cpu"), dtype)
            if name == "reference"
            else Subject(TritonKernels(), GPU, dtype),
            id=f"{name}-{str(dtype).removeprefix('torch.')}",
        )
        for name in kernels
        for dtype in dtypes
    ]
    return pytest.mark.parametrize("subject", chosen)


in_float32 = partial(subjects, dtypes=[torch.float32])
of_triton = partial(subjects, kernels=["triton"])
of_pairs = partial(subjects, kernels=["triton"], dtypes=[torch.float32])
# numpy, in the interpreter, says what it sees
overflows = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN):RuntimeWarning")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh tensor with what cannot pass, should an element be left unwritten."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fresh(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)

        return fresh

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of a finite result relative to the norm of what was expected."""
    result = result.cpu().double()
    assert result.shape == expected.shape
    assert torch.isfinite(result).all()
    return ((result - expected).norm() / expected.norm()).item()


def add_up(parts: torch.Tensor) -> torch.Tensor:
    """Add summands [P, M, N] in order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return numbers as integers: a zero's sign counts, and NaN equals itself."""
    return x.cpu().contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def moved_rows(run: Callable[[torch.Tensor], torch.Tensor], rows: int) -> list[str]:
    """Name each company in which a row's bits differ from those it has among all ``rows``.

    ``run`` takes the indices of rows and returns their results [rows, ...].
    """
    everyone = torch.arange(rows)
    expected = bits(run(everyone))
    companies = {f"the first {m}": everyone[:m] for m in ROWS if m < rows}
    companies["alone: the last"] = everyone[-1:]
    companies["permuted"] = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
    companies["the last seven reversed"] = everyone[-7:].flip(0)
    return [name for name, index in companies.items() if not torch.equal(bits(run(index)), expected[index])]


def tiles_of(choose: Callable[[Linear, int], linear.Tile], layer: Linear) -> list[linear.Tile]:
    """Return every tile that a launcher may take for a layer."""
    return list(dict.fromkeys(choose(layer, rows) for rows in TILE_ROWS))


def feed_forward(subject: Subject, x: torch.Tensor, up: Layer, down: Layer) -> torch.Tensor:
    """Return ``gelu_new(x @ up) @ down`` [M, N] without the last bias."""
    kernels = subject.kernels
    return add_up(kernels.partial(kernels.gelu(x, up.prepared), down.prepared, up.prepared))


# --- linear -----------------------------------------------------------------------------------------------------------


@subjects()
@pytest.mark.parametrize("m", [2, 17])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_linear_is_accurate(subject: Subject, k: int, n: int, m: int) -> None:
    layer, x = subject.layer(k, n), subject.normal(m, k)
    result = add_up(subject.kernels.partial(subject.write(x), layer.prepared))
    assert error(result, x.double() @ layer.weight) < SUM_TOLERANCE


@subjects()
@pytest.mark.parametrize("m", [2, 17])
def test_feed_forward_is_accurate(subject: Subject, m: int) -> None:
    up, down = subject.layer(70, 300), subject.layer(300, 20, seed=3)
    x = subject.normal(m, 70)
    inner = torch.nn.functional.gelu(x.double() @ up.weight + up.bias, approximate="tanh")
    assert error(feed_forward(subject, subject.write(x), up, down), inner @ down.weight) < TOLERANCE[subject.dtype]


@subjects()
def test_qkv_is_accurate(subject: Subject) -> None:
    heads, size = 2, 12  # a column tile holds ends of queries, keys and heads
    layer, x = subject.layer(70, 3 * heads * size), subject.normal(19, 70)
    cache = subject.cache(2, heads=heads, size=size)
    rows = make_rows(subject, [(1, range(60, 70)), (0, range(9))])
    placed = place(rows, cache)
    query = subject.kernels.qkv(subject.write(x), layer.prepared, cache, 0, rows, placed)
    exact = (x.double() @ layer.weight + layer.bias).view(19, 3, heads, size)
    assert error(subject.read(query), exact[:, 0].flatten(1)) < TOLERANCE[subject.dtype]
    for kept, expected in ((cache.keys, exact[:, 1]), (cache.values, exact[:, 2])):
        for slot, start, stop, part in ((1, 60, 70, expected[:10]), (0, 0, 9, expected[10:])):
            found = subject.read(sequence(kept, cache, slot))
            assert error(found[:, start:stop], part.transpose(0, 1)) < TOLERANCE[subject.dtype]
            assert found.isnan().sum() == found[:, stop - start :].numel()  # nothing else was written


@in_float32()
@pytest.mark.parametrize("m", [9, 18])
def test_gelu_holds_at_both_ends(subject: Subject, m: int) -> None:
    x = torch.tensor([-1e5, -100.0, -10.0, -1e-3, 0.0, 1e-3, 10.0, 100.0, 1e5]).repeat(m // 9)[:, None]
    one = Layer.of(subject, torch.ones(1, 1))
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    result = feed_forward(subject, subject.write(x), one, one).cpu()
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-9)


@of_pairs()
@pytest.mark.parametrize("k", [768, 3072])
def test_pairs_are_as_good_as_a_librarys_float32(subject: Subject, k: int) -> None:
    assert torch.get_float32_matmul_precision() == "highest", "TF32 is no float32"
    layer, x = subject.layer(k, 768 if HAS_GPU else 32), subject.normal(8, k)
    exact = x.double() @ layer.weight
    library = error(x.to(subject.device) @ layer.weight.float().to(subject.device), exact)
    assert error(add_up(subject.kernels.partial(subject.write(x), layer.prepared)), exact) <= 2 * library


def test_the_order_of_a_sum_is_no_matter_of_rows() -> None:
    for k, n in SHAPES:
        plan = linear.linear_plan(n, k)
        assert plan.slice_k % plan.block_k == 0
        assert (plan.splits - 1) * plan.slice_k < k <= plan.splits * plan.slice_k
    assert linear.linear_plan(20, 300).splits == 2, "the tests below want slices to add up"


@of_triton(dtypes=FEWER)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_every_tile_gives_the_same_bits(subject: Subject, k: int, n: int) -> None:
    layer, x = subject.layer(k, n), subject.write(subject.normal(70 if HAS_GPU else 33, k))
    tiles = tiles_of(linear._tile, layer.prepared)
    assert {tile.split_programs for tile in tiles} == {True, False}, "slices should meet in both ways"
    sums = [bits(add_up(linear.partial(x, layer.prepared, tile=tile))) for tile in tiles]
    inner = [bits(linear.gelu(x, layer.prepared, tile=tile)) for tile in tiles]
    assert all(torch.equal(found, sums[0]) for found in sums)
    assert all(torch.equal(found, inner[0]) for found in inner)


@of_triton(dtypes=FEWER)
def test_every_tile_of_qkv_gives_the_same_bits(subject: Subject) -> None:
    layer, x = subject.layer(300, 48), subject.write(subject.normal(33, 300))
    places = torch.arange(33, dtype=torch.int32, device=subject.device)
    results = []
    for tile in tiles_of(linear._tile, layer.prepared):
        cache = subject.cache(1)
        keys, values = cache.keys[0], cache.values[0]
        query = linear.qkv(x, layer.prepared, keys, values, places, tile=tile)
        assert not keys[..., :1, :, :33, :].isnan().any()
        results.append([bits(part) for part in (query, keys, values)])
    for found in results:
        assert all(map(torch.equal, found, results[0]))


@of_triton(dtypes=FEWER)
def test_summands_give_the_bits_of_one_program(subject: Subject) -> None:
    up, down = subject.layer(300, 100), subject.layer(100, 20, seed=3)
    x = subject.write(subject.normal(17, 300))
    summands = linear.partial(x, up.prepared, tile=linear._tile(up.prepared, 1))
    assert len(summands) == 2
    expected = add_up(linear.partial(linear.gelu(x, up.prepared), down.prepared))
    for rows in (1, 2, 16, 17):
        few = summands[:, :rows].contiguous()
        found = linear.partial(few, down.prepared, up.prepared, tile=linear._tile(down.prepared, 1))
        assert torch.equal(add_up(found), expected[:rows]), rows


@subjects(dtypes=FEWER)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_linear_is_invariant(subject: Subject, k: int, n: int) -> None:
    count = max(ROWS)
    layer, x = subject.layer(k, n), subject.write(subject.normal(count, k))
    run = lambda index: add_up(subject.kernels.partial(take(x, index), layer.prepared))  # noqa: E731
    assert moved_rows(run, count) == []


@subjects(dtypes=FEWER)
def test_feed_forward_is_invariant(subject: Subject) -> None:
    count = max(ROWS)
    up, down = subject.layer(70, 300), subject.layer(300, 20, seed=3)
    x = subject.write(subject.normal(count, 70))
    assert moved_rows(lambda index: feed_forward(subject, take(x, index), up, down), count) == []


@overflows
@subjects(dtypes=FEWER)
@pytest.mark.parametrize("m", [16, 17])
@pytest.mark.parametrize("neighbour", [6e4, float("inf"), float("nan")])
def test_linear_ignores_its_neighbours(subject: Subject, neighbour: float, m: int) -> None:
    up, down = subject.layer(70, 100), subject.layer(100, 20, seed=3)
    x = subject.write(subject.normal(m, 70))
    expected = feed_forward(subject, x, up, down)
    x[..., 1:, :] = neighbour
    assert torch.equal(feed_forward(subject, x, up, down)[0], expected[0])


@subjects(dtypes=[torch.float16, torch.bfloat16])
def test_linear_ignores_where_its_rows_begin(subject: Subject) -> None:
    layer, x = subject.layer(101, 20), subject.write(subject.normal(5, 101))  # 202 bytes a row: few begin aligned
    expected = add_up(subject.kernels.partial(x, layer.prepared))
    for i in range(1, 5):
        assert torch.equal(add_up(subject.kernels.partial(x[i:], layer.prepared)), expected[i:])


@of_triton()
def test_a_sum_split_by_batch_size_is_caught(subject: Subject) -> None:
    x = subject.normal(33, 128)
    layer, first, second = (
        Layer.of(subject, subject.layer(128, 20).weight[part]) for part in (slice(None), slice(50), slice(50, None))
    )

    def split_when_few(index: torch.Tensor) -> torch.Tensor:
        rows = x[index]
        if len(index) >= 16:
            return add_up(linear.partial(subject.write(rows), layer.prepared))
        halves = (rows[:, :50], first.prepared), (rows[:, 50:], second.prepared)
        return add_up(torch.cat([linear.partial(subject.write(half), half_layer) for half, half_layer in halves]))

    moved = moved_rows(split_when_few, 33)
    assert "the first 1" in moved
    assert "permuted" not in moved


# --- pairs of float16 in place of float32 -----------------------------------------------------------------------------


@of_pairs()
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e30])
def test_pairs_hold_22_bits(subject: Subject, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    small = 2.0 ** -(27 * torch.rand(64, 40, generator=generator))
    weight = scale * small * torch.randn(64, 40, generator=generator).sign()
    weight[0, 0] = scale
    prepared = subject.kernels.prepare(weight.to(subject.device), None)
    assert prepared.exponent is not None
    high, low = prepared.weight.cpu().double()
    found = (high + low * 2.0**-11).t() * 2.0**-prepared.exponent
    assert ((found - weight.double()).abs() / weight.double().abs()).max() <= 2.0**-22


@in_float32()
@pytest.mark.parametrize("scale", [1e-40, 1e-37, 1e-30, 1e30, 3e38])
def test_weights_of_any_size_are_multiplied(subject: Subject, scale: float) -> None:
    x = torch.tensor([[1.0, 0.5, -0.25]])
    layer = Layer.of(subject, scale * torch.tensor([[1.0, 0.25], [-0.5, 0.5], [1.0, 1.0]]))
    result = add_up(subject.kernels.partial(subject.write(x), layer.prepared)).cpu().double()
    # numbers as small as the first two have few bits left
    assert error(result / scale, x.double() @ layer.weight / scale) < (0.1 if scale < 1e-36 else 2e-6)


@subjects()
def test_a_weight_of_zeros_gives_zeros(subject: Subject) -> None:
    layer = Layer.of(subject, torch.zeros(70, 20))
    result = add_up(subject.kernels.partial(subject.write(subject.normal(2, 70)), layer.prepared))
    assert torch.equal(result.cpu(), torch.zeros(2, 20))


@of_pairs()
def test_activations_up_to_a_million_survive(subject: Subject) -> None:
    layer, x = subject.layer(70, 20), subject.normal(3, 70)
    x[1] *= 1e6 / x[1].abs().max()
    x[2, 7] = -1.04e6
    result = add_up(subject.kernels.partial(subject.write(x), layer.prepared))
    for found, row in zip(result, x, strict=True):
        assert error(found, row.double() @ layer.weight) < SUM_TOLERANCE


@overflows
@of_pairs()
@pytest.mark.parametrize("m", [3, 17])
def test_larger_activations_are_flagged_all_the_way(subject: Subject, m: int) -> None:
    """What overflows between two layers must not become a number again on its way to the scores."""
    kernels = subject.kernels
    weight = subject.layer(20, 40).weight
    weight[7, 5] = 1e6
    up, down, head = Layer.of(subject, weight), subject.layer(40, 20, seed=3), subject.layer(20, 67, seed=5)
    x = subject.normal(m, 20)
    x[:, 7] = 0.1
    x[1, 7] = 2.0  # its activation 5 is two millions
    hidden = kernels.partial(kernels.gelu(subject.write(x), up.prepared), down.prepared, up.prepared)
    stream = torch.zeros(m, 20, device=subject.device)
    _, normed = kernels.add_norm(stream, hidden, down.prepared, subject.norm(20))
    chosen = choose(subject, normed, head.prepared)
    assert chosen.finite.tolist() == [i != 1 for i in range(m)]


@overflows
@of_pairs()
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_larger_activations_never_leave_attention_as_numbers(subject: Subject, part: str) -> None:
    layer, x = subject.layer(20, 48), subject.normal(20, 20)
    layer.prepared.bias[["query", "key", "value"].index(part) * 16 + 3] = 2e6  # type: ignore[index]
    cache = subject.cache(1)
    by_tiles = attend(subject, cache, x, layer, make_rows(subject, [(0, range(20))]))
    cache.lengths[0] = 19
    newest = attend(subject, cache, x[19:], layer, newest_rows(subject, [0]))
    reached = slice(3, 4) if part == "value" else slice(None)
    assert not torch.isfinite(subject.read(by_tiles)[:, reached]).any()
    assert not torch.isfinite(subject.read(newest)[:, reached]).any()


# --- embedding, residual sums and layer norm --------------------------------------------------------------------------


def layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    weight, bias = norm.weight.cpu().double(), norm.bias.cpu().double()
    return torch.nn.functional.layer_norm(x.cpu().double(), (x.shape[1],), weight, bias, norm.eps)


@dataclass(frozen=True)
class Embedding:
    """A model's two embeddings, and a cache that says where two slots stand."""

    subject: Subject
    tokens: Layer
    positions: torch.Tensor
    cache: KVCache

    @classmethod
    def of(cls, subject: Subject, e: int) -> Embedding:
        cache = subject.cache(3)
        cache.newest[:3] = torch.tensor([11, 22, 33])
        cache.lengths[:3] = torch.tensor([5, 64, 130])
        positions = subject.normal(256, e, seed=2).to(subject.device)
        return cls(subject, Layer.of(subject, subject.normal(e, 67, seed=1)), positions, cache)

    def run(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> tuple:
        device, e = self.subject.device, self.positions.shape[1]
        parts = [torch.tensor(part, dtype=torch.int32, device=device) for part in (tokens, slots, positions)]
        nothing = parts[0][:0]
        rows = Rows(*parts, nothing, nothing, nothing, nothing, tile=1)
        return self.subject.kernels.embed(rows, self.cache, self.tokens.prepared, self.positions, self.subject.norm(e))


@subjects()
@pytest.mark.parametrize("e", [5, 320, 768] if HAS_GPU else [5, 320])
def test_embed_finds_what_tokens_and_positions_mean(subject: Subject, e: int) -> None:
    embedding = Embedding.of(subject, e)
    # -1: the newest token of the slot, the next position of the slot
    x, normed, placed = embedding.run([3, 66, -1, 0, -1, 9], [0, 1, 1, 2, 2, 0], [0, 63, 64, -1, -1, 255])
    ids, at = [3, 66, 22, 0, 33, 9], [0, 63, 64, 130, 130, 255]
    expected = embedding.tokens.weight.t()[ids] + embedding.positions.cpu().double()[at]
    assert error(x, expected) < 2e-7
    assert error(subject.read(normed), layer_norm(x, subject.norm(e))) < TOLERANCE[subject.dtype]
    assert placed.slots.tolist() == [0, 1, 1, 2, 2, 0]
    assert placed.positions.tolist() == at
    table = embedding.cache.table.tolist()
    spots = [(0, 0, 0), (1, 0, 63), (1, 1, 0), (2, 2, 2), (2, 2, 2), (0, 3, 63)]
    assert placed.places.tolist() == [table[slot][page] * PAGE + offset for slot, page, offset in spots]


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("e", [101, 768])
def test_embed_is_invariant(subject: Subject, e: int) -> None:
    embedding = Embedding.of(subject, e)
    count = 17
    ids = [-1 if i % 5 == 0 else 2 * i for i in range(count)]

    def run(index: torch.Tensor) -> torch.Tensor:
        chosen = index.tolist()
        slots, positions = [i % 3 for i in chosen], [-1 if i % 4 == 0 else 3 * i for i in chosen]
        x, normed, _ = embedding.run([ids[i] for i in chosen], slots, positions)
        return torch.cat([x.cpu().double(), subject.read(normed)], dim=1).float()

    assert moved_rows(run, count) == []


@dataclass(frozen=True)
class Sums:
    """What a residual sum takes: the stream, summands, and a layer whose bias is added."""

    subject: Subject
    x: torch.Tensor
    parts: torch.Tensor
    layer: Linear
    norm: Norm

    @classmethod
    def of(cls, subject: Subject, count: int, e: int) -> Sums:
        generator = torch.Generator().manual_seed(4)
        parts = 3 if isinstance(subject.kernels, TritonKernels) else 1  # the other's are whole
        x = 3 * torch.randn(count, e, generator=generator) + 5
        summands = torch.randn(parts, count, e, generator=generator)
        layer = subject.layer(1, e).prepared
        return cls(subject, x.to(subject.device), summands.to(subject.device), layer, subject.norm(e))

    def run(self, index: torch.Tensor | slice = slice(None), select: torch.Tensor | None = None) -> tuple:
        x, parts = self.x[index], self.parts[:, index].contiguous()
        return self.subject.kernels.add_norm(x, parts, self.layer, self.norm, select)

    def row_bits(self, index: torch.Tensor) -> torch.Tensor:
        result, normed = self.run(index)
        return torch.cat([result.cpu().double(), self.subject.read(normed)], dim=1).float()


@subjects()
@pytest.mark.parametrize("e", [5, 320, 768] if HAS_GPU else [5, 320])
def test_add_norm_adds_in_order(subject: Subject, e: int) -> None:
    sums = Sums.of(subject, 17, e)
    assert sums.layer.bias is not None
    result, normed = sums.run()
    expected = sums.x + (add_up(sums.parts) + sums.layer.bias.float())
    assert torch.equal(result, expected)
    assert error(subject.read(normed), layer_norm(result, sums.norm)) < TOLERANCE[subject.dtype]


@subjects()
def test_add_norm_selects_rows(subject: Subject) -> None:
    sums = Sums.of(subject, 17, 320)
    chosen = torch.tensor([16, 0, 3, 3], dtype=torch.int32, device=subject.device)
    result, normed = sums.run()
    found, found_normed = sums.run(select=chosen)
    assert torch.equal(found, result[chosen.long()])
    assert torch.equal(found_normed, take(normed, chosen.long()))


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("e", [101, 768])
def test_add_norm_is_invariant(subject: Subject, e: int) -> None:
    assert moved_rows(Sums.of(subject, 17, e).row_bits, 17) == []


@overflows
@subjects()
def test_add_norm_ignores_its_neighbours(subject: Subject) -> None:
    sums = Sums.of(subject, 5, 320)
    expected = sums.row_bits(torch.arange(5))[0]
    sums.x[1:3] = 1e30
    sums.parts[:, 3:] = float("nan")
    assert torch.equal(sums.row_bits(torch.arange(5))[0], expected)


@subjects()
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e15])
def test_norms_of_any_size_are_accurate(subject: Subject, scale: float) -> None:
    e = 320
    x = torch.randn(2, e, generator=torch.Generator().manual_seed(3)) * scale
    x[1, 7] = 1000 * scale  # one number that outweighs all others
    nothing = Linear(x, torch.zeros(e, dtype=subject.dtype, device=subject.device), 1, e)
    plain = Norm(nothing.bias + 1, nothing.bias, 1e-5)
    x = x.to(subject.device)
    _, normed = subject.kernels.add_norm(x, torch.zeros(1, 2, e, device=subject.device), nothing, plain)
    expected = layer_norm(x, plain)
    for found, exact in zip(subject.read(normed), expected, strict=True):
        assert error(found, exact) < TOLERANCE[subject.dtype]


@subjects()
def test_add_norm_ignores_where_its_rows_begin(subject: Subject) -> None:
    sums = Sums.of(subject, 5, 101)
    parts = sums.parts[:1]
    kernels = subject.kernels
    expected, _ = kernels.add_norm(sums.x, parts, sums.layer, sums.norm)
    for i in (1, 2, 3):  # views that begin at odd addresses
        found, _ = kernels.add_norm(sums.x[i:], parts[:, i:], sums.layer, sums.norm)
        assert torch.equal(found, expected[i:])


# --- attention --------------------------------------------------------------------------------------------------------


def take(operand: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return some rows of an operand."""
    return operand.index_select(-2, index.to(operand.device))


def make_rows(subject: Subject, runs: Sequence[tuple[int, range]], cut: Sequence[int] | None = None) -> Rows:
    """Return rows for runs of positions of slots, in tiles as long as may be, or of these lengths."""
    slots, positions, first, counts = [], [], [], []
    for slot, run in runs:
        lengths = cut or [min(subject.kernels.tile, len(run) - at) for at in range(0, len(run), subject.kernels.tile)]
        for length in lengths:
            first.append(len(slots))
            counts.append(length)
            slots += [slot] * length
        positions += run
    assert len(slots) == len(positions)
    parts = (torch.zeros(len(slots)), torch.tensor(slots), torch.tensor(positions), torch.tensor(first))
    tensors = [part.to(subject.device, torch.int32) for part in (*parts, torch.tensor(counts))]
    return Rows(*tensors, tensors[0][:0], tensors[0][:0], tile=subject.kernels.tile)


def newest_rows(subject: Subject, slots: Sequence[int]) -> Rows:
    """Return rows for the newest token of each of these slots."""
    index = torch.arange(len(slots), dtype=torch.int32, device=subject.device)
    newest = torch.full_like(index, -1)
    where = torch.tensor(slots, dtype=torch.int32, device=subject.device)
    return Rows(newest, where, newest, index, torch.ones_like(index), index, torch.zeros_like(index), tile=1)


def place(rows: Rows, cache: KVCache) -> Placed:
    """Say where rows stand, as embedding does."""
    slots = rows.slots.long()
    at = torch.where(rows.positions < 0, cache.lengths[slots], rows.positions)
    return Placed(rows.slots, at, cache.table[slots, at.long() // PAGE] * PAGE + at % PAGE)


def attend(subject: Subject, cache: KVCache, x: torch.Tensor, layer: Layer, rows: Rows) -> torch.Tensor:
    """Return the attention of rows whose queries, keys and values come of ``x``."""
    placed = place(rows, cache)
    query = subject.kernels.qkv(subject.write(x), layer.prepared, cache, 0, rows, placed)
    scale = cache.keys.shape[-1] ** -0.5
    return subject.kernels.attention(query, layer.prepared, cache, 0, rows, placed, scale)


def sequence(kept: torch.Tensor, cache: KVCache, slot: int) -> torch.Tensor:
    """Return a slot's keys or values in the order of their positions, [..., H, C, D]."""
    return kept[0].index_select(-4, cache.table[slot].long()).transpose(-4, -3).flatten(-3, -2)


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of ``LENGTH`` tokens, the attention of each of them, and what they were made of."""

    subject: Subject
    x: torch.Tensor
    layer: Layer
    query: torch.Tensor
    keys: torch.Tensor  # [..., H, C, D], with NaN behind the last
    values: torch.Tensor
    result: torch.Tensor

    @classmethod
    def of(cls, subject: Subject, size: int = 64, heads: int = 1) -> Tokens:
        x = subject.normal(LENGTH, 40)
        layer = subject.layer(40, 3 * heads * size)
        cache = subject.cache(1, heads=heads, size=size, context=-(-LENGTH // PAGE) * PAGE)
        rows = make_rows(subject, [(0, range(LENGTH))])
        placed = place(rows, cache)
        query = subject.kernels.qkv(subject.write(x), layer.prepared, cache, 0, rows, placed)
        result = subject.kernels.attention(query, layer.prepared, cache, 0, rows, placed, size**-0.5)
        return cls(subject, x, layer, query, sequence(cache.keys, cache, 0), sequence(cache.values, cache, 0), result)

    def cache(self, lengths: Sequence[int], *, context: int = 320, seed: int = 7) -> KVCache:
        """Return a cache in which each slot knows so many of the tokens, and NaN lies everywhere else."""
        heads, _, size = self.keys.shape[-3:]
        cache = self.subject.cache(len(lengths), heads=heads, size=size, context=context, seed=seed)
        cache.lengths[: len(lengths)] = torch.tensor(lengths)
        for source, target in ((self.keys, cache.keys), (self.values, cache.values)):
            for slot, length in enumerate(lengths):
                for at in range(0, length, PAGE):
                    count = min(PAGE, length - at)
                    page = int(cache.table[slot, at // PAGE])
                    target[0][..., page, :, :count, :] = source[..., at : at + count, :]
        if cache.keys.is_cuda:
            torch.cuda.synchronize()  # a pass begins with `embed`, which lets no later kernel begin before all this
        return cache

    def exact(self) -> torch.Tensor:
        heads, _, size = self.keys.shape[-3:]
        query = self.subject.read(self.query).view(LENGTH, heads, size).transpose(0, 1)
        keys, values = (self.subject.read(kept)[:, :LENGTH] for kept in (self.keys, self.values))
        weight = query @ keys.transpose(1, 2) * size**-0.5
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        return (weight.where(seen, -torch.inf).softmax(-1) @ values).transpose(0, 1).flatten(1)


EDGES = (0, 1, 15, 16, 31, 32, 62, 63, 64, 65, 126, 127, 128, 129, 137, 138, LENGTH - 1)
"""Positions on both sides of pages and blocks: more than a launcher calls few."""


@subjects()
@pytest.mark.parametrize("size", SIZES)
def test_attention_is_accurate(subject: Subject, size: int) -> None:
    tokens = Tokens.of(subject, size, heads=2)
    exact, result = tokens.exact(), subject.read(tokens.result)
    assert error(result, exact) < TOLERANCE[subject.dtype]
    for position in EDGES:
        assert error(result[position], exact[position]) < 3 * TOLERANCE[subject.dtype], position


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("size", SIZES if HAS_GPU else SIZES[:1])
def test_attention_of_newest_tokens_is_that_of_tiles(subject: Subject, size: int) -> None:
    tokens = Tokens.of(subject, size)
    assert len(EDGES) == 17
    # Few rows bring summands, more bring queries whose keys are stored. Neither may read its own position before it is
    # written, a later one ever, nor another slot's.
    for edges in (EDGES[:1], EDGES[3:11:2], EDGES) if not HAS_GPU else (EDGES[:1], EDGES[9:10], EDGES[:16], EDGES):
        cache = tokens.cache(edges)
        rows = newest_rows(subject, range(len(edges)))
        found = attend(subject, cache, tokens.x[list(edges)], tokens.layer, rows)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.tensor(edges)))), edges
        for slot, position in enumerate(edges):
            for source, target in ((tokens.keys, cache.keys), (tokens.values, cache.values)):
                stored = sequence(target, cache, slot)
                assert torch.equal(stored[..., : position + 1, :], source[..., : position + 1, :])
                assert stored[..., position + 1 :, :].isnan().all()


@of_triton(dtypes=FEWER)
def test_attention_of_newest_tokens_is_the_same_from_summands_and_from_queries(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    edges = [2, 64, 130]
    rows = newest_rows(subject, range(3))
    results = []
    for summands in (True, False):
        cache = tokens.cache(edges)
        placed, x = place(rows, cache), subject.write(tokens.x[edges])
        layer = tokens.layer.prepared
        if summands:
            query = linear.partial(x, layer)
        else:
            query = linear.qkv(x, layer, cache.keys[0], cache.values[0], placed.places)
        assert (query.dtype == torch.float32) == summands
        results.append(bits(attention.attention(query, layer, cache, 0, rows, placed, 0.125)))
    assert torch.equal(*results)


@subjects(dtypes=FEWER)
def test_attention_does_not_see_how_tokens_are_cut_into_tiles(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    expected = bits(tokens.result)
    start = 50
    for cut in ([1, 5, 17, 9], [31, 1], [3, 29]):
        stop = start + sum(cut)
        cache = tokens.cache([stop])
        rows = make_rows(subject, [(0, range(start, stop))], cut)
        found = attend(subject, cache, tokens.x[start:stop], tokens.layer, rows)
        assert torch.equal(bits(found), expected[..., start:stop, :]), cut


@of_triton(dtypes=FEWER)
def test_attention_does_not_see_how_many_rows_a_program_has(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    cache, rows = tokens.cache([LENGTH]), make_rows(subject, [(0, range(60, 72))])
    query = take(tokens.query, torch.arange(60, 72)).contiguous()
    for tile in [attention.AttentionTile(*sizes) for sizes in ((16, 4, 2), (32, 4, 2), (64, 2, 2))]:
        layer, placed = tokens.layer.prepared, place(rows, cache)
        found = attention.attention(query, layer, cache, 0, rows, placed, 0.125, tile=tile)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.arange(60, 72)))), tile


@subjects(dtypes=FEWER)
@pytest.mark.parametrize("context", [LENGTH, 512, 1024])
def test_attention_does_not_see_where_pages_lie_nor_how_many_there_are(subject: Subject, context: int) -> None:
    tokens = Tokens.of(subject)
    cache = tokens.cache([0, LENGTH, 0], context=context, seed=context)
    for position in (63, LENGTH - 1):
        rows = make_rows(subject, [(1, range(position, position + 1))])
        found = attend(subject, cache, tokens.x[position : position + 1], tokens.layer, rows)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.tensor([position]))))


@subjects(dtypes=FEWER)
def test_attention_does_not_see_other_slots(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    runs = [(2, range(60, 70)), (0, range(1)), (3, range(120, 140)), (1, range(5))]
    order = torch.cat([torch.arange(run.start, run.stop) for _, run in runs])
    found = attend(subject, tokens.cache([140] * 4), tokens.x[order], tokens.layer, make_rows(subject, runs))
    assert torch.equal(bits(found), bits(take(tokens.result, order)))


@subjects(dtypes=FEWER)
def test_attention_never_reads_behind_the_position(subject: Subject) -> None:
    tokens = Tokens.of(subject)
    for position in (0, 63, 64):
        cache = tokens.cache([position])
        rows = make_rows(subject, [(0, range(position, position + 1))])
        found = attend(subject, cache, tokens.x[position : position + 1], tokens.layer, rows)
        assert torch.equal(bits(found), bits(take(tokens.result, torch.tensor([position]))))


# --- choosing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """What a pass left: the scores that it wrote, its entry of the log, and the state of all slots."""

    scores: torch.Tensor
    words: torch.Tensor
    cache: KVCache
    rows: Rows

    @property
    def finite(self) -> torch.Tensor:
        return self.words[:, 6] == 1

    @property
    def hashes(self) -> torch.Tensor:
        return self.words[:, 4:6].contiguous().view(torch.int64)[:, 0]

    def check(self) -> None:
        """Compare with what the reference says of the same scores."""
        expected = summarise_rows(self.scores)
        assert torch.equal(self.hashes, expected.hashes)
        assert torch.equal(self.finite, expected.finite)
        assert self.words[:, 7].tolist() == [0] * len(self.words)
        best = self.words[:, :2].long()
        assert ((best >= 0) & (best < self.scores.shape[1])).all()
        orderly = ~self.scores.isnan().any(1)  # among NaN there is no best
        assert torch.equal(best[orderly], expected.tokens[orderly])
        assert torch.equal(self.words[:, 2:4][orderly], bits(expected.scores)[orderly])


def choose(subject: Subject, x: torch.Tensor, layer: Linear, tile: linear.Tile | None = None, tick: int = 5) -> Chosen:
    """Choose for rows [R, E] that all stand in slots of their own, the first row in the last slot."""
    count = x.shape[-2]
    cache = subject.cache(count, context=64)
    index = torch.arange(count, dtype=torch.int32, device=subject.device)
    rows = Rows(index, index.flip(0), index, index, index, index, torch.full_like(index, tick), tile=1)
    into = torch.empty(count, layer.n, device=subject.device)
    arguments = (x, layer, rows, Placed(rows.slots, index + 3, index), cache, into)
    if tile is None:
        subject.kernels.choose(*arguments)
    else:
        scores.choose(*arguments, tile=tile)
    return Chosen(into.cpu(), cache.log[tick % TICKS].cpu(), cache, rows)


def awkward_rows(vocabulary: int) -> torch.Tensor:
    """Return scores of few bits, with ties and extremes at a row's ends and in its middle."""
    middle, last = vocabulary // 2, vocabulary - 1
    cases: list[dict[int, float]] = [
        {},
        {0: 9.0, last: 9.0},
        {middle: 9.0, last: 9.0},
        {0: 9.0, min(1, last): 9.0, last: 9.0},
        {0: 6e4, last: -6e4},
        {last: 6e4, middle: 6e4},
    ]
    rows = torch.randn(len(cases), vocabulary, generator=torch.Generator().manual_seed(3))
    rows = (8 * rows).round() / 8
    for row, changes in zip(rows, cases, strict=True):
        for spot, value in changes.items():
            row[spot] = value
    flat = torch.tensor([[0.0], [-1.0], [1.0]]).expand(3, vocabulary)
    return torch.cat([rows, -rows.abs(), flat])


@subjects()
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_best_two_and_the_hash_are_the_references(subject: Subject, vocabulary: int) -> None:
    rows = awkward_rows(vocabulary)
    chosen = choose(subject, subject.write(torch.eye(len(rows))), Layer.of(subject, rows).prepared)
    assert torch.equal(chosen.scores, rows.to(subject.dtype).float())
    assert chosen.finite.all()
    chosen.check()


@subjects()
def test_of_equal_scores_the_lower_id_comes_first(subject: Subject) -> None:
    rows = [[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-5.0, -3.0, -3.0, -3.0], [2.0, 2.0, 3.0, 1.0]]
    chosen = choose(subject, subject.write(torch.eye(4)), Layer.of(subject, torch.tensor(rows)).prepared)
    assert chosen.words[:, :2].tolist() == [[1, 3], [0, 1], [1, 2], [2, 0]]
    assert chosen.words[:, 2:4].contiguous().view(torch.float32).tolist() == [[3, 3], [0, 0], [-3, -3], [3, 2]]


@of_pairs()
def test_a_zero_has_no_sign_but_for_the_hash(subject: Subject) -> None:
    tiny = torch.tensor([[-1e-37, 1e-37, -1e-37, -1e-26], [-1e-37, -1e-37, -1e-37, -1e-26]])
    x = 1e-9 * torch.eye(2)  # their products are smaller than any float32
    chosen = choose(subject, subject.write(x), Layer.of(subject, tiny).prepared)
    assert bits(chosen.scores)[:, :3].unique().numel() == 2, "both zeros should have come up"
    assert chosen.words[:, :2].tolist() == [[0, 1], [0, 1]]
    assert chosen.words[:, 2:4].tolist() == [[0, 0], [0, 0]]
    assert chosen.hashes[0] != chosen.hashes[1]
    chosen.check()


@overflows
@subjects()
def test_a_score_that_is_not_finite_is_flagged_and_no_other_row(subject: Subject) -> None:
    vocabulary = 67
    weight = subject.layer(5, vocabulary).weight
    x = subject.normal(17, 5)
    operand = subject.write(x)
    for row, value in ((1, "inf"), (3, "-inf"), (4, "nan")):
        operand[..., row, 2] = float(value)
    chosen = choose(subject, operand, Layer.of(subject, weight).prepared)
    assert (~chosen.finite).nonzero()[:, 0].tolist() == [1, 3, 4]
    chosen.check()


@overflows
@subjects(dtypes=[torch.bfloat16])
@pytest.mark.parametrize("place", [0, 33, 66])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_infinite_score_suffices(subject: Subject, place: int, sign: int) -> None:
    weight = subject.normal(2, 67).float()
    weight[0] = 0.5
    weight[0, place] = sign * 100.0
    chosen = choose(subject, subject.write(torch.tensor([[3e38, 0.0], [0.0, 1.0]])), Layer.of(subject, weight).prepared)
    assert chosen.scores.isinf().sum() == 1
    assert chosen.finite.tolist() == [False, True]
    chosen.check()


@subjects()
def test_the_hash_sees_one_bit_and_not_the_company(subject: Subject) -> None:
    weight = subject.normal(5, 131).float()
    first = choose(subject, subject.write(torch.eye(5)), Layer.of(subject, weight).prepared)
    assert len(set(first.hashes.tolist())) == 5
    some = choose(subject, subject.write(torch.eye(5)[3:]), Layer.of(subject, weight).prepared)
    assert torch.equal(some.hashes, first.hashes[3:])
    step = {torch.float32: 2.0**-20, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[subject.dtype]
    weight[3, 70] = 1.0
    before = choose(subject, subject.write(torch.eye(5)), Layer.of(subject, weight).prepared)
    weight[3, 70] += step
    after = choose(subject, subject.write(torch.eye(5)), Layer.of(subject, weight).prepared)
    assert (after.scores != before.scores).sum() == 1
    assert (after.hashes != before.hashes).tolist() == [False, False, False, True, False]


@of_triton(dtypes=FEWER)
@pytest.mark.parametrize(("k", "n"), [(300, 67), (768, 50257)] if HAS_GPU else [(300, 67)])
def test_every_tile_of_choose_gives_the_same_bits(subject: Subject, k: int, n: int) -> None:
    layer, x = subject.layer(k, n).prepared, subject.write(subject.normal(20, k))
    first, *others = [choose(subject, x, layer, tile) for tile in tiles_of(scores._tile, layer)]
    first.check()
    assert len(others) > 1
    for other in others:
        assert torch.equal(bits(other.scores), bits(first.scores))
        assert torch.equal(other.words, first.words)


@subjects(dtypes=FEWER)
def test_choose_is_invariant(subject: Subject) -> None:
    count = max(ROWS)
    layer, x = subject.layer(70, 67).prepared, subject.write(subject.normal(count, 70))

    def run(index: torch.Tensor) -> torch.Tensor:
        chosen = choose(subject, take(x, index), layer)
        return torch.cat([bits(chosen.scores), chosen.words], dim=1)

    assert moved_rows(run, count) == []


@subjects()
def test_choose_needs_no_room_for_the_scores(subject: Subject) -> None:
    layer, x = subject.layer(70, 67).prepared, subject.write(subject.normal(3, 70))
    seen = choose(subject, x, layer)
    cache, rows = subject.cache(3, context=64), newest_rows(subject, [0, 1, 2])
    subject.kernels.choose(x, layer, rows, place(rows, cache), cache, None)
    assert torch.equal(cache.log[0].cpu(), seen.words)


@subjects()
def test_choose_advances_its_slots_and_no_others(subject: Subject) -> None:
    device = subject.device
    layer = Layer.of(subject, torch.eye(6)).prepared
    x = subject.write(torch.eye(6)[[4, 2, 5]])
    cache = subject.cache(4, context=128)
    cache.newest.fill_(-3)
    cache.lengths.fill_(-3)
    # five tokens stand in slots 1, 1, 3, spare, 0; wanted are the scores behind the second, the fourth and the last
    slots = torch.tensor([1, 1, 3, cache.spare, 0], dtype=torch.int32, device=device)
    positions = torch.tensor([7, 8, 5, 9, 127], dtype=torch.int32, device=device)
    last = torch.tensor([1, 3, 4], dtype=torch.int32, device=device)
    tick = torch.full((3,), TICKS - 1, dtype=torch.int32, device=device)
    rows = Rows(slots, slots, positions, slots, slots, last, tick, tile=1)
    for _ in range(2):
        subject.kernels.choose(x, layer, rows, Placed(slots, positions, positions), cache, None)
    assert tick.tolist() == [TICKS + 1] * 3
    # slot 2 and slot 3, whose scores were not wanted, are as they were; the spare slot begins anew; the last position
    # that the table knows is the last
    assert cache.newest.tolist() == [5, 4, -3, -3, 2]
    assert cache.lengths.tolist() == [127, 9, -3, -3, 0]
    written = cache.log[:, :, 0].ne(-7).nonzero().tolist()
    assert written == [[entry, row] for entry in (0, TICKS - 1) for row in range(3)], "the log should begin anew"
    assert torch.equal(cache.log[0, :3], cache.log[TICKS - 1, :3])
    assert cache.log[0, :3, 0].tolist() == [4, 2, 5]
    assert cache.log.shape[2] == LOG_WIDTH
