"""The engine of `invariant` on a CPU: sharing, continuous batching, and what happens when something goes wrong.

What it promises bit for bit is tested in test_invariance.py; here hashes of score rows suffice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cache
from typing import Any

import pytest
import torch
from engines import make_ids, make_request

import stablegen.engine.invariant.engine as module
import stablegen.engine.invariant.packed as packed_module
from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, load_policy
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Answers, Generated
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.invariant.kv_cache import KVCache
from stablegen.errors import DeviceMemoryError, EngineError, NonFiniteScoresError
from stablegen.kernels.base import PAGE, Cache, Linear, Norm, Placed, Rows
from stablegen.kernels.reference import ReferenceKernels
from stablegen.machine.plan import find_device, numerics_on

VOCABULARY = 67
CONTEXT = 256
OPERATIONS = ("embed", "qkv", "attention", "partial", "add_norm", "gelu", "choose")


class Watched(ReferenceKernels):
    """Counts what is computed, and runs out of memory where it is told to."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        """Tokens of each pass."""
        self.slots: list[int] = []
        """Different slots of each pass."""

    @property
    def computed(self) -> int:
        return sum(self.passes)

    def embed(
        self, rows: Rows, cache: Cache, tokens: Linear, positions: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, Placed]:
        self.passes.append(len(rows.tokens))
        self.slots.append(len(set(rows.slots.tolist())))
        return super().embed(rows, cache, tokens, positions, norm)

    def fail(self, operation: str, at: Iterable[int]) -> None:
        """Let some calls of an operation fail, the next one being 0."""
        method, calls = getattr(self, operation), iter(range(10**6))

        def failing(*args: Any) -> Any:
            if next(calls) in at:
                raise torch.OutOfMemoryError("no memory is left")
            return method(*args)

        setattr(self, operation, failing)


@cache
def weights() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    import transformers

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": CONTEXT}
    config = transformers.GPT2Config(**shape, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    return config.to_dict(), transformers.GPT2LMHeadModel(config).state_dict()


@cache
def numerics() -> Numerics:
    return numerics_on(find_device("cpu", "float32"), load_policy("invariant"), "float32")


def make_engine(**limits: Any) -> tuple[InvariantEngine, Watched]:
    """Return a new engine and the kernels that it runs on."""
    kernels = Watched()
    model = GPT2(*weights(), kernels, dtype=torch.float32, device=torch.device("cpu"))
    return InvariantEngine(model, numerics(), **limits), kernels


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return make_ids(seed, length, VOCABULARY)


def ending(request: Request, *tokens: int) -> Request:
    """Return a request with end tokens."""
    params = request.params.model_copy(update={"eos_token_ids": tokens})
    return Request(request.prompt_ids, params, request.model, request.tokenizer)


def run(engine: InvariantEngine, requests: Sequence[Request]) -> dict[int, Generated]:
    """Return the answers of a batch by slot; each comes once."""
    done = list(engine.generate(Batch(tuple(requests))))
    answers = {generated.composition.slot: generated for generated in done}
    assert len(answers) == len(done)
    for slot, generated in answers.items():
        assert generated.request is requests[slot]
    return answers


def hashes(generated: Generated) -> tuple[int, ...]:
    assert len(set(generated.trace.score_hash)) == len(generated.trace)
    return generated.trace.score_hash


def alone(request: Request) -> Generated:
    """Return the answer of an engine that knows nothing else."""
    return run(make_engine()[0], [request])[0]


def assert_as_alone(answers: dict[int, Generated], requests: Sequence[Request]) -> None:
    assert sorted(answers) == [*range(len(requests))]
    for slot, request in enumerate(requests):
        expected = alone(request)
        assert hashes(answers[slot]) == hashes(expected), slot
        assert answers[slot].trace == expected.trace
        assert answers[slot].finish_reason == expected.finish_reason


def assert_all_free(engine: InvariantEngine) -> None:
    kept = engine._reserve().cache
    assert sorted(kept._free_slots) == [*range(kept.slots)]
    assert kept._users == [0] * (kept.pages + 1)
    assert len(kept._free) + len(kept._idle) == kept.pages


@pytest.fixture
def pool() -> list[Request]:
    """Return seven requests of other lengths and budgets."""
    lengths = [3, 70, 1, 130, 20, 64, 9]
    return [make_request(prompt(i, length), 2 + 5 * i % 12) for i, length in enumerate(lengths)]


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_shared_beginnings_are_computed_once_and_give_the_same_bits() -> None:
    beginning = prompt(1, 130)  # two full pages, and two tokens more
    requests = [make_request(ids, 4) for ids in (beginning, (*beginning, 5), (*beginning[:-1], 6, 7), beginning[:70])]
    engine, kernels = make_engine()
    answers = run(engine, requests)
    steps = sum(len(answer.trace) - 1 for answer in answers.values())
    shared = 2 * PAGE + 2 * PAGE + PAGE
    assert kernels.computed == sum(len(request.prompt_ids) for request in requests) - shared + steps
    assert_as_alone(answers, requests)


def test_a_later_batch_shares_what_an_earlier_one_computed_until_it_is_forgotten() -> None:
    request = make_request(prompt(1, 2 * PAGE), 3)
    engine, kernels = make_engine()
    expected = hashes(run(engine, [request])[0])
    computed = []
    for forget in (False, True):
        if forget:
            engine.forget()
        kernels.passes.clear()
        assert hashes(run(engine, [request])[0]) == expected
        computed.append(kernels.passes[0])
    assert computed == [PAGE, 2 * PAGE], "the last page of a prompt is computed, its last token being wanted"


def test_an_answer_does_not_depend_on_whose_pages_it_shares(pool: list[Request]) -> None:
    engine, _ = make_engine(max_rows=3, kv_cache_size=8 * 2 * 2 * 32 * PAGE * 4)  # eight pages: some are evicted
    beginnings = [prompt(1, 150), prompt(2, 150)]
    mixed = [make_request((*beginnings[i % 2][: 40 + 15 * i], i), 3) for i in range(7)]
    for requests in (mixed, pool, mixed[::-1], [*pool[:3], *mixed[:3]]):
        assert_as_alone(run(engine, requests), requests)
        assert_all_free(engine)


# --- recorded passes --------------------------------------------------------------------------------------------------


class Replay:
    """What replaying a graph does, by doing it."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.step()


