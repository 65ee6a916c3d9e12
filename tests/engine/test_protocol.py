"""What every engine does alike: one protocol, callbacks that take the request, and policies from outside."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from engines import alone, invariant_engine, load_model, make_engine, make_ids, make_request
from fixed_shapes import small_model, static_engine

from stablegen.core import policy as policies
from stablegen.core.numerics import Numerics
from stablegen.core.policy import (
    BATCH_INVARIANT,
    BESIDE,
    SLOT,
    Batch,
    Company,
    Invariant,
    Limits,
    MakeRequest,
    Shape,
    Single,
    Trial,
    register_policy,
)
from stablegen.core.record import Composition
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import NO_ANSWERS, Answers, Engine, Generated, Listener, Observer
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.loading import make_vendor_engine
from stablegen.engine.self_check import EQUAL, PREFILL, self_check
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.errors import EngineError, PolicyError, TeacherForcingError

VOCABULARY = 1031
POLICIES = ("invariant", "single", "padded:2", "native")


def request_of(number: int, length: int = 9, steps: int = 5, **settings: Any) -> Request:
    plain = make_request(make_ids(number, length, VOCABULARY), steps)
    return Request(plain.prompt_ids, plain.params.model_copy(update=settings), plain.model, plain.tokenizer)


def batches_of(policy: str, *requests: Request) -> list[Batch]:
    limits = Limits(context=256)
    return policies.load_policy(policy).plan(requests, limits)


class Echo(Engine):
    """An engine of somebody else's, which only generates: each answer is the prompt's last token, again and again."""

    def __init__(self, numerics: Numerics) -> None:
        self.numerics = numerics
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
            trace = Trace.of([request.prompt_ids[-1]] * steps, [0] * steps, [2.0] * steps, [1.0] * steps, [7] * steps)
            composition = Composition(len(batch.rows), len(batch.requests), slot, batch.shape)
            yield Generated(request, trace, "length", composition, 0.0)


def numerics_of(policy: str) -> Numerics:
    return make_engine("random-gpt2", policy, "float32").numerics


# --- one protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_both_engines_keep_the_protocol(policy: str) -> None:
    engine = make_engine("random-gpt2", policy, "float32")
    assert isinstance(engine, Engine)
    assert isinstance(engine, InvariantEngine if policy == "invariant" else TransformersEngine)
    assert engine.limits.prefill_equals_decode is (policy == "invariant")
    asked = [request_of(1), request_of(2, 30)]
    for batch in batches_of(policy, *asked):
        made = list(engine.generate(batch))
        engine.forget()
        followed = list(engine.follow(batch, {done.request: done.trace.tokens for done in made}))
        for done in (*made, *followed):
            assert done.request is batch.rows[done.composition.slot]
            assert done.composition.shape == batch.shape
            assert done.finish_reason == "length"
        expected = {id(done.request): done.trace.tokens for done in made}
        assert {id(done.request): done.trace.tokens for done in followed} == expected
        assert len(expected) == len(batch.requests)


@pytest.mark.parametrize("policy", POLICIES)
def test_callbacks_take_the_request(policy: str) -> None:
    engine = make_engine("random-gpt2", policy, "float32")
    asked = [request_of(seed, 5 + seed, 3 + seed) for seed in range(1, 4)]
    for batch in batches_of(policy, *asked):
        rows: dict[int, int] = {}
        heard: dict[int, list[int]] = {}

        def observe(request: Request, scores: torch.Tensor, rows: dict[int, int] = rows) -> None:
            assert scores.shape == (VOCABULARY,)
            rows[id(request)] = rows.get(id(request), 0) + 1

        def listen(request: Request, step: int, tokens: Sequence[int], heard: dict[int, list[int]] = heard) -> None:
            known = heard.setdefault(id(request), [])
            assert step == len(known)
            known += tokens

        done = list(engine.generate(batch, observe, listen))
        assert {id(one.request) for one in done} == {id(request) for _, request in batch.requests}
        for one in done:
            assert rows[id(one.request)] == len(one.trace)
            assert tuple(heard[id(one.request)]) == one.trace.tokens


@pytest.mark.parametrize("policy", ["invariant", "padded:2", "native"])
def test_requests_of_one_batch_may_be_equal(policy: str) -> None:
    engine = make_engine("random-gpt2", policy, "float32")
    sampled = {"do_sample": True, "seed": 3}
    for settings in ({}, sampled):
        one, other = request_of(1, **settings), request_of(1, **settings)
        assert one == other
        (batch,) = batches_of(policy, one, other)
        done = list(engine.generate(batch))
        assert sorted(generated.composition.slot for generated in done) == [0, 1]
        assert len({generated.trace.tokens for generated in done}) == 1


def test_an_engine_that_cannot_follow_says_so() -> None:
    engine = Echo(numerics_of("single"))
    asked = request_of(1)
    assert next(engine.generate(Batch((asked,)))).trace.tokens == (asked.prompt_ids[-1],) * 5
    with pytest.raises(TeacherForcingError, match="Echo cannot score given tokens"):
        engine.follow(Batch((asked,)), {asked: (1, 2)})
    engine.forget()
    engine.close()


def test_begun_answers_take_an_engine_whose_prefill_equals_decode() -> None:
    asked = request_of(1, steps=6)
    engine = make_engine("random-gpt2", "single", "float32")
    with pytest.raises(
        TeacherForcingError, match=r"policy 'single' cannot resume answers from their first tokens.*beginning"
    ):
        engine.generate(Batch((asked,)), begun={asked: (1,)})
    vendor = make_vendor_engine(load_model("random-gpt2"), "float32", reach=64, max_rows=2)
    assert not vendor.limits.prefill_equals_decode
    with pytest.raises(TeacherForcingError, match="promises nothing"):
        vendor.generate(Batch((asked,)), begun={asked: (1,)})
    own = invariant_engine("random-gpt2", "float32")
    (whole,) = own.generate(Batch((asked,)))
    for step in (1, 5):
        (rest,) = own.generate(Batch((asked,)), begun={asked: whole.trace.tokens[:step]})
        assert rest.trace == Trace.of(*(column[step:] for column in _columns(whole.trace)))


def _columns(trace: Trace) -> tuple[tuple[Any, ...], ...]:
    return trace.tokens, trace.runner_ups, trace.scores, trace.runner_up_scores, trace.score_hash


# --- closing ----------------------------------------------------------------------------------------------------------


def test_a_closed_engine_of_transformers_holds_nothing() -> None:
    engine = static_engine(small_model("gpt2"), "single")
    asked = make_request(make_ids(1, 9, 200), 3)
    assert len(list(engine.generate(Batch((asked,))))) == 1
    held = weakref.ref(engine.model), weakref.ref(next(iter(_idle(engine).values())))
    engine.close()
    engine.close()
    gc.collect()
    assert [one() for one in held] == [None, None]
    for use in (engine.generate, lambda batch: engine.follow(batch, {asked: (1,)})):
        with pytest.raises(EngineError, match="was closed"):
            list(use(Batch((asked,))))


def _idle(engine: TransformersEngine) -> dict[tuple[int, int], Any]:
    assert engine._static is not None
    return engine._static._idle


def test_a_shape_in_use_is_released_with_its_batch() -> None:
    engine = static_engine(small_model("gpt2"), "padded:2")
    static = engine._static
    assert static is not None
    batch = Batch((make_request(make_ids(1, 9, 200), 30), make_request(make_ids(2, 9, 200), 1)), Shape(64))
    with closing(engine.generate(batch)) as running:
        assert next(running).composition.slot == 1
        engine.close()
        assert next(running).composition.slot == 0
    assert not static._idle


def test_a_closed_batch_invariant_engine_holds_nothing() -> None:
    shared = invariant_engine("random-gpt2", "float32")
    engine = InvariantEngine(shared.model, shared.numerics)
    asked = request_of(1)
    assert len(list(engine.generate(Batch((asked,))))) == 1
    cache = weakref.ref(engine._reserve().cache)
    engine.close()
    engine.close()
    engine.forget()
    gc.collect()
    assert cache() is None
    assert engine._model is None
    for use in (engine.generate, lambda batch: engine.follow(batch, {asked: (1,)})):
        with pytest.raises(EngineError, match="was closed"):
            list(use(Batch((asked,))))
    with pytest.raises(EngineError, match="was closed"):
        engine.memory()


def test_a_batch_that_is_under_way_survives_the_end_of_its_engine() -> None:
    shared = invariant_engine("random-gpt2", "float32")
    engine = InvariantEngine(shared.model, shared.numerics, max_rows=1)
    asked = [request_of(seed) for seed in range(3)]
    running = engine.generate(Batch(tuple(asked)))
    done = [next(running)]
    engine.close()
    done += running
    expected = {request: alone(shared, request).trace for request in asked}
    assert {one.request: one.trace for one in done} == expected


# --- policies from outside --------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(policies, "_REGISTERED", dict(policies._REGISTERED))


class Pairs(Single):
    """Two rows at a time, padded to one width, which promises their slots too."""

    __slots__ = ()

    name = form = "pairs"
    accepted = "'pairs'"

    def width(self, length: int, context: int) -> int | None:
        """Return the one width there is."""
        return 64

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return batches of two rows."""
        rows = [*requests, *[None] * (len(requests) % 2)]
        return [Batch(tuple(rows[at : at + 2]), Shape(64)) for at in range(0, len(rows), 2)]

    def trials(self, make: MakeRequest, shape: Shape, limits: Limits) -> Iterator[Trial]:
        """Yield one request beside another, on either side."""
        needle, other = make(1, 21, 4), make(2, 40, 4)
        companies = (
            Company(BESIDE, Batch((needle, other), shape)),
            Company(SLOT, Batch((other, needle), shape)),
        )
        yield Trial(needle, Batch((needle, None), shape), companies)


