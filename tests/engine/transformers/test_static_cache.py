"""Fixed shapes over a KV cache of fixed length, on a CPU, where no graph is captured and the step is launched anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import Comparison, padded_companies
from engines import make_engine, make_ids, make_request, run, vocabulary_of
from fixed_shapes import CONTEXT, STATIC, VOCABULARY, alone, asked, small_model, static_engine
from support import client, small_directory
from torch.utils._python_dispatch import TorchDispatchMode

import stablegen.engine.transformers.static_decoding as module
from stablegen.core.policy import CAPACITY_STEP, Batch, Padded, Shape, load_policy
from stablegen.core.request import Request
from stablegen.engine.base import Engine, Generated
from stablegen.engine.self_check import self_check
from stablegen.engine.transformers.padding import left_padded
from stablegen.errors import DeviceMemoryError, NonFiniteScoresError
from stablegen.machine.device import Device
from stablegen.machine.plan import ENGINE_VERSION, STATIC_MODELS, allows_static_cache, numerics_on

Begin = Callable[[str, str, Engine], Comparison]

H100 = Device("cuda:0", "NVIDIA H100 80GB HBM3", capability=(9, 0), sm_count=132)
CPU = Device("cpu", "a processor", instruction_set="avx2 fma", threads=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Leave the other processors to other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what a model says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(STATIC_MODELS))
def test_an_architecture_says_what_generate_says(kind: str) -> None:
    model = small_model(kind)
    assert allows_static_cache(model.config.to_dict())
    requests = [asked(1, 1, 20), asked(2, 9, 20), asked(3, 40, 20)]
    single, padded = static_engine(model, "single"), static_engine(model, "padded:3")
    together = run(padded, Batch(tuple(requests), Shape(64)))
    for slot, one in enumerate(requests):
        ids = torch.tensor([one.prompt_ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = torch.cat(out.logits)
        for answer in (alone(single, one), together[slot]):
            assert list(answer.trace.tokens) == out.sequences[0, len(one.prompt_ids) :].tolist()
            torch.testing.assert_close(answer.scores, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", sorted(STATIC_MODELS))
def test_a_step_reads_no_value(kind: str) -> None:
    class NoReading(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Refuse what would make the host wait for the device, or move data to it."""

        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            assert name not in {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh"}, name
            self.seen += 1
            return func(*args, **(kwargs or {}))

    engine = static_engine(small_model(kind), "padded:2")
    one = asked(1, 5, 4)
    list(engine.generate(Batch((one, None), Shape(64, CAPACITY_STEP))))
    assert engine._static is not None
    decoder = engine._static._idle[2, CAPACITY_STEP]
    ids, mask = left_padded(Batch((one, None), Shape(64)))
    with torch.inference_mode():
        decoder.prefill(ids, mask)
        with NoReading() as watched:  # type: ignore[no-untyped-call]
            decoder._step()
    assert watched.seen > 50


# --- the promises -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_single_repeats(compare: Begin, kind: str, dtype: str) -> None:
    model = small_model(kind, dtype)
    engine = static_engine(model, "single")
    comparison = compare("repeated after others", kind, engine)
    needle = asked(1, 9, 12)
    expected = alone(engine, needle).scores
    for seed, (length, steps) in enumerate([(1, 12), (9, 30), (70, 9), (9, 12)], start=2):
        alone(engine, asked(seed, length, steps))
        comparison.add("after another", expected, alone(engine, needle).scores)
    comparison.add("engine restarted", expected, alone(static_engine(model, "single"), needle).scores)
    comparison.assert_equal()


@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    [("gpt2", "float32", 4), ("gpt2", "bfloat16", 8), ("llama", "float32", 8), ("llama", "bfloat16", 4)],
)
def test_padded_company(compare: Begin, kind: str, dtype: str, rows: int) -> None:
    model = small_model(kind, dtype)
    engine = static_engine(model, f"padded:{rows}")
    check = self_check(engine, VOCABULARY, Shape(64, CAPACITY_STEP))
    assert check.passed, check.checks
    comparison = compare("company in a padded batch", kind, engine)
    # neighbours end before the needle, with it and after it
    needle, others = asked(1, 21, 20), [asked(i, 1 + 7 * i, 1 + 6 * i) for i in range(2, 9)]
    companies = padded_companies(needle, others, rows, 64, moved=check.slot_free)
    expected = run(engine, companies.pop("alone"))[0].scores
    for situation, batch in companies.items():
        answers = run(engine, batch)
        found = next(answers[slot] for slot, one in batch.requests if one is needle)
        comparison.add(situation, expected, found.scores)
    comparison.assert_equal()


def test_native_breaks_what_padded_promises(compare: Begin) -> None:
    engine = make_engine("random-gpt2", "native", "float32")
    comparison = compare("control", "random-gpt2", engine)
    ids = [make_ids(i, 1 + 7 * i, vocabulary_of("random-gpt2")) for i in range(1, 9)]
    needle, *others = [make_request(row, 8) for row in ids]
    expected = run(engine, Batch((needle,)))[0].scores
    for size in (1, 3, 7):
        comparison.add(f"{size} others", expected, run(engine, Batch((needle, *others[:size])))[0].scores)
    assert comparison.differing > 0


