"""The lab on a GPU: the vendor's libraries differ in company, stablegen's kernels and policies do not."""

from __future__ import annotations

import pytest
from rich.console import Console

from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.report import render, report_of

pytestmark = pytest.mark.gpu
DTYPES = ("float32", "float16", "bfloat16")


def test_sums_differ_on_both_devices() -> None:
    found = associativity.measure(count=1024)
    assert {one.device for one in found.sums} == {"cpu", "cuda:0"}
    assert all(one.results > 1 for one in found.sums)


def test_products_differ_in_company_and_stablegens_do_not() -> None:
    found = matmul.measure(batches=(1, 2, 3, 10), rows=(1, 2, 16, 17, 64, 512))
    own = [one for one in found.companies if one.kernels == "stablegen"]
    assert {one.precision for one in own} == set(DTYPES)
    assert all(one.equal and one.problem is None for one in own)
    moved = {one.precision for one in found.companies if one.kernels == "vendor" and one.equal is False}
    assert {"float32", "tf32"} <= moved
    assert {one.precision for one in found.searched if one.first is not None} >= set(DTYPES)
    assert all(one.alone and one.together for one in found.companies)
    render(report_of(matmul=found), Console(quiet=True))


def test_layers_differ_and_stablegens_do_not() -> None:
    found = layers.measure(random_weights=True, batches=(4, 16))
    moved = {(run.kernels, run.dtype) for run in found.runs if run.first is not None}
    assert moved == {("vendor", dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_move_by_cause_and_not_under_the_policies(dtype: str) -> None:
    found = flips.measure(dtypes=(dtype,), batches=(1, 2, 3, 8), pads=(1, 16), tokens=8, count=4)
    (one,) = found.dtypes
    totals = {(total.cause, total.setting): total for total in one.totals}
    causes = {total.cause for total in one.totals if total.moved_steps}
    assert causes >= {"padding", "missing mask"}  # of a model this small, rows alone move float32 only
    assert totals["missing mask", 16].largest > totals["padding", 16].largest
    assert {total.policy for total in one.policies} == {"single", "padded:8", "invariant"}
    assert not any(total.moved_steps or total.flipped for total in one.policies)
