"""Sums in several orders: every dtype gives several results."""

from __future__ import annotations

import math

import pytest
import torch

from stablegen.errors import ParameterError
from stablegen.lab import associativity
from stablegen.lab.reports.associativity import AssociativityReport


def test_three_numbers_have_another_sum_from_the_right(sums: AssociativityReport) -> None:
    found = {(one.dtype, one.a): (one.from_left, one.from_right) for one in sums.triples}
    assert found["float64", 1e16] == (1.0, 0.0)
    assert found["float32", float(torch.tensor(1e16))] == (1.0, 0.0)
    assert found["float16", 3e4] == (1.0, 0.0)
    assert [*map(math.isnan, found["float16", math.inf])] == [True, True]
    assert {one.dtype for one in sums.triples if one.differs} == {"float16", "bfloat16", "float32", "float64"}


def test_every_dtype_gives_several_results_all_near_the_exact_one(sums: AssociativityReport) -> None:
    assert {one.dtype for one in sums.sums} == {"float16", "bfloat16", "float32", "float64"}
    for one in sums.sums:
        digits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[one.dtype]
        assert one.results > 1, one.dtype
        assert one.spread > 0
        assert max(found.error for found in one.sums) < 1024 * 64 * 2.0**-digits


def test_orders_are_what_they_say() -> None:
    big = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert associativity.one_by_one(big[None]).tolist() == [1.0]
    assert associativity.halving(big).item() == 2.0
    assert associativity.one_by_one(torch.tensor([[1.0, 1e8, 1.0, -1e8]])).tolist() == [0.0]


@pytest.mark.parametrize("count", [0, 100, 1000, -256])
def test_a_sum_of_no_power_of_two_is_refused(count: int) -> None:
    with pytest.raises(ParameterError, match="a power of two"):
        associativity.measure(device="cpu", count=count)