def let_record(engine: InvariantEngine) -> list[Replay]:
    """Let a CPU's engine run as if its packed passes could be recorded; return what it records."""
    made: list[Replay] = []

    def record(step: Callable[[], Any]) -> tuple[Replay, None]:
        made.append(Replay(step))
        return made[-1], None

    packed = engine._reserve().packed
    recorder = packed._recorder = copy(packed._recorder)  # one-token passes stay as they are
    recorder.enabled, recorder.record = True, record  # type: ignore[assignment]
    return made


def test_a_pass_filled_up_to_a_recorded_size_gives_the_same_bits(pool: list[Request]) -> None:
    # some choose, some are in the middle of a prompt; beside them others decode
    engine, _ = make_engine(max_rows=40, chunk=100)
    recorded = let_record(engine)
    for _ in range(3):
        assert_as_alone(run(engine, pool), pool)
        answers = {request: alone(request).trace.tokens for request in pool}
        for done in engine.follow(Batch(tuple(pool)), answers):
            assert done.trace == alone(pool[done.composition.slot]).trace
        engine.forget()
        assert_all_free(engine)
    assert sum(graph.replays for graph in recorded) > 5
    assert len({len(graph.step.args[0].last) for graph in recorded}) > 1  # type: ignore[attr-defined]


def test_recorded_passes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "RECORDED_SIZES", 2)
    engine, _ = make_engine()
    recorded = let_record(engine)
    for length in (20, 50, 90, 20, 20):
        for seed in range(3):
            request = make_request(prompt(seed + length, length), 2)
            assert run(engine, [request])[0].trace == alone(request).trace
    assert len(engine._reserve().packed._recorded) == 2
    assert len(recorded) == 4, "the first was given up, and recorded anew"


# --- continuous batching ----------------------------------------------------------------------------------------------


def test_more_requests_than_rows_give_what_each_gives_alone(pool: list[Request]) -> None:
    engine, kernels = make_engine(max_rows=2)
    assert_as_alone(run(engine, pool), pool)
    assert max(kernels.slots) == 2
    assert_all_free(engine)


def test_a_row_is_replaced_as_soon_as_it_ends() -> None:
    long, short = make_request(prompt(1, 5), 40), [make_request(prompt(i, 5), 4) for i in (2, 3, 4)]
    engine, kernels = make_engine(max_rows=2)
    answers = list(engine.generate(Batch((long, *short))))
    assert [generated.composition.slot for generated in answers] == [1, 2, 3, 0]
    assert len(kernels.passes) == 40, "the short ones should run beside the long one, one after the other"


