"""Both kernel sets against float64, and bit for bit against themselves in other company.

Without a GPU the Triton kernels run in its interpreter (see conftest.py); with one they are compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from stablegen.kernels import reference
from stablegen.kernels.reference import ReferenceKernels

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

from stablegen.kernels.attention import attention_configuration
from stablegen.kernels.linear import linear, linear_configuration
from stablegen.kernels.triton import TritonKernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablegen.kernels.base import Activation, KernelSet

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
ROWS = [1, 2, 7, 16, 17, 33, 65, 129]
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Subject:
    """A kernel set and the device that it runs on."""

    kernels: KernelSet
    device: torch.device


@pytest.fixture(params=["reference", "triton"])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "reference":
        return Subject(ReferenceKernels(), torch.device("cpu"))
    return Subject(TritonKernels(), GPU)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh tensor with NaN, so that an element left unwritten cannot pass."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fresh(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return fresh

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def assert_close(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    result = result.cpu().double()
    assert result.shape == expected.shape
    assert torch.isfinite(result).all()
    assert ((result - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


# --- linear ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer's operands on the CPU, with ``rows`` rows of input, and its result in float64."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    activation: Activation

    def run(self, subject: Subject, out_dtype: torch.dtype, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        device = subject.device
        layer = subject.kernels.prepare(on(self.weight, device), None if self.bias is None else self.bias.to(device))
        residual = None if self.residual is None else self.residual[rows].to(device)
        return subject.kernels.linear(
            self.x[rows].to(device), layer, activation=self.activation, residual=residual, out_dtype=out_dtype
        ).cpu()

    def exact(self) -> torch.Tensor:
        y = self.x.double() @ self.weight.double()
        if self.bias is not None:
            y = y + self.bias.double()
        if self.activation == "gelu_new":
            y = torch.nn.functional.gelu(y, approximate="tanh")
        return y if self.residual is None else y + self.residual.double()


def on(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a weight without changing its strides."""
    return weight.to(device) if weight.is_contiguous() else weight.t().to(device).t()


def make_layer(
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    *,
    tied: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: Activation = "none",
) -> Layer:
    weight = normal(k, n, seed=1) / k**0.5
    return Layer(
        x=normal(m, k, dtype=dtype),
        weight=weight.t().contiguous().to(dtype).t() if tied else weight.to(dtype),
        bias=normal(n, seed=2, dtype=dtype) if bias else None,
        residual=normal(m, n, seed=3) if residual else None,
        activation=activation,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [320, 768])
