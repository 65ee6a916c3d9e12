"""A session's life around a fake model: changed, closed, shared by threads, bounded; nothing here loads a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeSource, by_key
from support import near_tie, numerics, python, record, request

from stablegen.client import Client
from stablegen.config import load_settings
from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Limits, load_policy
from stablegen.core.request import ModelIdentity
from stablegen.engine.base import NO_ANSWERS, Answers, Engine, Generated, Listener, Observer
from stablegen.errors import (
    CacheDirectoryError,
    ClientClosedError,
    ConfigError,
    EngineError,
    MarginWarning,
    ModelError,
    ParameterError,
    StablegenError,
    TeacherForcingError,
    UncachedWarning,
)
from stablegen.guard.verdicts import flip_probabilities, judge
from stablegen.machine.device import Device
from stablegen.session.intake import KNOWN_OBJECTS
from stablegen.sources import checkpoint
from stablegen.store.memory import MemoryStore

OTHER = ModelIdentity(source="digest", digest="a" * 64, name="other")
NEW = 3


def made(source: FakeSource | None = None, **settings: Any) -> Client:
    return Client(source or FakeSource(), store=MemoryStore(), **({"policy": "invariant"} | settings))


class SlowEngine(FakeEngine):
    """Waits in the middle of a batch until it is told to go on."""

    def __init__(self, under: Numerics) -> None:
        super().__init__(under)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def generate(
        self,
        batch: Batch,
        observe: Observer | None = None,
        listen: Listener | None = None,
        *,
        begun: Answers = NO_ANSWERS,
    ) -> Generator[Generated, None, None]:
        done = super().generate(batch, observe, listen, begun=begun)
        if any(asked.model.digest != "self-check" for _, asked in batch.requests):
            self.entered.set()
            assert self.go_on.wait(60)
            assert not self.closed, "closed while it generates"
        yield from done


def while_generating(source: FakeSource, client: Client, action: Callable[[SlowEngine], None]) -> Any:
    """Return what a thread's call gave during which ``action`` ran in this one."""
    client.self_check()
    engine: SlowEngine = source.started[0]
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(client.complete, ["one", "two"], max_new_tokens=NEW)
        assert engine.entered.wait(60)
        side = pool.submit(action, engine)
        engine.go_on.set()
        side.result(60)
        return call.result(60)


def test_a_weight_changed_while_another_thread_generates_leaves_its_call_alone() -> None:
    source = FakeSource(SlowEngine)
    with made(source) as client:

        def change(_: SlowEngine) -> None:
            source.identity = OTHER
            assert client.request("one", max_new_tokens=NEW).model == OTHER

        done = while_generating(source, client, change)
        assert [one.record.request.model.name for one in done] == ["fake", "fake"]
        source._made = FakeEngine
        after = client.complete("one", max_new_tokens=NEW)
        assert (after.cached, after.record.request.model) == (False, OTHER)
        assert [engine.closed for engine in source.started] == [True, False]


def test_closing_waits_for_the_thread_that_generates() -> None:
    source = FakeSource(SlowEngine)
    client = made(source)
    done = while_generating(source, client, lambda engine: threading.Timer(0.05, client.close).start())
    client.close()
    assert [one.token_ids for one in done] == [
        tuple(by_key(one.record.request, step) for step in range(NEW)) for one in done
    ]
    assert [engine.closed for engine in source.started] == [True]


def test_a_callback_may_close_the_client() -> None:
    source = FakeSource()
    client = made(source)
    closed: list[bool] = []

    def close(*_: Any) -> None:
        client.close()
        closed.append(source.started[0].closed)

    done = client.complete("one", max_new_tokens=NEW, progress=close)
    assert (done.verdict.status, closed, source.started[0].closed) == ("exact", [False], True)
    with pytest.raises(ClientClosedError):
        client.complete("one", max_new_tokens=NEW)


def test_a_hit_that_another_thread_closes_under_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    client = made()
    client.complete("one", max_new_tokens=NEW)
    get, entered, closed = client.cache.get, threading.Event(), threading.Event()

    def slow(key: str) -> Any:
        entered.set()
        assert closed.wait(60)
        return get(key)

    monkeypatch.setattr(client.cache, "get", slow)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.complete, "one", max_new_tokens=NEW)
        assert entered.wait(60)
        client.close()
        closed.set()
        with pytest.raises(ClientClosedError):
            call.result(60)


def test_a_client_that_cannot_be_made_leaves_the_store_open() -> None:
    store = MemoryStore()
    with pytest.raises(ConfigError, match="a tokenizer"):
        Client(FakeSource(), object(), store=store)
    store.put({"name": b"bytes"})
    assert store.get("name") == b"bytes"