@pytest.mark.parametrize("policy", ["single", "padded:2"])
def test_observing_moves_no_bit(policy: str) -> None:
    engine = static_engine(small_model("gpt2"), policy)
    rows = (asked(1, 9, 30),) if policy == "single" else (asked(1, 9, 30), asked(2, 30, 19))
    batch = Batch(rows, Shape(None if policy == "single" else 64))
    observed = run(engine, batch)
    plain = {done.composition.slot: done for done in engine.generate(batch)}
    assert plain.keys() == observed.keys()
    for slot, done in plain.items():
        assert done.trace == observed[slot].trace
        assert (len(done.trace), done.finish_reason) == (rows[slot].params.max_new_tokens, "length")


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 15, 16, 17, 33])
def test_answers_are_as_long_as_asked(steps: int) -> None:
    engine = static_engine(small_model("gpt2"), "padded:3")
    whole = run(engine, Batch((asked(1, 9, 40), asked(2, 20, 40), None), Shape(64)))
    done = {
        d.composition.slot: d for d in engine.generate(Batch((asked(1, 9, steps), asked(2, 20, 3), None), Shape(64)))
    }
    assert done[0].trace.score_hash == whole[0].trace.score_hash[:steps]
    assert done[1].trace.score_hash == whole[1].trace.score_hash[:3]


@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 20])
def test_an_end_token_ends_an_answer(step: int) -> None:
    engine = static_engine(small_model("llama"), "padded:2")
    other = asked(2, 20, 30)
    whole = run(engine, Batch((asked(1, 9, 30), other), Shape(64)))
    tokens = whole[0].trace.tokens
    ending = asked(1, 9, 30, eos_token_ids=(tokens[step],))
    done = {d.composition.slot: d for d in engine.generate(Batch((ending, other), Shape(64)))}
    assert done[0].finish_reason == "stop"
    assert done[0].trace.tokens == tokens[: tokens.index(tokens[step]) + 1]
    assert done[1].trace == whole[1].trace


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_up_to_the_context(kind: str) -> None:
    model = small_model(kind)
    single, padded = static_engine(model, "single"), static_engine(model, "padded:2")
    for length, steps in ((CONTEXT - 1, 1), (64, CONTEXT - 64), (1, CONTEXT - 1)):
        one = asked(1, length, steps)
        expected = alone(single, one)
        assert len(expected.trace) == steps
        for batch in Padded(2).plan([one, asked(2, 3, 2)], padded.limits):
            for slot, answer in run(padded, batch).items():
                if batch.rows[slot] is one:
                    torch.testing.assert_close(answer.scores, expected.scores, rtol=1e-3, atol=1e-3)


def test_what_was_not_finite_is_gone_with_its_batch() -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    engine = static_engine(model, "padded:3")
    bad = make_request((5, 7, 9, 7, 5), 9)
    batch = Batch((make_request((1, 2, 3), 20), make_request((4, 5, 6), 20), None), Shape(64))
    expected = {slot: answer.trace for slot, answer in run(engine, batch).items()}
    if any(7 in trace.tokens for trace in expected.values()):
        pytest.fail("choose other prompts: the answers themselves hold the broken token")
    done: list[Generated] = []
    with pytest.raises(NonFiniteScoresError, match="at step 0 of the prompt of 5 tokens"):
        done.extend(engine.generate(Batch((batch.rows[0], bad, None), Shape(64))))
    assert [one.trace for one in done] == [expected[0]]
    done = list(engine.generate(batch))
    assert {one.composition.slot: one.trace for one in done} == expected


# --- shapes and what is kept of them ----------------------------------------------------------------------------------


def test_the_composition_tells_the_shape() -> None:
    engine = static_engine(small_model("gpt2"), "padded:2")
    (batch,) = Padded(2).plan([asked(1, 9, 3)], engine.limits)
    (done,) = engine.generate(batch)
    assert done.composition.shape == Shape(64, CAPACITY_STEP) == batch.shape
    (derived,) = engine.generate(Batch((asked(1, 70, 3), None), Shape(CONTEXT)))
    assert derived.composition.shape == Shape(CONTEXT, CAPACITY_STEP)


def test_few_shapes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = static_engine(small_model("gpt2"), "single")
    static = engine._static
    assert static is not None
    one = asked(1, 9, 5)
    expected = alone(engine, one, 256).trace
    monkeypatch.setattr(module, "KEPT", 2)
    for capacity in (512, 768, 1024):
        alone(engine, one, capacity)
    assert [capacity for _, capacity in static._idle] == [768, 1024]
    assert alone(engine, one, 256).trace == expected
    monkeypatch.setattr(module, "KEPT_BYTES", static._idle[1, 256].bytes)
    assert alone(engine, one, 256).trace == expected
    assert list(static._idle) == [(1, 256)]


