"""Fixed shapes over a KV cache of fixed length, on a GPU: a captured step gives the bits of one launched anew."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import Comparison, padded_companies
from engines import DTYPES, TINY, Answer, load_model, make_engine, run
from fixed_shapes import STATIC, alone, asked, small_model, static_engine

import stablegen.engine.transformers.static_decoding as module
from stablegen.client import Client
from stablegen.core.policy import CAPACITY_STEP, Batch, Padded, Shape
from stablegen.core.request import Request
from stablegen.engine.base import Engine
from stablegen.engine.self_check import self_check
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.machine.plan import STATIC_MODELS

pytestmark = pytest.mark.gpu

Begin = Callable[[str, str, Engine], Comparison]

SMALL = "gpt2-small"
"""Random weights: the shapes of the real one."""
VOCABULARY = 50257
CONTEXT = 1024


def engine_of(dtype: str, policy: str, *, graphs: bool = True) -> TransformersEngine:
    """Return a new engine over GPT-2 small."""
    return static_engine(load_model(SMALL, dtype, "cuda"), policy, CONTEXT, graphs=graphs)


def needle_of(seed: int = 1, length: int = 21, steps: int = 12, **params: Any) -> Request:
    return asked(seed, length, steps, vocabulary=VOCABULARY, **params)


def decoders(engine: TransformersEngine) -> dict[tuple[int, int], Any]:
    """Return what an engine keeps of its shapes, (rows, capacity)."""
    assert engine._static is not None
    return engine._static._idle


def assert_captured(engine: TransformersEngine) -> None:
    assert decoders(engine)
    assert all(decoder._captured is not None for decoder in decoders(engine).values())


def mixed_batch(rows: int = 4) -> Batch:
    """Return a padded batch whose rows end at different steps, one of them filler."""
    made = [needle_of(seed, 1 + 13 * seed % 60, 1 + 7 * seed) for seed in range(1, rows)]
    return Batch((*made, None), Shape(64, CAPACITY_STEP))


# --- a graph and a launch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["single", "padded:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_moves_no_bit(compare: Begin, policy: str, dtype: str) -> None:
    captured, launched = engine_of(dtype, policy), engine_of(dtype, policy, graphs=False)
    assert captured.numerics == launched.numerics
    comparison = compare("graph against launch", SMALL, captured)
    batches = [mixed_batch(), mixed_batch()]
    if policy == "single":
        batches = [Batch((needle_of(2, length, 20),)) for length in (1, 64, 250, 700)]
    for batch in batches:
        expected = run(launched, batch)
        for slot, answer in run(captured, batch).items():
            comparison.add("captured", expected[slot].scores, answer.scores)
        plain = {done.composition.slot: done.trace for done in captured.generate(batch)}
        assert plain == {slot: answer.trace for slot, answer in expected.items()}
    assert_captured(captured)
    assert all(decoder._captured is None for decoder in decoders(launched).values())
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(STATIC_MODELS))
def test_every_architecture_is_captured(kind: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(kind, dtype, "cuda")
    batch = Batch((asked(1, 9, 20), asked(2, 40, 11), None), Shape(64))
    captured, launched = static_engine(model, "padded:3"), static_engine(model, "padded:3", graphs=False)
    with caplog.at_level(logging.WARNING, logger="stablegen"):
        found, expected = run(captured, batch), run(launched, batch)
    assert not [heard for heard in caplog.records if heard.name.startswith("stablegen")]
    assert_captured(captured)
    for slot, answer in expected.items():
        assert torch.equal(answer.scores.view(torch.int32), found[slot].scores.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_says_what_the_model_says(dtype: str) -> None:
    model = load_model(SMALL, dtype, "cuda")
    exact_model = deepcopy(model).double()
    single, padded = engine_of(dtype, "single"), engine_of(dtype, "padded:4")
    requests = [needle_of(1, 1, 30), needle_of(2, 63, 30), needle_of(3, 40, 30)]
    together = run(padded, Batch((*requests, None), Shape(64)))
    for slot, one in enumerate(requests):
        for answer in (alone(single, one), together[slot]):
            ids = torch.tensor([one.prompt_ids + answer.trace.tokens], device="cuda")
            with torch.inference_mode():
                exact = exact_model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
            error = (answer.scores.double() - exact).norm().item() / exact.norm().item()
            assert error < {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}[dtype]


# --- the promises -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_repeats(compare: Begin, dtype: str) -> None:
    engine = engine_of(dtype, "single")
    comparison = compare("repeated after others", SMALL, engine)
    needle = needle_of()
    expected = alone(engine, needle).scores
    for seed, (length, steps) in enumerate([(1, 12), (21, 40), (300, 9), (21, 12), (600, 5)], start=2):
        alone(engine, needle_of(seed, length, steps))
        comparison.add("after another", expected, alone(engine, needle).scores)
    comparison.add("engine restarted", expected, alone(engine_of(dtype, "single"), needle).scores)
    comparison.assert_equal()


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_company(compare: Begin, dtype: str, rows: int) -> None:
    engine = engine_of(dtype, f"padded:{rows}")
    # neighbours end before the needle, with it and after it
    needle, others = needle_of(1, 21, 20), [needle_of(i, 1 + 8 * i, 1 + 6 * i) for i in range(2, 9)]
    for capacity in (256, 768):
        shape = Shape(128, capacity)
        check = self_check(engine, VOCABULARY, shape)
        assert check.passed, check.checks
        comparison = compare(f"company in a padded batch, capacity {capacity}", SMALL, engine)
        companies = padded_companies(needle, others, rows, 128, moved=check.slot_free)
        expected: Answer | None = None
        for situation, batch in companies.items():
            answers = run(engine, Batch(batch.rows, shape))
            found = next(answers[slot] for slot, one in batch.requests if one is needle)
            expected = expected or found
            comparison.add(situation, expected.scores, found.scores)
        comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_breaks_what_padded_promises(compare: Begin, dtype: str) -> None:
    engine = make_engine(SMALL, "native", dtype, "cuda")
    assert not engine.numerics.static
    comparison = compare("control", SMALL, engine)
    needle, *others = [needle_of(i, 1 + 8 * i, 8) for i in range(1, 17)]
    expected = run(engine, Batch((needle,)))[0].scores
    for size in (1, 3, 7, 15):
        comparison.add(f"{size} others", expected, run(engine, Batch((needle, *others[:size])))[0].scores)
    assert comparison.differing > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_end_token_ends_an_answer(dtype: str) -> None:
    engine = engine_of(dtype, "padded:2")
    other = needle_of(2, 30, 30)
    whole = run(engine, Batch((needle_of(1, 9, 30), other), Shape(64, CAPACITY_STEP)))
    tokens = whole[0].trace.tokens
    for step in (0, 1, 7, 8, 20):
        ending = needle_of(1, 9, 30, eos_token_ids=(tokens[step],))
        batch = Batch((ending, other), Shape(64, CAPACITY_STEP))
        done = {one.composition.slot: one for one in engine.generate(batch)}
        assert done[0].finish_reason == "stop"
        assert done[0].trace.tokens == tokens[: tokens.index(tokens[step]) + 1]
        assert done[0].trace.score_hash == whole[0].trace.score_hash[: len(done[0].trace)]
        assert done[1].trace == whole[1].trace


@pytest.mark.parametrize("dtype", DTYPES)
def test_up_to_the_context(compare: Begin, dtype: str) -> None:
    single, padded = engine_of(dtype, "single"), engine_of(dtype, "padded:2")
    comparison = compare("up to the context", SMALL, single)
    for length, steps in ((CONTEXT - 1, 1), (CONTEXT - 40, 40)):
        one = needle_of(1, length, steps)
        expected = alone(single, one)
        assert len(expected.trace) == steps
        comparison.add("again", expected.scores, alone(single, one).scores)
        (batch,) = Padded(2).plan([one], padded.limits)
        # padding takes places in the KV cache too
        assert batch.shape.capacity is not None and batch.shape.capacity > CONTEXT
        beside = Batch((one, needle_of(2, CONTEXT - 64, 3)), batch.shape)
        comparison.add("beside another", run(padded, batch)[0].scores, run(padded, beside)[0].scores)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_stream_and_a_busy_gpu(compare: Begin, dtype: str) -> None:
    engine = engine_of(dtype, "padded:4")
    comparison = compare("busy GPU, another stream", SMALL, engine)
    batch, other_batch = mixed_batch(), Batch((needle_of(9, 30, 9), None, None, None), Shape(64, 512))
    expected = run(engine, batch)
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    load = torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for trial in range(3):
        with torch.cuda.stream(busy):
            for _ in range(50):
                load @ load
        # stopped in the middle: its last steps may still run while the next batch begins on another stream
        begun = engine.generate(other_batch if trial % 2 else batch)
        next(begun)
        begun.close()
        with torch.cuda.stream(other):
            found = run(engine, batch)
        torch.cuda.synchronize()
        for slot, answer in found.items():
            comparison.add(f"trial {trial}", expected[slot].scores, answer.scores)
    comparison.assert_equal()


@pytest.mark.parametrize("policy", ["single", "padded:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_forcing_its_own_answer_moves_nothing(compare: Begin, dtype: str, policy: str) -> None:
    engine = engine_of(dtype, policy)
    comparison = compare("teacher-forced with its own answer", SMALL, engine)
    batch = mixed_batch() if policy != "single" else Batch((needle_of(2, 60, 20),))
    own = {slot: answer.trace for slot, answer in run(engine, batch).items()}
    for done in engine.follow(batch, {request: own[slot].tokens for slot, request in batch.requests}):
        slot = done.composition.slot
        comparison.add_hashes(f"slot {slot}", own[slot].score_hash, done.trace.score_hash)
    comparison.assert_equal()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_batches_follow_one_another() -> None:
    engine = engine_of("bfloat16", "padded:4")
    first, second = (
        mixed_batch(),
        Batch(tuple(needle_of(seed, 60, 20) for seed in range(5, 9)), Shape(64, CAPACITY_STEP)),
    )
    expected = [{slot: answer.trace for slot, answer in run(engine, batch).items()} for batch in (first, second)]
    assert len(decoders(engine)) == 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for batch, traces in zip((first, second), expected, strict=True):
            assert {one.composition.slot: one.trace for one in engine.generate(batch)} == traces
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_closing_gives_the_memory_back() -> None:
    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def use() -> int:
        engine = engine_of("bfloat16", "padded:4")
        run(engine, mixed_batch())
        held = torch.cuda.memory_allocated()
        engine.close()
        return held

    use()  # what is kept for every engine of the process is there
    before = allocated()
    assert use() > before
    assert allocated() <= before + 2**20


def test_graphs_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("bfloat16", "single")
    one = needle_of()
    expected = {capacity: alone(engine, one, capacity).trace for capacity in (256, 512, 768)}
    assert_captured(engine)
    assert len({decoder._captured[0].pool() for decoder in decoders(engine).values()}) == 1
    # in turns, and captured again after what is kept was given up
    for capacity in (768, 256, 512):
        assert alone(engine, one, capacity).trace == expected[capacity]
    monkeypatch.setattr(module, "KEPT", 1)
    for capacity in (512, 768, 256, 512):
        assert alone(engine, one, capacity).trace == expected[capacity]
        assert list(decoders(engine)) == [(1, capacity)]
    assert_captured(engine)


@pytest.mark.parametrize("policy", ["single", "padded:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_needs_nothing_that_torch_may_give_back(dtype: str, policy: str) -> None:
    engine = engine_of(dtype, policy)
    batch = mixed_batch() if policy != "single" else Batch((needle_of(2, 60, 20),))
    expected = {slot: answer.trace for slot, answer in run(engine, batch).items()}
    assert_captured(engine)
    # as its compiler does, or another graph's end: then the memory is someone else's
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((2**22,), 7, dtype=torch.int32, device="cuda") for _ in range(64)]
    for _ in range(2):
        assert {one.composition.slot: one.trace for one in engine.generate(batch)} == expected
    assert all(bool((other == 7).all()) for other in others)


def test_batches_of_one_shape_may_take_turns() -> None:
    engine = engine_of("bfloat16", "padded:2")
    batches = [Batch((needle_of(seed, 9, 30), needle_of(seed + 1, 30, 2)), Shape(64, CAPACITY_STEP)) for seed in (1, 3)]
    expected = [{slot: answer.trace for slot, answer in run(engine, batch).items()} for batch in batches]
    running = [engine.generate(batch) for batch in batches]
    for slot in (1, 0):
        assert [next(one).trace for one in running] == [traces[slot] for traces in expected]


def test_a_step_that_cannot_be_captured_is_launched() -> None:
    # in a process of its own: a capture that fails may leave traces
    head = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    code = """
