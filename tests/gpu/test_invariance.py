"""What each policy promises, on full score rows, bit for bit, on a GPU; and `native`, which must break it."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import (
    SIZES,
    Comparison,
    compare_capacities,
    compare_cuts,
    compare_edges,
    compare_interleaved,
    compare_limits,
    compare_needle,
    compare_neighbours,
    compare_out_of_memory,
    compare_phases,
    compare_prefill_with_decode,
    compare_prefixes,
    compare_sizes,
    compare_slots,
    compare_teacher_forced,
    compare_whole_context,
    padded_companies,
)
from engines import (
    DTYPES,
    Packed,
    alone,
    invariant_engine,
    load_model,
    make_engine,
    make_ids,
    make_pool,
    make_request,
    own_model,
    run,
    shared_engine,
    traces,
    watch_passes,
)
from invariance import (
    RESULTS,
    Clients,
    compare_companies_of_client,
    compare_replayed,
    exact_engine,
    fingerprints,
    fingerprints_elsewhere,
    obstacle,
)

from stablegen.core.policy import Batch, Shape, load_policy
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.loading import kernels_for
from stablegen.engine.self_check import self_check
from stablegen.machine.plan import find_device, numerics_on

pytestmark = pytest.mark.gpu

Begin = Callable[[str, str, Any], Comparison]
"""Begins the comparison of a property, with a model, under an engine's numerics or a client's."""

SMALL = "gpt2-small"
"""Random weights: the shapes of the real one."""
VOCABULARY = 50257
CONTEXT = 1024
GIB = 2**30


@pytest.fixture(params=[SMALL, "mini-gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    """Return each model in turn; the trained one only where its directory is named."""
    return SMALL if request.param == SMALL else request.getfixturevalue("mini_gpt2")


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """Leave the device's memory to the tests of other processes."""
    yield
    torch.cuda.empty_cache()


def invariant(name: str, dtype: str, **settings: Any) -> InvariantEngine:
    """Return a new engine whose KV cache leaves room for those of other processes."""
    return invariant_engine(name, dtype, "cuda", **({"kv_cache_size": GIB} | settings))


def engine_of(name: str, policy: str, dtype: str) -> Engine:
    return invariant(name, dtype) if policy == "invariant" else shared_engine(name, policy, dtype, "cuda")


def needle_of(length: int = 21, steps: int = 4) -> Any:
    return make_request(make_ids(1000, length, VOCABULARY), steps)


# --- invariant: the company -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [256, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_size(compare: Begin, name: str, dtype: str, at_once: int) -> None:
    engine = invariant(name, dtype, max_rows=at_once, chunk=8192, kv_cache_size=2 * GIB)
    comparison = compare(f"batch size, {at_once} rows at once", name, engine)
    sizes = SIZES if at_once == 512 else [1, 17, 129, 255, 256, 257]
    with watch_passes() as passes:
        compare_sizes(comparison, engine, make_pool(name, longest=24, least=2), sizes)
    decoding = {len(pieces) for pieces in passes if all(piece.start < 0 for piece in pieces)}
    assert decoding >= {min(size, at_once) for size in sizes}
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_slot_and_permutation(compare: Begin, dtype: str) -> None:
    engine = invariant(SMALL, dtype)
    comparison = compare("slot", SMALL, engine)
    compare_slots(comparison, engine, needle_of(), make_pool(SMALL, count=18))
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours(compare: Begin, dtype: str) -> None:
    engine = invariant(SMALL, dtype)
    comparison = compare("neighbours", SMALL, engine)
    compare_neighbours(comparison, engine, needle_of(), VOCABULARY, [1, 2, 33, 64, 65, 300, 1000])
    comparison.assert_equal()