class Reversed(Invariant):
    """The batch-invariant kernels, the last request first."""

    __slots__ = ()

    name = form = "reversed"
    accepted = "'reversed'"
    engines = BATCH_INVARIANT

    def plan(self, requests: Sequence[Request], limits: Limits) -> list[Batch]:
        """Return one batch."""
        return [Batch(tuple(reversed(requests)))]


class Untried(Single):
    """A policy that promises and has nothing compared."""

    __slots__ = ()

    name = form = "untried"
    accepted = "'untried'"

    def trials(self, make: MakeRequest, shape: Shape, limits: Limits) -> Iterator[Trial]:
        """Yield nothing."""
        yield from ()


class Elsewhere(Single):
    """A policy for engines that are not here."""

    __slots__ = ()

    name = form = "elsewhere"
    accepted = "'elsewhere'"
    engines = "another machine"


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("kind", "shape", "compared"),
    [
        (Pairs, Shape(64), {BESIDE, SLOT}),
        (Reversed, Shape(), {"repeated", BESIDE, SLOT, PREFILL}),
    ],
)
def test_a_policy_from_outside_runs_on_an_engine_that_is_here(
    kind: type[policies.ExecutionPolicy], shape: Shape, compared: set[str]
) -> None:
    register_policy(kind)
    engine = make_engine("random-gpt2", kind.name, "float32")
    assert engine.numerics.policy == kind.name
    check = self_check(engine, VOCABULARY, shape)
    assert check.passed, check.checks
    assert check.checks == dict.fromkeys(compared, EQUAL)
    assert (check.shape, check.slot_free) == (shape, True)
    asked = [request_of(seed, 5 + seed) for seed in range(3)]
    batches = policies.load_policy(kind.name).plan(asked, engine.limits)
    found = {done.request: done.trace for batch in batches for done in engine.generate(batch)}
    reference = make_engine("random-gpt2", "single", "float32")
    assert {request: trace.tokens for request, trace in found.items()} == {
        request: alone(reference, request).trace.tokens for request in asked
    }