def test_settings_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache_dir=.*beside a store"):
        Client(FakeSource(), store=MemoryStore(), cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"kv_cache_size=.*beside a source"):
        Client(FakeSource(), store=MemoryStore(), kv_cache_size=2**20)
    with pytest.raises(ConfigError, match="given twice"):
        Client(FakeSource(), settings=load_settings(), policy="single")


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary", encoding="utf-8")
    with pytest.raises(CacheDirectoryError):
        Client.from_pretrained(cache_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["diary.txt"]


def test_a_source_starts_on_the_device_that_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "find_device", lambda name, dtype: Device(name, "a GPU"))
    source = checkpoint.CheckpointSource.open(None)
    policy = load_policy("single")
    first, second = (source.plan(policy, "float32", device) for device in ("cuda:0", "cuda:1"))
    assert source.plan(policy, "float32", "cuda:0") is first
    assert [source._device_of(planned) for planned in (first, second)] == ["cuda:0", "cuda:1"]


def test_nothing_to_teacher_force_is_nothing() -> None:
    with made(policy="native") as client:
        assert client.score_rows([]) == {}
        with pytest.raises(ParameterError, match="sizes"):
            client.calibrate([], sizes=(0,))


def test_a_model_changed_while_a_call_waits_is_named() -> None:
    source = FakeSource(SlowEngine)
    with made(source) as client:

        def change(_: SlowEngine) -> None:
            state = client.session.refresh()
            source.identity = OTHER
            asked = state.intake.ask("three", state.intake.params({"max_new_tokens": NEW}))
            with pytest.raises(ModelError, match="another thread changed the model while this call waited"):
                client.session.run([asked], state)

        while_generating(source, client, change)


def test_a_callback_that_changes_the_model_under_its_own_run_is_named() -> None:
    source = FakeSource()
    with made(source) as client:

        def change(*_: Any) -> None:
            source.identity = OTHER
            client.complete("another", max_new_tokens=NEW)

        with pytest.raises(EngineError, match="changed while this thread was generating"):
            client.complete("one", max_new_tokens=NEW, progress=change)


