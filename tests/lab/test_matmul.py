"""Matrix products alone and in larger calls: the vendor's move, stablegen's do not."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from stablegen.errors import ParameterError
from stablegen.kernels.reference import ReferenceKernels
from stablegen.lab import matmul
from stablegen.lab.bits import same_bits
from stablegen.lab.reports.matmul import Comparison, MatmulReport, Way, kernel_lines, table_of
from stablegen.lab.reports.wording import SAME_BITS, Cell, short_number


def measure(**asked: Any) -> MatmulReport:
    small: dict[str, Any] = {"shape": (8, 8, 8), "batches": (1,), "rows": (1,), "precisions": ("float32",)}
    return matmul.measure(**(small | {"search": False, "device": "cpu"} | asked))


def test_stablegens_kernels_give_the_same_bits_in_any_call(products: MatmulReport) -> None:
    own = [one for one in products.comparisons if one.kernels == "stablegen"]
    assert {(one.way, one.count) for one in own} == {
        *(("stacked", count) for count in (1, 2, 3)),
        *(("row", count) for count in (1, 2, 16, 32)),
    }
    assert {(one.equal, one.max_abs, one.l2, one.allclose) for one in own} == {(True, 0.0, 0.0, True)}


def test_the_vendors_row_moves_in_larger_calls_here(products: MatmulReport) -> None:
    rows = [one for one in products.comparisons if (one.kernels, one.way) == ("vendor", "row")]
    assert rows[0].equal  # one row is the row alone
    assert any(not one.equal and one.max_abs and one.l2 and one.l2 >= one.max_abs for one in rows)


def test_a_precision_that_the_device_lacks_is_named(products: MatmulReport) -> None:
    assert set(products.unavailable) == {"tf32"}
    assert {one.precision for one in products.comparisons} == {"float32"}


def test_torchs_flag_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    measure()
    assert torch.get_float32_matmul_precision() == before


def test_products_that_would_take_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "LIMIT", 0.0)
    vendor = [one for one in measure(batches=(2,)).comparisons if one.kernels == "vendor" and one.way != "row"]
    assert {one.way for one in vendor} == {"batched", "stacked"}
    assert all(one.problem and "would take about" in one.problem for one in vendor)
    assert {one.equal for one in vendor} == {None}


def test_products_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_fitting", lambda *_: 2)
    found = measure(batches=(2, 3))
    problems = {(one.count, one.problem) for one in found.comparisons if one.way == "batched"}
    assert problems == {(2, None), (3, "does not fit into memory")}


def test_the_search_finds_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matmul.SEARCHED, "cpu", ((4, 256, 512),))
    by_way = {one.way: one for one in measure(search=True).searched}
    assert set(by_way) == set(get_args(Way))
    row = by_way["row"]
    assert row.first in row.counts
    assert row.max_abs > 0 and row.moved <= len(row.counts)


def test_a_product_adds_the_partial_sums_of_a_kernel_set() -> None:
    kernels = ReferenceKernels()
    weight, x = torch.randn(16, 8), torch.randn(3, 16)
    layer = kernels.prepare(weight, None)
    torch.testing.assert_close(matmul.product(kernels, x, layer), x @ weight)


def test_bits_are_compared_and_not_numbers() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("ampere_sgemm_32x32_sliced1x4_nn", "ampere_sgemm_32x32_sliced1x4_nn"),
        ("void cutlass::Kernel2<cutlass_80_sgemm_128x32>(cutlass_80_sgemm_128x32::Params)", "cutlass_80_sgemm_128x32"),
        (
            "void splitKreduce_kernel<32, int, float>(cublasSplitKParams<float>, float const*)",
            "splitKreduce_kernel",
        ),
        ("std::enable_if<!(false), void>::type gemvx::kernel<int, P<A<float>, B> >(P<int>)", "gemvx::kernel"),
    ],
)
def test_a_kernel_is_called_by_its_own_name(name: str, short: str) -> None:
    assert matmul.short_name(name) == short


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": (8, 8)}, "shape=8,8"),
        ({"shape": (8, 0, 8)}, "shape=8,0,8"),
        ({"batches": ()}, "batch="),
        ({"rows": (0,)}, "rows=0"),
        ({"precisions": ("float8",)}, "precision 'float8'"),
        ({"precisions": ()}, "precision ''"),
    ],
)
def test_sizes_that_are_not_sizes_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        matmul.measure(device="cpu", **given)


# --- tables -----------------------------------------------------------------------------------------------------------


def compared(count: int, max_abs: float | None = 0.0, **more: Any) -> Comparison:
    fields: dict[str, Any] = {"kernels": "vendor", "precision": "float32", "way": "row", "count": count}
    return Comparison(**(fields | {"max_abs": max_abs, "allclose": True, "equal": max_abs == 0.0} | more))


def test_counts_of_the_same_figures_share_a_row(products: MatmulReport) -> None:
    found = [compared(1), compared(2), compared(3, 0.5), compared(4, 0.5, allclose=False)]
    found.append(compared(5, None, problem="does not fit into memory"))
    table = table_of(products.model_copy(update={"comparisons": tuple(found)}), "row", short_number)
    assert table.head == ["vendor float32"]
    assert table.rows == [
        ("1, 2", [SAME_BITS]),
        ("3", [Cell("0.5", moved=True)]),
        ("4", [Cell("0.5, not allclose", moved=True)]),
        ("5", [Cell("does not fit into memory")]),
    ]


def test_kernels_are_listed_once_for_all_counts_that_ran_them(products: MatmulReport) -> None:
    found = [compared(count, alone=("a",), together=("b" if count > 2 else "a",)) for count in (1, 2, 4, 8)]
    lines = kernel_lines(products.model_copy(update={"comparisons": tuple(found)}))
    assert [(line.counts, line.alone, line.together) for line in lines] == [
        ("1, 2", ("a",), ("a",)),
        ("4, 8", ("a",), ("b",)),
    ]