@pytest.mark.usefixtures("registry")
def test_a_policy_that_compares_nothing_passes_no_self_check() -> None:
    register_policy(Untried)
    check = self_check(make_engine("random-gpt2", "untried", "float32"), VOCABULARY)
    assert not check.passed
    assert check.checks == {"policy": "untried names nothing to compare"}


@pytest.mark.usefixtures("registry")
def test_a_family_of_engines_that_is_not_here_is_named() -> None:
    register_policy(Elsewhere)
    with pytest.raises(PolicyError, match="'elsewhere' runs on engines of the family 'another machine'"):
        make_engine("random-gpt2", "elsewhere", "float32")


class Forgetful(Echo):
    """An engine that counts how often it is told to forget, and whose bits depend on the slot where asked to."""

    def __init__(self, numerics: Numerics, *, by_slot: bool) -> None:
        super().__init__(numerics)
        self.forgot = 0
        self._by_slot = by_slot

    def forget(self) -> None:
        """Count it."""
        self.forgot += 1

    def generate(self, batch: Batch, *arguments: Any, **named: Any) -> Generator[Generated, None, None]:
        """Yield answers whose hashes tell the slot."""
        for done in super().generate(batch, *arguments, **named):
            steps = len(done.trace)
            hashes = [9 + done.composition.slot * self._by_slot] * steps
            trace = Trace.of(done.trace.tokens, [0] * steps, [2.0] * steps, [1.0] * steps, hashes)
            yield Generated(done.request, trace, done.finish_reason, done.composition, done.seconds)


@pytest.mark.parametrize(("policy", "passed"), [("padded:4", True), ("single", True)])
def test_a_slot_that_is_not_promised_is_excused(policy: str, passed: bool) -> None:
    engine = Forgetful(numerics_of(policy), by_slot=True)
    check = self_check(engine, 100, Shape(64) if policy != "single" else None)
    assert check.passed is passed
    assert not check.slot_free
    if policy != "single":
        assert check.checks == {BESIDE: EQUAL, SLOT: "score rows differ at step 0"}
        assert engine.forgot == 4  # before it runs alone, and before each company


@pytest.mark.usefixtures("registry")
def test_a_slot_that_is_promised_is_not_excused() -> None:
    register_policy(Pairs)
    numerics = numerics_of("pairs")
    assert self_check(Forgetful(numerics, by_slot=False), 100, Shape(64)).passed
    assert not self_check(Forgetful(numerics, by_slot=True), 100, Shape(64)).passed