@pytest.mark.parametrize("chunk", [17, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_is_computed_while_the_needle_decodes(compare: Begin, dtype: str, chunk: int) -> None:
    engine = invariant(SMALL, dtype, chunk=chunk)
    comparison = compare("a prefill beside", SMALL, engine)
    compare_interleaved(comparison, engine, needle_of(steps=20), VOCABULARY, [1, 65, 300, 1000])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_needle_among_fillers(compare: Begin, name: str, dtype: str) -> None:
    engine = invariant(name, dtype, kv_cache_size=2 * GIB)
    comparison = compare("needle among fillers", name, engine)
    compare_needle(comparison, engine, needle_of(100, steps=6), VOCABULARY, trials=5, rows=64, longest=900)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_another_phase(compare: Begin, dtype: str) -> None:
    comparison = compare("phase", SMALL, invariant(SMALL, dtype))
    compare_phases(comparison, own_model(SMALL, dtype, "cuda"), VOCABULARY, [1, 15, 16, 17, 64])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_of_the_engine(compare: Begin, dtype: str) -> None:
    make = partial(invariant, SMALL, dtype)
    comparison = compare("rows, pages and chunks bounded", SMALL, make())
    compare_limits(comparison, make, [needle_of(130), *make_pool(SMALL, count=20, longest=90)])
    comparison.assert_equal()


# --- invariant: prefill, decode and what is kept ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_pieces(compare: Begin, name: str, dtype: str) -> None:
    comparison = compare("chunked prefill", name, invariant(name, dtype))
    cuts = [[at] for at in range(1, 130)] + [[1, 2, 3], [16, 32, 48, 64], [63, 65, 127, 129], list(range(1, 130))]
    compare_cuts(comparison, own_model(name, dtype, "cuda"), make_ids(5, 130, VOCABULARY), cuts)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_chunks_of_the_engine(compare: Begin, dtype: str) -> None:
    comparison = compare("chunked prefill of a batch", SMALL, invariant(SMALL, dtype))
    batch = Batch((needle_of(130), *make_pool(SMALL, count=16, longest=90)))
    expected = run(invariant(SMALL, dtype), batch)
    for chunk in (16, 17, 63, 64, 65, 257):
        for slot, answer in run(invariant(SMALL, dtype, chunk=chunk), batch).items():
            comparison.add(f"chunks of {chunk}", expected[slot].scores, answer.scores)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_is_decode(compare: Begin, name: str, dtype: str) -> None:
    engine = invariant(name, dtype)
    comparison = compare("prefill against decode", name, engine)
    for length in (12, 60, 125):
        compare_prefill_with_decode(comparison, engine, needle_of(length, steps=8))
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_over_every_edge_of_a_page(compare: Begin, name: str, dtype: str) -> None:
    engine = invariant(name, dtype, kv_cache_size=2 * GIB)
    comparison = compare("edges of pages", name, engine)
    compare_edges(comparison, engine, VOCABULARY)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_context_decoded(compare: Begin, name: str, dtype: str) -> None:
    engine = invariant(name, dtype)
    assert engine.limits.context == CONTEXT
    comparison = compare("whole context", name, engine)
    compare_whole_context(comparison, engine, VOCABULARY)
    # and computed in one piece but for the tokens around the edges
    cuts = [at + i for at in (64, 128, 512, 960, CONTEXT - 3) for i in (-1, 0, 1, 2)]
    compare_cuts(comparison, engine.model, make_ids(6, CONTEXT, VOCABULARY), [cuts])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_length_and_past_of_the_cache(compare: Begin, dtype: str) -> None:
    comparison = compare("KV cache length", SMALL, invariant(SMALL, dtype))
    compare_capacities(comparison, own_model(SMALL, dtype, "cuda"), VOCABULARY)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_forced_answers(compare: Begin, name: str, dtype: str) -> None:
    engine = invariant(name, dtype)
    comparison = compare("teacher-forced answers", name, engine)
    # more steps than a pass may choose
    pool = [make_request(make_ids(i, 1 + 9 * i, VOCABULARY), 128 - 3 * i) for i in range(40)]
    compare_teacher_forced(comparison, engine, pool)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_prefixes(compare: Begin, name: str, dtype: str) -> None:
    make = partial(invariant, name, dtype)
    comparison = compare("shared prefixes", name, make())
    compare_prefixes(comparison, make, VOCABULARY)
    comparison.assert_equal()


# --- invariant: how it runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_moves_no_bit(compare: Begin, name: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    # one pass for all prompts, and room for all rows
    make = partial(invariant, name, dtype, max_rows=300, chunk=8192, kv_cache_size=2 * GIB)
    recorded, launched = make(), make(graphs=False)
    comparison = compare("graph against launch", name, recorded)
    buckets = {1: 1, 2: 2, 3: 4, 17: 32, 65: 96, 200: 256, 257: 300}
    with caplog.at_level(logging.WARNING, logger="stablegen"):
        for size in buckets:
            batch = Batch(tuple(make_request(make_ids(i, 1 + 5 * i % 24, VOCABULARY), 6) for i in range(size)))
            expected = run(launched, batch)
            for slot, answer in run(recorded, batch).items():
                comparison.add(f"{size} rows", expected[slot].scores, answer.scores)
            for engine in (launched, recorded):
                for slot, trace in traces(engine, batch).items():
                    where = f"{size} rows, not observed"
                    comparison.add_hashes(where, expected[slot].trace.score_hash, trace.score_hash)
    assert not [heard for heard in caplog.records if heard.name.startswith("stablegen")]
    assert recorded._memory is not None and launched._memory is not None
    graphs = recorded._memory.steps._recorded
    assert set(graphs) == {(bucket, observed) for bucket in buckets.values() for observed in (True, False)}
    packed = recorded._memory.packed._recorded
    pools = {graph.pool() for graph, _ in graphs.values()} | {one.graph.pool() for one in packed.values()}
    assert len(pools) == 1
    assert not launched._memory.steps._recorded and not launched._memory.packed._recorded
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recorded_packed_pass_moves_no_bit(compare: Begin, name: str, dtype: str) -> None:
    recorded, launched = invariant(name, dtype), invariant(name, dtype, graphs=False)
    comparison = compare("packed graph against launch", name, recorded)
    for size in (1, 2, 5, 9):  # one tile and several, choices that fill a bucket and that do not
        requests = [make_request(make_ids(i, 40 + 3 * i, VOCABULARY), 12) for i in range(size)]
        batch = Batch(tuple(requests))
        expected = run(launched, batch)
        answers = {request: expected[slot].trace.tokens for slot, request in enumerate(requests)}
        for again in range(4):
            for engine in (launched, recorded):
                engine.forget()
            observed = again % 2 == 0
            if observed:
                for slot, answer in run(recorded, batch).items():
                    comparison.add(f"{size} prompts, {again}", expected[slot].scores, answer.scores)
            for slot, trace in traces(recorded, batch).items():
                comparison.add_hashes(f"{size} prompts, {again}", expected[slot].trace.score_hash, trace.score_hash)
            for done in recorded.follow(batch, answers):
                known = expected[done.composition.slot].trace.score_hash
                comparison.add_hashes(f"{size} answers, {again}", known, done.trace.score_hash)
    assert recorded._memory is not None
    choices = {(key.size[2], key.vocabulary is not None) for key in recorded._memory.packed._recorded}
    assert choices >= {(1, True), (1, False), (2, True), (2, False), (8, False), (16, False)}, choices
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_stream_and_a_busy_gpu(compare: Begin, dtype: str) -> None:
    engine = invariant(SMALL, dtype)
    comparison = compare("busy GPU, another stream", SMALL, engine)
    batch, longer = Batch(tuple(make_pool(SMALL, count=9))), Batch((needle_of(300, steps=100), needle_of(9, steps=2)))
    expected = run(engine, batch)
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    load = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for trial in range(3):
        with torch.cuda.stream(busy):
            for _ in range(50):
                load @ load
        for slot, answer in run(engine, batch).items():
            comparison.add(f"busy {trial}", expected[slot].scores, answer.scores)
        # stopped in the middle: its passes may still run while the next batch begins on another stream
        begun = engine.generate(longer)
        next(begun)
        begun.close()
        with torch.cuda.stream(other):
            found = run(engine, batch)
        torch.cuda.synchronize()
        for slot, answer in found.items():
            comparison.add(f"another stream {trial}", expected[slot].scores, answer.scores)
    with torch.cuda.stream(other):
        found = run(invariant(SMALL, dtype), batch)
    torch.cuda.synchronize()
    for slot, answer in found.items():
        comparison.add("a new engine on another stream", expected[slot].scores, answer.scores)
    comparison.assert_equal()


@pytest.mark.parametrize("policy", ["invariant", "single"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_restart_of_the_engine(compare: Begin, policy: str, dtype: str) -> None:
    first, second = engine_of(SMALL, policy, dtype), make_engine(SMALL, policy, dtype, "cuda")
    assert first.numerics == second.numerics
    comparison = compare("engine restart", SMALL, first)
    for request in make_pool(SMALL, count=3, seed=40):
        comparison.add("restarted", alone(first, request).scores, alone(second, request).scores)
    comparison.assert_equal()


def test_another_process(compare: Begin) -> None:
    here, there = fingerprints(SMALL, "cuda"), fingerprints_elsewhere(SMALL, "cuda")
    assert here.keys() == there.keys()
    for setup, mine in here.items():
        comparison = compare("another process", SMALL, engine_of(SMALL, *setup.split()))
        assert mine["numerics"] == there[setup]["numerics"]
        comparison.add_hashes(setup, mine["hashes"], there[setup]["hashes"])
        comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_gpu_of_the_architecture(compare: Begin, dtype: str) -> None:
    engine = exact_engine("small", dtype, "cuda", kv_cache_size=GIB)
    capability = engine.numerics.compute_capability
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("replay-*.json"))]
    files = [kept for kept in files if kept["compute_capability"] == capability]
    if not files:
        pytest.skip(f"{RESULTS.name} has no replay-*.json of compute capability {capability}")
    obstacles = [obstacle(kept, dtype, engine.numerics) for kept in files]
    if all(obstacles):
        pytest.skip("; ".join(map(str, obstacles)))
    comparison = compare("another GPU of the architecture", SMALL, engine)
    for kept, reason in zip(files, obstacles, strict=True):
        if reason is None:
            compare_replayed(comparison, kept, dtype, engine)
    comparison.assert_equal()


# --- invariant: memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_memory(compare: Begin, dtype: str) -> None:
    make = partial(invariant, SMALL, dtype)
    comparison = compare("out of memory", SMALL, make())
    compare_out_of_memory(comparison, make, VOCABULARY, ["attention", "partial"])
    comparison.assert_equal()


def test_memory_of_a_batch() -> None:
    model, dtype, device = load_model(SMALL), "bfloat16", torch.device("cuda")
    numerics = numerics_on(find_device("cuda", dtype), load_policy("invariant"), dtype)
    batch = Batch(tuple(make_request(make_ids(i, 128 + i, VOCABULARY), 64) for i in range(64)))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    own = GPT2(model.config.to_dict(), model.state_dict(), kernels_for(device), dtype=torch.bfloat16, device=device)
    engine = InvariantEngine(own, numerics, kv_cache_size=GIB)
    with watch_passes() as passes:
        assert len(traces(engine, batch)) == 64
    assert max(map(len, passes)) == 64
    taken, held = torch.cuda.max_memory_allocated() - before, engine.memory()
    planned = sum(held.values())
    said = f"{taken / 2**20:.0f} MiB at most, {taken / planned:.3f} of {planned / 2**20:.0f} MiB: {held}"
    print(said)
    assert taken <= 1.15 * planned, said
    assert held["kv_cache"] <= 1.01 * GIB, said


def test_closing_gives_the_memory_back() -> None:
    model, device = load_model(SMALL), torch.device("cuda")
    numerics = numerics_on(find_device("cuda", "bfloat16"), load_policy("invariant"), "bfloat16")
    sampled = {"do_sample": True, "seed": 1, "top_k": 50}
    plain = make_request(make_ids(1, 40, VOCABULARY), 20)
    asked = replace(plain, params=plain.params.model_copy(update=sampled))

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def use() -> int:
        own = GPT2(model.config.to_dict(), model.state_dict(), kernels_for(device), dtype=torch.bfloat16, device=device)
        engine = InvariantEngine(own, numerics, kv_cache_size=GIB)
        del own
        for request in (plain, asked):
            assert len(list(engine.generate(Batch((request,))))) == 1
        held = torch.cuda.memory_allocated()
        engine.close()
        return held

    use()  # what is kept for every engine of the process is there
    before = allocated()
    assert use() > before + GIB
    assert allocated() <= before + 2**20


# --- invariant: accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_is_as_accurate_as_transformers(name: str, dtype: str) -> None:
    ids = make_ids(8, 130, VOCABULARY)
    prompt = torch.tensor([ids], device="cuda")
    ours = Packed(own_model(name, dtype, "cuda")).feed((0, ids))[0].double()
    with torch.inference_mode():
        theirs = load_model(name, dtype, "cuda")(input_ids=prompt).logits[0].double()
        exact = deepcopy(load_model(name, dtype, "cuda")).double()(input_ids=prompt).logits[0]
    error, their_error = ((found - exact).norm().item() / exact.norm().item() for found in (ours, theirs))
    assert error < {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
    assert error < 4 * their_error


# --- single and padded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_repeats(compare: Begin, dtype: str) -> None:
    engine = engine_of(SMALL, "single", dtype)
    comparison = compare("repeated after others", SMALL, engine)
    needle = needle_of()
    first = alone(engine, needle)
    comparison.add("again", first.scores, alone(engine, needle).scores)
    for other in make_pool(SMALL, count=5, longest=200):
        alone(engine, other)
        comparison.add("after others", first.scores, alone(engine, needle).scores)
    comparison.assert_equal()


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_company(compare: Begin, name: str, dtype: str, rows: int) -> None:
    engine = engine_of(name, f"padded:{rows}", dtype)
    for width, longest in ((64, 60), (192, 180)):
        check = self_check(engine, VOCABULARY, Shape(width))
        assert check.passed, check.checks
        comparison = compare(f"company in a padded batch, width {width}", name, engine)
        needle, others = needle_of(), make_pool(name, count=7, longest=longest)
        companies = padded_companies(needle, others, rows, width, moved=check.slot_free)
        expected = run(engine, companies.pop("alone"))[0].scores
        for situation, batch in companies.items():
            answers = run(engine, batch)
            found = next(answers[slot] for slot, request in batch.requests if request is needle)
            comparison.add(situation, expected, found.scores)
        comparison.assert_equal()


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [(policy, dtype) for policy in ("invariant", "padded:4") for dtype in DTYPES]
    + [("single", "bfloat16"), ("padded:8", "bfloat16")],
)
def test_company_through_the_client(compare: Begin, tmp_path: Path, policy: str, dtype: str) -> None:
    clients = Clients(tmp_path, SMALL, policy, dtype, "cuda")
    assert clients.check.passed, clients.check.checks
    comparison = compare("company through the client", SMALL, clients)
    prompts = [make_ids(i, length, VOCABULARY) for i, length in enumerate((21, 40, 1, 63, 12, 100))]
    records = compare_companies_of_client(comparison, clients, prompts)
    slots = {record.composition.slot for record in records}
    if policy == "single" or not clients.check.slot_free:
        assert slots == {0}
    else:
        assert len(slots) > 2
    assert {record.numerics for record in records} == {engine_of(SMALL, policy, dtype).numerics}
    comparison.assert_equal()


# --- the control ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_breaks_what_the_others_promise(compare: Begin, name: str, dtype: str) -> None:
    engine = engine_of(name, "native", dtype)
    comparison = compare("control", name, engine)
    compare_sizes(comparison, engine, make_pool(name), [2, 3, 8, 16, 33, 64, 128, 257])
    compare_neighbours(comparison, engine, needle_of(), VOCABULARY, [1, 33, 300])
    compare_slots(comparison, engine, needle_of(), make_pool(name, count=8))
    compare_prefill_with_decode(comparison, engine, needle_of(60, steps=8))
    assert comparison.differing > 0, "no bit moved under native: these tests show nothing here"