@pytest.mark.parametrize("chunk", [64, 100, 2048])
def test_prompts_cut_into_chunks_give_the_same_bits(pool: list[Request], chunk: int) -> None:
    engine, kernels = make_engine(chunk=chunk)
    assert_as_alone(run(engine, pool), pool)
    assert max(kernels.passes) <= chunk + len(pool)


def test_tokens_beyond_a_bounded_cache_wait() -> None:
    requests = [make_request(prompt(i, 100), 3) for i in range(4)]
    engine, kernels = make_engine(kv_cache_size=5 * 2 * 2 * 32 * PAGE * 4)  # five pages, two a request
    assert engine.memory()["kv_cache"] == 6 * 2 * 2 * 32 * PAGE * 4  # one more is spare
    assert_as_alone(run(engine, requests), requests)
    assert max(kernels.slots) == 2


# --- the end of an answer ---------------------------------------------------------------------------------------------


def newcomer() -> tuple[Request, int]:
    """Return a request of 30 steps, and one of its first steps whose token did not come up before."""
    for seed in range(100):
        request = make_request(prompt(seed, 10), 30)
        told = alone(request).trace.tokens
        for step in range(3, 8):
            if told[step] not in told[:step]:
                return request, step
    raise AssertionError("all answers repeat themselves")


def test_an_end_token_ends_the_answer_and_later_steps_are_dropped(pool: list[Request]) -> None:
    request, end = newcomer()
    whole = alone(request)
    stopping = ending(request, whole.trace.tokens[end], VOCABULARY + 5)
    engine, kernels = make_engine()
    answer = run(engine, [stopping])[0]
    assert answer.finish_reason == "stop"
    assert hashes(answer) == hashes(whole)[: end + 1]
    assert answer.trace.tokens == whole.trace.tokens[: end + 1]
    assert len(kernels.passes) < 30
    among = run(make_engine(max_rows=2)[0], [pool[0], stopping, *pool[1:]])
    assert hashes(among[1]) == hashes(answer)
    assert_as_alone({slot - (slot > 1): found for slot, found in among.items() if slot != 1}, pool)


def test_an_end_token_at_once_is_an_answer_of_one_step() -> None:
    request = make_request(prompt(3, 10), 30)
    first = alone(request).trace.tokens[0]
    answer = alone(ending(request, first))
    assert answer.trace.tokens == (first,)
    assert answer.finish_reason == "stop"


def test_the_log_is_read_before_it_is_overwritten() -> None:
    request = make_request(prompt(3, 10), 200)  # more steps than the log has entries
    answer = alone(request)
    engine, _ = make_engine()
    told = list(answer.trace.tokens)
    for step in (63, 64, 65, 127, 128, 199):
        longer = make_request((*request.prompt_ids, *told[:step]), 1)
        assert run(engine, [longer])[0].trace.score_hash == answer.trace.score_hash[step : step + 1]


# --- one batch at a time ----------------------------------------------------------------------------------------------


def test_an_engine_runs_one_batch_at_a_time(pool: list[Request]) -> None:
    engine, _ = make_engine(max_rows=2)
    batch = Batch(tuple(pool))
    first = engine.generate(batch)
    done = [next(first)]
    with pytest.raises(EngineError, match="in the middle of another batch"):
        next(engine.generate(batch))
    done += first
    assert_as_alone({generated.composition.slot: generated for generated in done}, pool)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_gives_everything_back(pool: list[Request], taken: int) -> None:
    engine, _ = make_engine(max_rows=2, chunk=64)
    iterator = engine.generate(Batch(tuple(pool)))
    for _ in range(taken):
        next(iterator)
    iterator.close()
    assert_all_free(engine)
    assert_as_alone(run(engine, pool), pool)


