"""Set up what must be decided before any test module is imported, and what the modules share."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from comparisons import Comparison

    from stablegen.engine.base import Engine

HAS_GPU = Path("/dev/nvidia0").exists()
MINI_GPT2 = "STABLEGEN_TEST_MINI_GPT2"
"""Environment variable: the directory of a trained GPT-2 with the real vocabulary."""
RESULTS = "STABLEGEN_TEST_RESULTS"
"""Environment variable: the folder for one file of results a device."""

# Threads that wait for each other on a busy machine take minutes; one is enough for models this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton asks once, when it is imported: without a GPU its kernels run in the interpreter.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: there is no /dev/nvidia0"))


_PASSED: dict[Any, Any] = {}
"""Self-checks that passed in this process, by model, numerics and shape: each takes seconds, and repeats itself."""


@pytest.fixture(autouse=True)
def shared_self_checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every cache know the self-checks that passed in other tests; ``fresh_checks`` marks those that must not."""
    from stablegen.store.cache import Cache

    find, keep = Cache.self_check, Cache.put_self_check
    is_fresh = request.node.get_closest_marker("fresh_checks") is not None

    def self_check(cache: Any, model: Any, numerics: Any, shape: Any) -> Any:
        return find(cache, model, numerics, shape) or _PASSED.get((model.canonical, numerics.digest, shape))

    def put_self_check(cache: Any, model: Any, check: Any) -> None:
        keep(cache, model, check)
        if check.passed and check.checks:
            _PASSED[model.canonical, check.numerics.digest, check.shape] = check

    if not is_fresh:
        monkeypatch.setattr(Cache, "self_check", self_check)
        monkeypatch.setattr(Cache, "put_self_check", put_self_check)


@pytest.fixture(scope="session")
def mini_gpt2() -> str:
    """Return the directory of mini-gpt2."""
    path = os.environ.get(MINI_GPT2)
    if not path:
        pytest.skip(f"{MINI_GPT2} does not name the directory of mini-gpt2")
    return path


@pytest.fixture(scope="session")
def comparisons() -> Iterator[list[Comparison]]:
    """Gather what was compared; write it at the end where ``STABLEGEN_TEST_RESULTS`` names a folder."""
    gathered: list[Comparison] = []
    yield gathered
    folder = os.environ.get(RESULTS)
    if folder:
        _write_results(Path(folder), gathered)


@pytest.fixture
def chained_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply as tensor cores do, in a chain over ascending k.

    It asks numpy's BLAS, which picks its order by the tile's shape: on some processors other tiles give other bits.
    """
    if HAS_GPU:
        return
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(_: object, a: Any, b: Any, d: Any, *__: object) -> Any:
        total = d.data.copy()
        for left, right in zip(a.data.astype(total.dtype).T, b.data.astype(total.dtype), strict=True):
            total += left[:, None] * right[None, :]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def compare(request: pytest.FixtureRequest, comparisons: list[Comparison]) -> Callable[[str, str, Engine], Comparison]:
    """Return what begins the comparison of one property, with one model and engine."""
    from comparisons import Comparison

    def begin(name: str, model: str, engine: Any) -> Comparison:
        numerics = engine.numerics
        device = numerics.device_model if numerics.device == "cuda" else "cpu"
        test = request.node.nodeid.split("::")[-1]
        comparison = Comparison(test, name, Path(model).name, numerics.policy, numerics.dtype, device)
        comparisons.append(comparison)
        return comparison

    return begin


def _write_results(folder: Path, gathered: list[Comparison]) -> None:
    from invariance import slug_of

    from stablegen.machine.plan import version_of

    folder.mkdir(parents=True, exist_ok=True)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    for device in {comparison.device for comparison in gathered}:
        mine = [comparison for comparison in gathered if comparison.device == device]
        promised = [comparison for comparison in mine if comparison.policy != "native"]
        content = {
            "device": device,
            "python": platform.python_version(),
            "versions": {name: version_of(name) for name in ("torch", "triton", "transformers")},
            "rows": sum(comparison.rows for comparison in promised),
            "differing": sum(comparison.differing for comparison in promised),
            "native_rows": sum(comparison.rows for comparison in mine if comparison.policy == "native"),
            "native_differing": sum(comparison.differing for comparison in mine if comparison.policy == "native"),
            "comparisons": [comparison.to_dict() for comparison in mine],
        }
        name = f"invariance-{slug_of(device)}{'-' if worker else ''}{worker}.json"
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
