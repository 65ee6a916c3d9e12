"""Kernel sets, layers and rows for the tests of tests/kernels, and how results are compared bit for bit.

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
from stablegen.kernels import log
from stablegen.kernels.base import PAGE, KernelSet, Linear, Norm, Placed, Rows
from stablegen.kernels.reference import ReferenceKernels, summarise_rows

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from stablegen.kernels import scores
from stablegen.kernels.operand import EXPONENT, as_pairs
from stablegen.kernels.tiles import Tile
from stablegen.kernels.triton import TritonKernels

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


def subjects(
    kernels: Sequence[str] = ("reference", "triton"), dtypes: Sequence[torch.dtype] = DTYPES
) -> pytest.MarkDecorator:
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


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of a finite result relative to the norm of what was expected."""
    result = result.cpu().double()
    assert result.shape == expected.shape
    assert torch.isfinite(result).all()
    return float((result - expected).norm() / expected.norm())


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


def tiles_of(tile_for: Callable[[Linear, int], Tile], layer: Linear) -> list[Tile]:
    """Return every tile that a launcher may take for a layer."""
    return list(dict.fromkeys(tile_for(layer, rows) for rows in TILE_ROWS))


def feed_forward(subject: Subject, x: torch.Tensor, up: Layer, down: Layer) -> torch.Tensor:
    """Return ``gelu_new(x @ up) @ down`` [M, N] without the last bias."""
    kernels = subject.kernels
    return add_up(kernels.partial(kernels.gelu(x, up.prepared), down.prepared, up.prepared))


# --- rows of a pass, and what it leaves -------------------------------------------------------------------------------


def take(operand: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return some rows of an operand."""
    return operand.index_select(-2, index.to(operand.device))


def make_rows(subject: Subject, runs: Sequence[tuple[int, range]], cut: Sequence[int] | None = None) -> Rows:
    """Return rows for runs of positions of slots, in tiles as long as may be, or of these lengths."""
    slots: list[int] = []
    positions: list[int] = []
    first: list[int] = []
    counts: list[int] = []
    for slot, run in runs:
        lengths = cut or [min(subject.kernels.tile, len(run) - at) for at in range(0, len(run), subject.kernels.tile)]
        for length in lengths:
            first.append(len(slots))
            counts.append(length)
            slots += [slot] * length
        positions += run
    assert len(slots) == len(positions)

    def placed(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=subject.device)

    tokens = placed([0] * len(slots))
    nothing = tokens[:0]
    tile = subject.kernels.tile
    return Rows(tokens, placed(slots), placed(positions), placed(first), placed(counts), nothing, nothing, tile=tile)


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
class Chosen:
    """What a pass left: the scores that it wrote, its entry of the log, and the state of all slots."""

    scores: torch.Tensor
    words: torch.Tensor
    cache: KVCache
    rows: Rows

    @property
    def finite(self) -> torch.Tensor:
        return self.words[:, log.FINITE] == 1

    @property
    def hashes(self) -> torch.Tensor:
        return log.unpack_hashes(self.words)

    def check(self) -> None:
        """Compare with what the reference says of the same scores."""
        expected = summarise_rows(self.scores)
        assert torch.equal(self.hashes, expected.hashes)
        assert torch.equal(self.finite, expected.finite)
        assert self.words[:, log.WIDTH - 1].tolist() == [0] * len(self.words)
        best = self.words[:, : log.SCORE].long()
        assert ((best >= 0) & (best < self.scores.shape[1])).all()
        orderly = ~self.scores.isnan().any(1)  # NaN has no order
        assert torch.equal(best[orderly], expected.tokens[orderly])
        assert torch.equal(self.words[:, log.SCORE : log.HASH][orderly], bits(expected.scores)[orderly])


def choose(subject: Subject, x: torch.Tensor, layer: Linear, tile: Tile | None = None, tick: int = 5) -> Chosen:
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