def test_batches_of_one_shape_may_take_turns() -> None:
    engine = static_engine(small_model("gpt2"), "single")
    ones = [asked(seed, 9, 20, eos_token_ids=()) for seed in (1, 2)]
    expected = [alone(engine, one).trace for one in ones]
    turns: list[Request] = []
    first, second = (engine.generate(Batch((one,)), lambda request, _: turns.append(request)) for one in ones)
    found = [next(first), next(second)]
    assert [done.trace for done in found] == expected
    assert turns == [ones[0]] * 20 + [ones[1]] * 20
    first.close()
    second.close()
    both = Batch((ones[0], asked(3, 3, 2))), Batch((ones[1], asked(4, 3, 2)))
    running = [engine.generate(batch) for batch in both]
    assert [next(one).request.params.max_new_tokens for one in running] == [2, 2]
    rest = [next(one).trace for one in running]
    again = [run(engine, batch)[0].trace for batch in both]
    assert rest == again


def test_a_batch_left_unfinished_leaves_nothing_behind() -> None:
    engine = static_engine(small_model("gpt2"), "padded:2")
    batch = Batch((asked(1, 9, 20), asked(2, 9, 2)), Shape(64))
    expected = run(engine, batch)
    begun = engine.generate(Batch((asked(3, 60, 30), asked(4, 9, 1)), Shape(64)))
    next(begun)
    begun.close()
    done = {d.composition.slot: d.trace for d in engine.generate(batch)}
    assert done == {slot: answer.trace for slot, answer in expected.items()}


def test_memory_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("gpt2")
    engine = static_engine(model, "single")
    static = engine._static
    assert static is not None
    one = asked(1, 9, 5)
    expected = alone(engine, one, 256).trace
    alone(engine, one, 512)
    forward, refused = model.forward, 0

    def short(**arguments: Any) -> Any:
        nonlocal refused
        if len(static._idle) > room:
            refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**arguments)

    monkeypatch.setattr(model, "forward", short)
    room = 0
    assert alone(engine, one, 256).trace == expected  # without the other shape's cache there is room
    assert (refused, list(static._idle)) == (1, [(1, 256)])
    room = -1
    with pytest.raises(DeviceMemoryError, match="a batch of 1 rows did not fit"):
        alone(engine, one, 256)
    monkeypatch.undo()
    assert alone(engine, one, 256).trace == expected


# --- the rule, and the numerics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "gpt2", "add_cross_attention": True}, False),
        ({"model_type": "bloom"}, False),
        ({"model_type": "mistral"}, False),
        ({}, False),
        ({"model_type": "llama", "rope_scaling": None}, True),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, True),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, False),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "longrope"}}, False),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, True),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}, False),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, False),
    ],
)
def test_which_models_allow_it(config: dict[str, Any], allowed: bool) -> None:
    assert allows_static_cache(config) is allowed


@pytest.mark.parametrize(
    ("policy", "device", "attention", "allowed", "static"),
    [
        ("single", H100, "sdpa", True, True),
        ("padded:4", H100, "sdpa", True, True),
        ("native", H100, "sdpa", True, False),
        ("single", H100, "eager", True, False),
        ("single", H100, "sdpa", False, False),
        ("single", CPU, "sdpa", True, False),
    ],
)
def test_the_numerics_name_it(policy: str, device: Device, attention: str, allowed: bool, static: bool) -> None:
    found = numerics_on(device, load_policy(policy), "float32", attention=attention, static_cache=allowed)
    growing = {"engine": "transformers", "engine_version": ENGINE_VERSION, "attention": attention, "static": False}
    expected = STATIC if static else growing
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_client_measures_each_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_a_gpu(*arguments: Any, **named: Any) -> Any:
        return numerics_on(*arguments, **named).model_copy(update=STATIC)

    monkeypatch.setattr("stablegen.sources.checkpoint.numerics_on", as_on_a_gpu)
    monkeypatch.setattr("stablegen.engine.loading.numerics_on", as_on_a_gpu)
    # the last needs a longer KV cache for prompts of the first's width
    calls = {3: ["Hello", "No", "word " * 80], 200: ["Hello", "No"]}
    with client(tmp_path, model=small_directory(), policy="padded:2") as asking:
        made = [done for new, prompts in calls.items() for done in asking.complete(prompts, max_new_tokens=new)]
        shapes = {done.record.composition.shape for done in made}
        assert shapes == {Shape(64, 256), Shape(128, 256), Shape(64, 512)}
        assert {check.shape for check in asking.cache.self_checks()} == shapes
        assert {done.verdict.status for done in made} == {"exact"}
    with client(tmp_path, model=small_directory(), policy="padded:2") as later:
        again = [done for new, prompts in calls.items() for done in later.complete(prompts, max_new_tokens=new)]
        assert {(done.cached, done.verdict.status) for done in again} == {(True, "exact")}
        assert [done.record for done in again] == [done.record for done in made]
        assert not later.session.parts.runner.started
    monkeypatch.undo()
    with client(tmp_path, model=small_directory(), policy="padded:2", on_risk="serve") as growing:
        # records of the one KV cache promise nothing for the other
        assert growing.complete("Hello", max_new_tokens=3).verdict.status != "exact"
