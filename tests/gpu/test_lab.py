"""The lab on a GPU: the vendor's libraries differ in larger calls, stablegen's kernels and policies do not."""

from __future__ import annotations

import pytest
from rich.console import Console

from stablegen.console.lab import render
from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.compared import promising_policies
from stablegen.lab.reports.lab import report_of

pytestmark = pytest.mark.gpu
DTYPES = ("float32", "float16", "bfloat16")


def test_sums_differ_on_both_devices() -> None:
    found = associativity.measure(count=1024)
    assert {one.device for one in found.sums} == {"cpu", "cuda:0"}
    assert min(one.results for one in found.sums) > 1


def test_products_differ_in_larger_calls_and_stablegens_do_not() -> None:
    found = matmul.measure(batches=(1, 2, 3, 10), rows=(1, 2, 16, 17, 64, 512))
    own = [one for one in found.comparisons if one.kernels == "stablegen"]
    assert {one.precision for one in own} == set(DTYPES)
    assert {(one.equal, one.problem) for one in own} == {(True, None)}
    moved = {one.precision for one in found.comparisons if one.kernels == "vendor" and one.equal is False}
    assert {"float32", "tf32"} <= moved
    assert {one.precision for one in found.searched if one.first is not None} >= set(DTYPES)
    assert [one for one in found.comparisons if not (one.alone and one.together)] == []
    render(report_of(matmul=found), Console(quiet=True))


def test_layers_differ_and_stablegens_do_not() -> None:
    found = layers.measure(random_weights=True, batches=(4, 16))
    assert {run.kernels for run in found.runs} == {"vendor", "stablegen"}
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
    assert {total.policy for total in one.policies} == {policy.spec for policy in promising_policies()}
    assert [total for total in one.policies if total.moved_steps or total.flipped] == []