@pytest.mark.parametrize("m", ROWS)
def test_linear_is_accurate(subject: Subject, m: int, k: int, dtype: torch.dtype) -> None:
    layer = make_layer(m, k, 1031 if m < 65 else 131, dtype, bias=True)
    assert_close(layer.run(subject, dtype), layer.exact(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", ["", "bias", "gelu", "residual", "bias gelu", "bias residual", "bias gelu residual"])
def test_linear_fuses(subject: Subject, fused: str, tied: bool, dtype: torch.dtype) -> None:
    # K is no multiple of any block: what is behind its end must count as zero
    activation: Activation = "gelu_new" if "gelu" in fused else "none"
    bias, residual = "bias" in fused, "residual" in fused
    layer = make_layer(17, 100, 67, dtype, tied=tied, bias=bias, residual=residual, activation=activation)
    assert_close(layer.run(subject, torch.float32), layer.exact(), dtype)


@pytest.mark.parametrize("m", [1, 2])
def test_linear_spans_a_vocabulary(subject: Subject, m: int) -> None:
    layer = make_layer(m, 64, 50257, torch.float32, tied=True)
    assert_close(layer.run(subject, torch.float32), layer.exact(), torch.float32)


def test_gelu_holds_at_both_ends(subject: Subject) -> None:
    x = torch.tensor([-1e12, -100.0, -10.0, -1e-3, 0.0, 1e-3, 10.0, 100.0, 1e12])
    layer = Layer(x[:, None], torch.ones(1, 1), None, None, "gelu_new")
    torch.testing.assert_close(
        layer.run(subject, torch.float32)[:, 0], layer.exact()[:, 0].float(), rtol=2e-6, atol=1e-9
    )


def test_configurations_do_not_see_the_batch() -> None:
    assert linear_configuration(torch.bfloat16, 768, 3072) == linear_configuration(torch.bfloat16, 768, 3072)
    assert {linear_configuration(d, n, 768).block_m for d in DTYPES for n in (64, 768, 2304, 50257)} == {16}


def moved_rows(run: Callable[[torch.Tensor], torch.Tensor], rows: int) -> list[str]:
    """Name each company in which a row's bits differ from those it has among all ``rows``; ``run`` takes indices."""
    everyone = torch.arange(rows)
    expected = run(everyone)
    companies = {f"the first {m}": everyone[:m] for m in ROWS if m <= rows}
    companies |= {f"alone: {i}": everyone[i : i + 1] for i in (1, rows // 2, rows - 1)}
    companies["permuted"] = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
    companies["last seven reversed"] = everyone[-7:].flip(0)
    companies["eights reversed"] = everyone[: rows // 8 * 8].view(-1, 8).flip(0).flatten()
    return [name for name, index in companies.items() if not torch.equal(run(index), expected[index])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [320, 768])
def test_linear_is_invariant(subject: Subject, k: int, dtype: torch.dtype) -> None:
    layer = make_layer(129, k, 131, dtype, tied=True, bias=True, residual=True, activation="gelu_new")
    assert moved_rows(lambda index: layer.run(subject, dtype, index), 129) == []


def test_linear_ignores_its_neighbours(subject: Subject) -> None:
    layer = make_layer(17, 320, 131, torch.float32)
    expected = layer.run(subject, torch.float32)
    layer.x[1:] = 1e4 * normal(16, 320, seed=9)
    assert torch.equal(layer.run(subject, torch.float32)[0], expected[0])


def test_linear_ignores_where_its_rows_begin(subject: Subject) -> None:
    layer = make_layer(5, 101, 67, torch.float16, residual=True)  # 202 bytes a row: few rows begin aligned
    assert layer.residual is not None
    expected = layer.run(subject, torch.float32)
    x, residual = layer.x.to(subject.device), layer.residual.to(subject.device)
    prepared = subject.kernels.prepare(layer.weight.to(subject.device), None)
    for i in range(5):
        row = subject.kernels.linear(x[i:], prepared, residual=residual[i:], out_dtype=torch.float32)
        assert torch.equal(row.cpu(), expected[i:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_split_by_batch_size_is_caught(dtype: torch.dtype) -> None:
    layer = make_layer(33, 320, 131, dtype)
    x, weight = layer.x.to(GPU), layer.weight.to(GPU)

    def split_when_small(index: torch.Tensor) -> torch.Tensor:
        if len(index) >= 16:
            return linear(x[index], weight, None, out_dtype=torch.float32).cpu()
        half = linear(x[index][:, :160], weight[:160], None, out_dtype=torch.float32)
        return linear(x[index][:, 160:], weight[160:], None, residual=half, out_dtype=torch.float32).cpu()

    moved = moved_rows(split_when_small, 33)
    assert "the first 1" in moved
    assert "permuted" not in moved


# --- layer_norm -----------------------------------------------------------------------------------------------------


def run_layer_norm(subject: Subject, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    e = x.shape[1]
    weight, bias = normal(e, seed=1, dtype=dtype).to(subject.device), normal(e, seed=2, dtype=dtype).to(subject.device)
    return subject.kernels.layer_norm(x.to(subject.device), weight, bias, eps=1e-5, out_dtype=dtype).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", [5, 320, 768])
def test_layer_norm_is_accurate(subject: Subject, e: int, dtype: torch.dtype) -> None:
    x = 3 * normal(17, e) + 5
    weight, bias = normal(e, seed=1, dtype=dtype), normal(e, seed=2, dtype=dtype)
    expected = torch.nn.functional.layer_norm(x.double(), (e,), weight.double(), bias.double(), 1e-5)
    assert_close(run_layer_norm(subject, x, dtype), expected, dtype)


@pytest.mark.parametrize("e", [101, 320, 768])
def test_layer_norm_is_invariant(subject: Subject, e: int) -> None:
    x = normal(65, e)
    assert moved_rows(lambda index: run_layer_norm(subject, x[index], torch.float32), 65) == []
    whole = x.to(subject.device)
    expected = run_layer_norm(subject, whole, torch.float32)
    for i in (1, 2, 3):  # views that begin at odd addresses
        assert torch.equal(run_layer_norm(subject, whole[i:], torch.float32), expected[i:])


# --- attention ------------------------------------------------------------------------------------------------------

SLOTS, HEADS, LENGTH = 2, 2, 200


@dataclass(frozen=True)
class Tokens:
    """Some tokens of two slots, and the cache that they look into."""

    query: torch.Tensor  # [T, H, D]
    keys: torch.Tensor  # [S, H, C, D]
    values: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor

    def run(self, subject: Subject, index: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        device = subject.device
        return subject.kernels.attention(
            self.query[index].to(device),
            self.keys.to(device),
            self.values.to(device),
            slots=self.slots[index].to(device),
            positions=self.positions[index].to(device),
            scale=self.query.shape[2] ** -0.5,
        ).cpu()

    def exact(self) -> torch.Tensor:
        rows = []
        for query, slot, position in zip(self.query.double(), self.slots, self.positions, strict=True):
            keys, values = self.keys[slot, :, : position + 1].double(), self.values[slot, :, : position + 1].double()
            weight = torch.einsum("hd,hcd->hc", query, keys) * query.shape[1] ** -0.5
            rows.append(torch.einsum("hc,hcd->hd", weight.softmax(-1), values))
        return torch.stack(rows)


def make_tokens(dtype: torch.dtype, d: int = 64, capacity: int = 256, stale: float = 0.0) -> Tokens:
    """Return tokens at the edges of the key blocks, in a cache that holds ``stale`` behind its 200 positions."""
    cache = torch.full((2, SLOTS, HEADS, capacity, d), stale, dtype=dtype)
    cache[:, :, :, :LENGTH] = normal(2, SLOTS, HEADS, LENGTH, d, seed=1, dtype=dtype)
    positions = torch.tensor([0, 1, 15, 16, 62, 63, 64, 65, 127, 128, 198, 199])
    return Tokens(
        query=normal(2 * len(positions), HEADS, d, dtype=dtype),
        keys=cache[0],
        values=cache[1],
        slots=torch.arange(SLOTS).repeat_interleave(len(positions)),
        positions=positions.repeat(SLOTS),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 80])
def test_attention_is_accurate(subject: Subject, d: int, dtype: torch.dtype) -> None:
    tokens = make_tokens(dtype, d)
    assert_close(tokens.run(subject), tokens.exact(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_invariant(subject: Subject, dtype: torch.dtype) -> None:
    tokens = make_tokens(dtype)
    assert moved_rows(lambda index: tokens.run(subject, index), len(tokens.slots)) == []


@pytest.mark.parametrize("capacity", [200, 203, 512, 1024])
def test_attention_does_not_see_the_capacity(subject: Subject, capacity: int) -> None:
    expected = make_tokens(torch.float32).run(subject)
    assert torch.equal(make_tokens(torch.float32, capacity=capacity, stale=1e30).run(subject), expected)


def test_attention_reads_a_strided_query(subject: Subject) -> None:
    tokens = make_tokens(torch.float16)
    wide = torch.cat([tokens.query.flatten(1), tokens.query.flatten(1)], dim=1).to(subject.device)
    query = wide[:, : HEADS * 64].view(-1, HEADS, 64)
    strided = Tokens(query, tokens.keys, tokens.values, tokens.slots, tokens.positions)
    assert torch.equal(strided.run(subject), tokens.run(subject))


def test_attention_never_reads_behind_the_position() -> None:
    subject = Subject(TritonKernels(), GPU)
    clean = make_tokens(torch.float32)
    expected = clean.run(subject)
    for i in (0, 3, 5, 9):
        tokens = make_tokens(torch.float32)
        for cache in (tokens.keys, tokens.values):
            cache[0, :, int(tokens.positions[i]) + 1 :] = float("nan")
            cache[1] = float("nan")
        one = torch.tensor([i])
        assert torch.equal(tokens.run(subject, one), expected[one])


def test_attention_prefills_and_decodes_alike(subject: Subject) -> None:
    full = make_tokens(torch.float32)
    length = 70
    query = normal(length, HEADS, 64, seed=7)
    slots, positions = torch.zeros(length, dtype=torch.int64), torch.arange(length)
    at_once = Tokens(query, full.keys, full.values, slots, positions).run(subject)
    growing = make_tokens(torch.float32, stale=0.0)
    growing.keys[:], growing.values[:] = 0.0, 0.0
    for i in range(length):  # each step sees only what has been written by then
        growing.keys[0, :, i], growing.values[0, :, i] = full.keys[0, :, i], full.values[0, :, i]
        step = Tokens(query[i : i + 1], growing.keys, growing.values, slots[:1], positions[i : i + 1])
        assert torch.equal(step.run(subject)[0], at_once[i])


def test_attention_blocks_are_fixed() -> None:
    assert {attention_configuration(d).block_keys for d in (5, 64, 128)} == {64}


# --- best_two -------------------------------------------------------------------------------------------------------


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(torch.int32)


def awkward_rows(vocabulary: int) -> torch.Tensor:
    """Return rows with ties, signed zeros, infinities and NaN, at the row's ends and in its middle."""
    inf, nan = float("inf"), float("nan")
    middle, last = vocabulary // 2, vocabulary - 1
    cases: list[dict[int, float]] = [
        {},
        {0: 9.0, last: 9.0},
        {middle: 9.0, last: 9.0},
        {0: 9.0, 1: 9.0, last: 9.0},
        {0: inf},
        {0: inf, last: inf},
        {middle: -inf},
        {0: nan},
        {middle: -nan},
        {last: nan},
        {0: nan, last: nan},
        {last: 1e-45},
    ]
    rows = normal(len(cases), vocabulary, seed=3)
    for row, changes in zip(rows, cases, strict=True):
        for place, value in changes.items():
            row[min(place, last)] = value
    zeros = torch.zeros(4, vocabulary)
    zeros[1] = -0.0
    zeros[2, ::2] = -0.0
    zeros[3] = -1.0
    lone = torch.full((3, vocabulary), -inf)
    lone[1, middle] = 1.0
    lone[2] = nan
    return torch.cat([rows, -rows.abs(), zeros, lone])


@pytest.mark.parametrize("vocabulary", [1, 2, 1031, 4096, 50257])
def test_best_two_is_the_reference_bit_for_bit(vocabulary: int) -> None:
    scores = awkward_rows(vocabulary)
    result = TritonKernels().best_two(scores.to(GPU))
    expected = reference.best_two(scores)
    assert torch.equal(result.tokens.cpu(), expected.tokens)
    assert torch.equal(bits(result.scores), bits(expected.scores))
    assert torch.equal(result.hashes.cpu(), expected.hashes)
    assert torch.equal(result.finite.cpu(), expected.finite)


def test_best_two_says_what_it_should(subject: Subject) -> None:
    rows = [
        [1.0, 3.0, 2.0, 3.0],
        [0.0, -1.0, -0.0, -2.0],
        [float("nan"), 1.0, 2.0, 3.0],
        [4.0, float("-inf"), 5.0, 6.0],
        [float("-inf"), float("-inf"), 5.0, float("-inf")],
    ]
    result = subject.kernels.best_two(torch.tensor(rows).to(subject.device))
    assert result.tokens.tolist()[:2] == [[1, 3], [0, 2]]
    assert result.tokens.tolist()[3] == [3, 2]
    assert result.tokens.tolist()[4] == [2, 0]  # the winner is no runner-up, were all the rest -inf
    assert result.scores.tolist()[0] == [3.0, 3.0]
    assert ((result.tokens >= 0) & (result.tokens < 4)).all()
    assert result.finite.tolist() == [True, True, False, False, False]


def test_the_hash_sees_one_bit_and_not_the_company(subject: Subject) -> None:
    scores = normal(5, 1031).to(subject.device)
    hashes = subject.kernels.best_two(scores).hashes
    assert len(set(hashes.tolist())) == 5
    assert torch.equal(subject.kernels.best_two(scores[3:]).hashes, hashes[3:])
    scores.view(torch.int32)[3, 700] ^= 1
    assert (subject.kernels.best_two(scores).hashes != hashes).tolist() == [False, False, False, True, False]
