"""A store, a source with its engine, a policy and an architecture, each added from outside the package in one piece."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from support import TINY, numerics, save, small_gpt2

import stablegen
from stablegen import Batch, Client, Engine, ExecutionPolicy, Generated, Limits, ModelIdentity, Numerics, Request
from stablegen.config import load_settings
from stablegen.core import policy as policies
from stablegen.core.record import Composition
from stablegen.core.trace import Trace
from stablegen.engine.base import NO_ANSWERS, Answers, Listener, Observer
from stablegen.engine.invariant import architectures
from stablegen.errors import PolicyError, TeacherForcingError
from stablegen.tokenizer import Tokenizer


class FolderStore:
    """A store of one file for each entry, as somebody else might write it; names are in the order of their writing."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder
        self._names: list[str] = []

    def _file(self, name: str) -> Path:
        return self._folder / name.encode().hex()[-200:]

    def get(self, name: str) -> bytes | None:
        return self._file(name).read_bytes() if name in self._names else None

    def put(self, entries: Mapping[str, bytes]) -> None:
        for name, data in entries.items():
            self._file(name).write_bytes(data)
            if name not in self._names:
                self._names.append(name)

    def names(self, prefix: str = "") -> Sequence[str]:
        return [name for name in self._names if name.startswith(prefix)]

    def size(self) -> int:
        return sum(self._file(name).stat().st_size for name in self._names)

    def clear(self) -> None:
        self._names.clear()

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_store(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with Client.from_pretrained(policy="invariant", device="cpu", store=store) as client:
        assert isinstance(store, stablegen.Store)
        first = client.complete("Hello", max_new_tokens=3)
        again = client.complete("Hello", max_new_tokens=3)
        assert (first.cached, again.cached, again.verdict.status) == (False, True, "exact")
        assert client.cache.stats().records == 1
        assert client.cache.where == str(tmp_path)


class EchoEngine(Engine):
    """Answers with the prompt's own tokens, backwards; it cannot score given tokens."""

    def __init__(self, under: Numerics) -> None:
        self.numerics = under
        self.limits = Limits(context=64)

    def generate(
        self,
        batch: Batch,
        observe: Observer | None = None,
        listen: Listener | None = None,
        *,
        begun: Answers = NO_ANSWERS,
    ) -> Generator[Generated, None, None]:
        for slot, request in batch.requests:
            steps = request.params.max_new_tokens
            tokens = (request.prompt_ids[::-1] * steps)[:steps]
            trace = Trace.of(tokens, [0] * steps, [9.0] * steps, [1.0] * steps, range(steps))
            where = Composition(len(batch.rows), len(batch.requests), slot, batch.shape)
            yield Generated(request, trace, "length", where, 0.0)


class EchoSource(stablegen.Source):
    identity = ModelIdentity(source="digest", digest="e" * 64, name="echo")
    context = 64
    vocabulary = 4096

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(TINY / "tokenizer.json", "7" * 64)

    def check(self, policy: ExecutionPolicy) -> None:
        """Run under any policy."""

    def plan(self, policy: ExecutionPolicy, dtype: str, device: str) -> Numerics:
        return numerics(policy=policy.spec, engine="echo", attention=None)

    def start(self, numerics: Numerics) -> Engine:
        return EchoEngine(numerics)


def test_a_source_and_its_engine() -> None:
    with Client(EchoSource(), store=stablegen.MemoryStore()) as client:
        answer = client.complete("Hello", max_new_tokens=2)
        assert answer.token_ids == (client.request("Hello", max_new_tokens=2).prompt_ids[::-1] * 2)[:2]
        assert client.complete("Hello", max_new_tokens=2).cached
        with pytest.raises(TeacherForcingError, match="EchoEngine cannot score given tokens"):
            client.calibrate([answer])
        with pytest.raises(stablegen.UnsupportedParameterError, match="EchoSource"):
            client.generate()


@dataclass(frozen=True, slots=True)
class LongestFirst(ExecutionPolicy):
    """One row after another, the longest prompt first."""

    name = form = "longest-first"
    accepted = "'longest-first'"

    @classmethod
    def parse(cls, argument: str | None) -> Self:
        return cls()

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        ordered = sorted(requests, key=lambda request: -len(request.prompt_ids))
        return [Batch((request,), self.shape_of(request, limits)) for request in ordered]


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_REGISTERED", dict(policies._REGISTERED))
    monkeypatch.setattr(architectures, "_REGISTERED", dict(architectures._REGISTERED))


@pytest.mark.usefixtures("own_registries")
def test_a_policy_that_an_existing_engine_runs(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="unknown policy 'longest-first'"):
        stablegen.load_policy("longest-first")
    stablegen.register_policy(LongestFirst)
    assert "longest-first" in policies.policy_forms()
    with pytest.raises(PolicyError, match="'longest-first'"):
        stablegen.load_policy("shortest-first")
    assert load_settings(policy="longest-first").settings.policy == "longest-first"
    with (
        Client.from_pretrained(policy="longest-first", device="cpu", cache_dir=tmp_path) as client,
        Client.from_pretrained(policy="single", device="cpu", store=stablegen.MemoryStore()) as single,
    ):
        ours, theirs = (one.complete(["Hi", "Hello there"], max_new_tokens=3) for one in (client, single))
        assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in theirs]
        assert [answer.verdict.status for answer in ours] == ["exact", "exact"]
        assert client.numerics.policy == "longest-first"
        assert client.self_check().passed


@pytest.mark.usefixtures("own_registries")
def test_two_policies_of_one_name_are_refused() -> None:
    class Other(LongestFirst):
        name = "single"

    with pytest.raises(PolicyError, match="two policies are named 'single'"):
        stablegen.register_policy(Other)


@pytest.mark.usefixtures("own_registries")
def test_an_architecture_of_the_batch_invariant_engine(tmp_path: Path) -> None:
    directory = save(small_gpt2(), tmp_path / "model")
    with Client.from_pretrained(directory, policy="invariant", device="cpu", store=stablegen.MemoryStore()) as client:
        expected = client.complete("Hello there", max_new_tokens=4)
    content: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(content | {"model_type": "ring"}), encoding="utf-8")
    with pytest.raises(PolicyError, match="the model is 'ring', not GPT-2"):
        Client.from_pretrained(directory, policy="invariant", device="cpu", store=stablegen.MemoryStore())
    known = architectures.find_architecture(content)
    ring = architectures.Architecture(model_type="ring", title="Ring", problem=known.problem, build=known.build)
    stablegen.register_architecture(ring)
    with Client.from_pretrained(directory, device="cpu", store=stablegen.MemoryStore()) as client:
        answer = client.complete("Hello there", max_new_tokens=4)
        assert client.policy.spec == "invariant"  # nobody named it: the model can run under it
        assert (answer.trace, answer.verdict.status) == (expected.trace, "exact")