import json, logging
import torch
from engines import run
from fixed_shapes import asked, small_model, static_engine
from stablegen.core.policy import Batch, Shape

heard = []
handler = logging.Handler()
handler.emit = lambda record: heard.append(record.getMessage())
logging.getLogger("stablegen").addHandler(handler)
model = small_model("gpt2", device="cuda")
batches = [Batch((asked(1, 9, 12), None), Shape(64, capacity)) for capacity in (256, 512)]
expected = [run(static_engine(model, "padded:2", graphs=False), batch)[0].trace for batch in batches]
looks = []
model.register_forward_hook(lambda module, given, out: looks.append(out.logits.sum().item()))
engine = static_engine(model, "padded:2")
found = [run(engine, batch)[0].trace for batch in batches]
kept = [decoder._captured is None for decoder in engine._static._idle.values()]
random = torch.randn(4, device="cuda").isfinite().all().item()
print(json.dumps([found == expected, kept, len(looks) > 20, random, heard]))
"""
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    same, launched, looked, random, heard = json.loads(done.stdout.splitlines()[-1])
    assert (same, launched, looked, random) == (True, [True, True], True, True)
    assert len(heard) == 1
    assert "cannot be captured as a CUDA graph" in heard[0]


# --- through the client -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["single", "padded:4"])
def test_through_the_client(tmp_path: Path, policy: str) -> None:
    from tokenizers import Tokenizer

    model, tokenizer = load_model("tiny-gpt2", "bfloat16", "cuda"), Tokenizer.from_file(str(TINY / "tokenizer.json"))
    with Client(model, tokenizer, policy=policy, cache_dir=tmp_path / "one") as asking:
        assert {name: getattr(asking.numerics, name) for name in STATIC} == STATIC
        made = asking.complete(["Hello", "What is", "Once upon a time"], max_new_tokens=24)
        assert {done.record.composition.shape.capacity for done in made} == {CAPACITY_STEP}
        assert {done.record.numerics for done in made} == {asking.numerics}
        assert {done.verdict.status for done in made} == {"exact"}
    with Client(model, tokenizer, policy=policy, cache_dir=tmp_path / "one", on_risk="verify") as later:
        again = later.complete(["Once upon a time", "Hello"], max_new_tokens=24)
        assert [(done.cached, done.verdict.status) for done in again] == [(True, "exact")] * 2
    with Client(model, tokenizer, policy=policy, cache_dir=tmp_path / "two") as other:
        fresh = other.complete("Once upon a time", max_new_tokens=24)
    assert fresh.trace == made[2].trace