VERBS: dict[str, Callable[[Client], object]] = {
    "complete": lambda client: client.complete("one", max_new_tokens=NEW),
    "complete many": lambda client: client.complete(["one"], max_new_tokens=NEW),
    "score": lambda client: client.score("one", " two"),
    "request": lambda client: client.request("one"),
    "make_request": lambda client: client.make_request([1, 2], {}),
    "run": lambda client: client.run([]),
    "verify": lambda client: client.verify([]),
    "calibrate": lambda client: client.calibrate([]),
    "score_rows": lambda client: client.score_rows([]),
    "self_check": lambda client: client.self_check(),
    "inspect": lambda client: client.inspect("f" * 64),
    "find_key": lambda client: client.find_key("f"),
    "judge": lambda client: client.judge(record()),
    "calibration": lambda client: client.calibration(record()),
    "warnings": lambda client: client.warnings(),
    "cache": lambda client: client.cache,
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_closed_client_says_so(verb: str) -> None:
    client = made()
    client.complete("one", max_new_tokens=NEW)
    client.close()
    client.close()
    with pytest.raises(ClientClosedError, match=r"this client was closed.*[Mm]ake a new one"):
        VERBS[verb](client)


# -- warnings ------------------------------------------------------------------------------------------------------


def shaky(**settings: Any) -> Client:
    """Return a client whose cached answer of 'one' is at risk, and whose engine's margins are narrow."""
    client = made(FakeSource(lambda under: FakeEngine(under, margin=0.0)), **({"policy": "native"} | settings))
    client.complete("one", max_new_tokens=NEW)
    client.score("one", " two")
    return client


CALLS: dict[str, Callable[[Client], object]] = {
    "complete": lambda client: client.complete("one", max_new_tokens=NEW),
    "complete many": lambda client: client.complete(["one"], max_new_tokens=NEW),
    "score": lambda client: client.score("one", " two"),
    "score many": lambda client: client.score(["one"], [" two"]),
    "run": lambda client: client.run([client.request("one", max_new_tokens=NEW)]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_margin_warning_points_at_the_callers_line(call: str) -> None:
    with shaky() as client, pytest.warns(MarginWarning, match="at_risk") as caught:
        CALLS[call](client)
    line = CALLS[call].__code__.co_firstlineno
    assert [(Path(one.filename), one.lineno) for one in caught] == [(Path(__file__), line)]


def test_a_warning_that_something_is_not_cached_points_at_the_callers_line() -> None:
    with made() as client, pytest.warns(UncachedWarning) as caught:
        [client.complete("one", do_sample=True, max_new_tokens=NEW) for _ in range(2)]
    assert [Path(one.filename) for one in caught] == [Path(__file__)]


# -- what grows ----------------------------------------------------------------------------------------------------


def test_what_a_client_remembers_is_bounded() -> None:
    with made() as client:
        for number in range(2000):
            client.make_request(
                [1, 2],
                {"max_new_tokens": 1 + number % 200},
                logits_processors={f"processor {number}": object()},
                stopping_criteria={f"criterion {number}": lambda _: object()},
            )
            client.request("one", max_new_tokens=1 + number % 200)
        own = client.session.own
        assert (len(own.processors), len(own.criteria)) == (KNOWN_OBJECTS, KNOWN_OBJECTS)
        assert len(client.session.refresh().intake._budgets) <= KNOWN_OBJECTS
        assert own.processors.get("processor 1999") is not None
        assert own.processors.get("processor 0") is None


# -- engines that cannot, records that are odd ---------------------------------------------------------------------


class NoFollow(FakeEngine):
    def __init__(self, under: Numerics) -> None:
        super().__init__(under, limits=Limits(context=256))

    follow = Engine.follow


def test_an_engine_that_cannot_teacher_force_is_named() -> None:
    with made(FakeSource(NoFollow)) as client:
        answer = client.complete("one", max_new_tokens=NEW)
        with pytest.raises(TeacherForcingError, match="NoFollow cannot score given tokens"):
            client.calibrate([answer])
        with pytest.raises(TeacherForcingError, match="NoFollow cannot score given tokens"):
            client.score_rows([answer])
        assert client.verify(answer).verdict.status == "exact"  # it is recomputed


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float64"])
def test_an_unknown_dtype_is_judged_unknown(dtype: str) -> None:
    odd = record(numerics=numerics(dtype=dtype))
    assert odd.trace is not None
    assert flip_probabilities(odd.trace, odd.numerics, numerics()) is None
    verdict = judge(odd, numerics(), check=None)
    assert (verdict.status, dtype in verdict.reason) == ("unknown", True)
    with made(policy="native") as client:
        asked = client.request("one", max_new_tokens=NEW)
        client.cache.put([record(asked, numerics=numerics(dtype=dtype))])
        with pytest.warns(MarginWarning, match=f"unknown: .*{dtype}"):
            assert client.complete("one", max_new_tokens=NEW).verdict.status == "unknown"
        assert client.verify(client.inspect(asked.key)).verdict.status == "diverged"


def test_a_policy_that_is_not_known_here_promises_nothing() -> None:
    old = record(numerics=numerics(policy="of-a-plugin"))
    assert judge(old, numerics(policy="of-a-plugin"), check=None).status == "stable"
    assert judge(near_tie(old), numerics(), check=None).status == "at_risk"


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[apps.golden]\npolicy = "native"\non_risk = "serve"\naccepted_risk = 0.25\n'
    (tmp_path / "stablegen.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("golden")
def test_an_apps_settings_hold_however_a_client_is_made() -> None:
    with Client(FakeSource(), app="golden", store=MemoryStore()) as client:
        assert (client.policy.spec, client.on_risk, client.accepted_risk) == ("native", "serve", 0.25)
        assert client.app == "golden"
    with Client(FakeSource(), app="golden", on_risk="raise", store=MemoryStore()) as client:
        assert (client.policy.spec, client.on_risk) == ("native", "raise")
    with pytest.raises(ConfigError, match="unknown app 'silver'"):
        Client(FakeSource(), app="silver", store=MemoryStore())


def test_a_misspelt_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'polcy'.*policy"):
        Client(FakeSource(), store=MemoryStore(), polcy="single")  # type: ignore[call-arg]


def test_a_source_has_its_own_tokenizer() -> None:
    with pytest.raises(ConfigError, match="a tokenizer was given beside a source"):
        Client(FakeSource(), object(), store=MemoryStore())


def test_numerics_that_turn_out_to_be_others_are_judged_anew() -> None:
    source = FakeSource(lambda under: FakeEngine(under.model_copy(update={"device_model": "another processor"})))
    with made(source, policy="native", on_risk="serve") as client:
        planned = client.numerics
        done = client.complete("one", max_new_tokens=NEW)
        assert done.record.numerics.device_model == client.numerics.device_model == "another processor"
        assert client.numerics != planned
        assert client.complete("one", max_new_tokens=NEW).cached


def test_a_request_of_another_model_is_refused() -> None:
    with made() as client, pytest.raises(StablegenError, match="made for 'some-model', not for 'fake'"):
        client.run([request()])


def test_a_client_around_a_fake_loads_no_torch() -> None:
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
from fakes import FakeSource
from stablegen.client import Client
from stablegen.store.memory import MemoryStore
with Client(FakeSource(), store=MemoryStore(), policy="invariant") as client:
    done = [client.complete("one", max_new_tokens=2) for _ in range(2)]
    client.verify(done[0], from_scratch=True)
print(json.dumps(sorted({"torch", "transformers", "diskcache"} & set(sys.modules))))
"""
    assert python(code, Path(__file__).parents[1]) == []


def test_requests_are_equal_by_what_they_ask() -> None:
    one, same, other = request((1, 2)), request((1, 2), prompt="text"), request((1, 2), new=5)
    assert (one == same, hash(one) == hash(same), one == other) == (True, True, False)
