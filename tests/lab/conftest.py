"""What the lab's tests share: a small model, and one report of each experiment."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import pytest
from support import small_directory

from stablegen import cli
from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.reports.associativity import AssociativityReport
from stablegen.lab.reports.flips import FlipsReport
from stablegen.lab.reports.layers import LayersReport
from stablegen.lab.reports.matmul import MatmulReport


@pytest.fixture(scope="session", autouse=True)
def small_model() -> Iterator[str]:
    """Return the directory of a GPT-2 with few random weights."""
    directory = str(small_directory())
    # experiments collect garbage between models; what libraries hold is not searched each time
    gc.freeze()
    yield directory
    gc.unfreeze()


@pytest.fixture(scope="session")
def sums() -> AssociativityReport:
    return associativity.measure(device="cpu", count=1024)


@pytest.fixture(scope="session")
def products() -> MatmulReport:
    return matmul.measure(
        shape=(32, 256, 512),
        batches=(1, 2, 3),
        rows=(1, 2, 16, 32),
        precisions=("float32", "tf32"),
        device="cpu",
        search=False,
    )


@pytest.fixture(scope="session")
def streams() -> LayersReport:
    return layers.measure(dtypes=("float32",), batches=(2, 4), length=5, device="cpu")


@pytest.fixture(scope="session")
def flipped(small_model: str) -> FlipsReport:
    """Return what flips in a small model: in float32 its scores move, and only another text flips its tokens."""
    return flips.measure(
        model=small_model,
        dtypes=("float32",),
        batches=(1, 2, 3),
        pads=(1, 16),
        tokens=10,
        count=3,
        policies=("single", "padded:4", "invariant"),
        device="cpu",
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command in this process; return its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["stablegen", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert isinstance(left.value.code, int)
        return left.value.code

    return call