def test_closing_early_waits_for_no_collector(pool: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(max_rows=2)
    inner = engine._run
    held: list[Any] = []

    def holding(*given: Any) -> Any:
        held.append(inner(*given))
        return held[-1]

    monkeypatch.setattr(engine, "_run", holding)
    iterator = engine.generate(Batch(tuple(pool)))
    next(iterator)
    iterator.close()
    assert_all_free(engine)
    assert_as_alone(run(engine, pool), pool)


def test_an_error_in_between_gives_everything_back(pool: list[Request]) -> None:
    engine, kernels = make_engine(max_rows=3)
    broken = engine.generate(Batch(tuple(pool)))
    next(broken)
    kernels.gelu = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        list(broken)
    del kernels.gelu
    assert_all_free(engine)
    assert_as_alone(run(engine, pool), pool)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine, _ = make_engine(kv_cache_size=2 * 2 * 2 * 32 * PAGE * 4)  # two pages
    small = make_request(prompt(1, 20), 3)
    with pytest.raises(DeviceMemoryError, match=r"130 positions do not fit.*kv_cache_size"):
        run(engine, [small, make_request(prompt(1, 120), 10)])
    assert_as_alone(run(engine, [small]), [small])


def test_a_cache_of_no_page_is_refused() -> None:
    engine, _ = make_engine(kv_cache_size=1000)
    with pytest.raises(DeviceMemoryError, match="kv_cache_size=1000"):
        run(engine, [make_request(prompt(1, 2), 1)])


@pytest.mark.parametrize("call", [0, 5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_of_memory_halves_what_runs_at_once_and_moves_no_bit(
    pool: list[Request], operation: str, call: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine, kernels = make_engine(max_rows=4, chunk=256)
    kernels.fail(operation, [call])
    with caplog.at_level(logging.WARNING):
        answers = run(engine, pool)
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: going on with 2 rows at once, 128 tokens a pass"
    ]
    assert (engine.max_rows, engine.chunk) == (2, 128)
    assert engine.limits.rows == 2
    assert_as_alone(answers, pool)
    assert_all_free(engine)


def test_out_of_memory_late_does_not_repeat_what_was_answered(pool: list[Request]) -> None:
    engine, kernels = make_engine(max_rows=2, chunk=256)
    kernels.fail("gelu", [30, 31])  # most are answered by then; what follows runs alone, and runs out again
    answers = run(engine, pool)
    assert (engine.max_rows, engine.chunk) == (1, 64)
    assert_as_alone(answers, pool)


def test_a_cache_that_does_not_fit_is_halved(
    pool: list[Request], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = make_engine(max_rows=8, chunk=2048)
    new_cache, asked = engine.model.new_cache, []

    def refusing(slots: int, pages: int) -> KVCache:
        asked.append((slots, pages))
        if slots > 2:
            raise torch.OutOfMemoryError("no memory is left")
        return new_cache(slots, pages)

    monkeypatch.setattr(engine.model, "new_cache", refusing)
    with caplog.at_level(logging.WARNING):
        answers = run(engine, pool)
    assert asked == [(8, 32), (4, 16), (2, 8)]
    assert len(caplog.records) == 2
    assert_as_alone(answers, pool)


@pytest.mark.parametrize("operation", ["choose", "new_cache"])
def test_where_not_even_one_row_fits_an_error_says_so(
    operation: str, pool: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, kernels = make_engine(max_rows=4, chunk=256)
    if operation == "new_cache":

        def refusing(*_: int) -> KVCache:
            raise torch.OutOfMemoryError("no memory is left")

        monkeypatch.setattr(engine.model, operation, refusing)
    else:
        kernels.fail(operation, range(10**6))
    with pytest.raises(DeviceMemoryError, match="not even one row fits") as caught:
        run(engine, pool)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert (engine.max_rows, engine.chunk) == (1, PAGE)


def test_what_is_observed_is_not_run_twice(pool: list[Request]) -> None:
    engine, kernels = make_engine(max_rows=4)
    kernels.fail("choose", [2])
    seen: list[Request] = []
    with pytest.raises(DeviceMemoryError, match="a batch of 7 rows"):
        list(engine.generate(Batch(tuple(pool)), lambda request, _: seen.append(request)))
    assert seen
    assert_all_free(engine)
    assert_as_alone(run(engine, pool), pool)


# --- answers given beforehand -----------------------------------------------------------------------------------------


def follow(engine: InvariantEngine, answers: Answers) -> dict[int, Trace]:
    """Return what is chosen along answers, by their place."""
    found = list(engine.follow(Batch(tuple(answers)), answers))
    assert all(done.request is list(answers)[done.composition.slot] for done in found)
    assert {done.finish_reason for done in found} == {"length"}
    traces = {done.composition.slot: done.trace for done in found}
    assert len(traces) == len(found)
    return traces


@pytest.mark.parametrize("limits", [{}, {"chunk": 3}, {"max_rows": 2, "chunk": 50}, {"max_rows": 300}])
def test_following_an_answer_gives_the_bits_of_decoding_it(pool: list[Request], limits: dict[str, int]) -> None:
    engine, kernels = make_engine(**limits)
    answers = run(make_engine()[0], pool)
    found = follow(engine, {answers[slot].request: answers[slot].trace.tokens for slot in range(len(pool))})
    assert found == {slot: answers[slot].trace for slot in range(len(pool))}
    if not limits:
        # all of them at once: not a pass a token
        assert len(kernels.passes) <= 2
    assert_all_free(engine)


def test_an_answer_of_many_pages_needs_more_passes_than_one(pool: list[Request], monkeypatch: Any) -> None:
    monkeypatch.setitem(module.CHOICES, "cpu", 40)
    engine, kernels = make_engine(max_rows=16)
    long = [make_request(prompt(i, 10 + i), 150) for i in range(3)]
    answers = run(make_engine()[0], long)
    found = follow(engine, {answers[slot].request: answers[slot].trace.tokens for slot in range(3)})
    assert found == {slot: answers[slot].trace for slot in range(3)}
    assert len(kernels.passes) == -(-450 // 40)
    # what was computed for the first is known to the others, and is computed again where its scores are needed
    assert follow(engine, {answers[0].request: answers[0].trace.tokens}) == {0: answers[0].trace}
    assert_all_free(engine)


def test_following_tells_where_an_answer_diverges_and_how_it_goes_on(pool: list[Request]) -> None:
    engine, _ = make_engine()
    one = make_request(prompt(3, 70), 20)
    tokens = run(make_engine()[0], [one])[0].trace.tokens
    for step in (0, 7, 19):
        edited = [*tokens]
        edited[step] = (tokens[step] + 1) % VOCABULARY
        found = follow(engine, {one: tuple(edited)})[0].tokens
        assert found[: step + 1] == tokens[: step + 1]
        assert len(found) == 20


def test_an_end_token_in_a_given_answer_ends_nothing(pool: list[Request]) -> None:
    engine, _ = make_engine()
    one = make_request(prompt(3, 30), 12)
    trace = run(make_engine()[0], [one])[0].trace
    assert follow(engine, {ending(one, trace.tokens[4]): trace.tokens}) == {0: trace}


def test_following_halves_and_goes_on_where_memory_is_short(pool: list[Request]) -> None:
    engine, kernels = make_engine(max_rows=4)
    answers = run(make_engine()[0], pool)
    kernels.fail("choose", [0])
    found = follow(engine, {answers[slot].request: answers[slot].trace.tokens for slot in range(len(pool))})
    assert found == {slot: answers[slot].trace for slot in range(len(pool))}
    assert engine.max_rows == 2
    assert_all_free(engine)


# --- scores that are no numbers ---------------------------------------------------------------------------------------


def damage(engine: InvariantEngine, position: int) -> None:
    """Let all scores from a position on be NaN; weights that are NaN from the beginning are refused."""
    model = engine.model
    assert isinstance(model, GPT2)
    model.position_embedding = model.position_embedding.clone()  # the file's own are those of other engines too
    model.position_embedding[position:] = float("nan")


def test_rows_whose_scores_are_not_finite_are_named_after_the_others_are_answered(pool: list[Request]) -> None:
    engine, _ = make_engine(max_rows=3)
    damage(engine, 72)
    asked = [*pool[:3], make_request(prompt(20, 70), 4), *pool[3:]]
    # the first in its answer, the second at its last step but one, the third in its prompt
    reached = [i for i, one in enumerate(asked) if len(one.prompt_ids) + one.params.max_new_tokens > 73]
    assert reached == [1, 3, 4]
    done: dict[int, Generated] = {}

    def collect() -> None:
        for generated in engine.generate(Batch(tuple(asked))):
            done[generated.composition.slot] = generated

    with pytest.raises(NonFiniteScoresError, match=r"at step \d+ of the prompt .* \(and of 2 others\)"):
        collect()
    assert sorted(done) == [0, 2, 5, 6, 7]
    for slot, generated in done.items():
        assert hashes(generated) == hashes(alone(asked[slot]))
    assert_all_free(engine)


def test_a_lone_row_says_at_which_step_its_scores_became_no_numbers() -> None:
    engine, _ = make_engine()
    damage(engine, 12)
    assert run(engine, [make_request(prompt(1, 10), 3)])[0].finish_reason == "length"
    with pytest.raises(NonFiniteScoresError, match="at step 3 of the prompt of 10 tokens"):
        run(engine, [make_request(prompt(1, 10), 9)])
