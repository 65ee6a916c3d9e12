"""Models and clients that the tests of ``generate`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from generating import POLICIES, Computed, emptied, tokenizer
from support import TINY, small_gpt2
from transformers import (
    GPT2LMHeadModel,
)

import stablegen
from stablegen.client import Client


@pytest.fixture(scope="module")
def model() -> Any:
    return GPT2LMHeadModel.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def small() -> Any:
    """Return a model whose random weights are large enough for answers of many tokens."""
    return small_gpt2(initializer_range=0.3)


@pytest.fixture(scope="module")
def clients(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """Return a client of each policy around the small model."""
    with ExitStack() as opened:
        yield {
            policy: opened.enter_context(
                Client(small, tokenizer(), policy=policy, cache_dir=tmp_path_factory.mktemp("cache"))
            )
            for policy in POLICIES
        }


@pytest.fixture(scope="module")
def single(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(model, tokenizer(), policy="single", cache_dir=tmp_path_factory.mktemp("cache")) as made:
        yield made


@pytest.fixture
def asking(single: Client) -> Client:
    """Return a client of policy ``single`` around tiny-gpt2, its cache empty."""
    return emptied(single)


@pytest.fixture
def anew(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Return what makes clients with a cache of their own, closed when the test is over."""
    with ExitStack() as opened:
        made: list[Client] = []

        def make(model: Any, words: Any = None, **settings: Any) -> Client:
            given: dict[str, Any] = {"policy": "single", "cache_dir": tmp_path / f"cache-{len(made)}"} | settings
            made.append(opened.enter_context(Client(model, words, **given)))
            return made[-1]

        yield make


@pytest.fixture
def alone_in_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder without a configuration, and in an environment without one."""
    for name in ("POLICY", "ON_RISK", "APP", "CONFIG", "CACHE_DIR", "DTYPE", "DEVICE", "MODEL", "ACCEPTED_RISK"):
        monkeypatch.delenv(f"STABLEGEN_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stabilized(alone_in_the_world: Path) -> Iterator[Any]:
    """Return a stabilized GPT-2 with its tokenizer."""
    stable = stablegen.stabilize(small_gpt2(), tokenizer(), cache_dir=alone_in_the_world / "cache")
    yield stable
    if "stablegen" in vars(stable):
        stablegen.restore(stable)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    from stablegen.engine.invariant.engine import InvariantEngine
    from stablegen.engine.transformers.engine import TransformersEngine

    seen = Computed()

    def watch(kind: Any) -> None:
        generate = kind.generate

        def watched(engine: Any, batch: Any, *rest: Any, **named: Any) -> Iterator[Any]:
            seen.keys.extend(asked.key for _, asked in batch.requests if asked.model.digest != "self-check")
            return generate(engine, batch, *rest, **named)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, "generate", watched)

    watch(TransformersEngine)
    watch(InvariantEngine)
    return seen
