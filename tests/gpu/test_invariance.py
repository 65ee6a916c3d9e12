"""What each policy promises, on full score rows, bit for bit, on a GPU; and `native`, which must break it.

Launching as a CUDA graph (property 8) has no counterpart here: the engine knows eager launches only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from invariance import (
    DTYPES,
    SIZES,
    Clients,
    Comparison,
    Packed,
    alone,
    compare_capacities,
    compare_companies_of_client,
    compare_cuts,
    compare_neighbours,
    compare_phases,
    compare_prefill_with_decode,
    compare_sizes,
    compare_slots,
    fingerprints,
    fingerprints_elsewhere,
    load_model,
    make_engine,
    make_ids,
    make_pool,
    make_request,
    own_model,
    padded_companies,
    run,
    shared_engine,
)

from stablegen.engine.base import Engine
from stablegen.engine.gpt2 import GPT2Engine
from stablegen.engine.self_check import self_check
from stablegen.policy import Batch

pytestmark = pytest.mark.gpu

Begin = Callable[[str, str, Engine], Comparison]

SMALL = "gpt2-small"
"""Random weights: the shapes of the real one."""
VOCABULARY = 50257
CONTEXT = 1024


@pytest.fixture(params=[SMALL, "mini-gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    """Return each model in turn; the trained one only where its directory is named."""
    return SMALL if request.param == SMALL else request.getfixturevalue("mini_gpt2")


def engine_of(name: str, policy: str, dtype: str) -> Engine:
    return shared_engine(name, policy, dtype, "cuda")


def needle_of(length: int = 21, steps: int = 4) -> Any:
    return make_request(make_ids(1000, length, VOCABULARY), steps)


# --- invariant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_size(compare: Begin, name: str, dtype: str) -> None:
    engine = engine_of(name, "invariant", dtype)
    comparison = compare("batch size", name, engine)
    compare_sizes(comparison, engine, make_pool(name, longest=24), SIZES)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_slot_and_permutation(compare: Begin, dtype: str) -> None:
    engine = engine_of(SMALL, "invariant", dtype)
    comparison = compare("slot", SMALL, engine)
    compare_slots(comparison, engine, needle_of(), make_pool(SMALL, count=18))
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours(compare: Begin, dtype: str) -> None:
    engine = engine_of(SMALL, "invariant", dtype)
    comparison = compare("neighbours", SMALL, engine)
    compare_neighbours(comparison, engine, needle_of(), VOCABULARY, [1, 33, 64, 300, 900])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_needle_among_fillers(compare: Begin, name: str, dtype: str) -> None:
    engine = engine_of(name, "invariant", dtype)
    comparison = compare("needle among fillers", name, engine)
    needle = needle_of(100, steps=6)
    expected = alone(engine, needle).scores
    for trial in range(3):
        draw = random.Random(trial)
        # most are short, some reach 900 tokens
        lengths = [900, *(int(900 ** draw.random()) for _ in range(draw.randrange(62, 126)))]
        draw.shuffle(lengths)
        rows = [make_request(make_ids(i, n, VOCABULARY), draw.randrange(1, 9)) for i, n in enumerate(lengths)]
        slot = draw.randrange(len(rows) + 1)
        answers = run(engine, Batch((*rows[:slot], needle, *rows[slot:])))
        comparison.add(f"trial {trial}: slot {slot} of {len(rows) + 1}", expected, answers[slot].scores)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_another_phase(compare: Begin, dtype: str) -> None:
    comparison = compare("phase", SMALL, engine_of(SMALL, "invariant", dtype))
    compare_phases(comparison, own_model(SMALL, dtype, "cuda"), VOCABULARY, [1, 15, 16, 17, 64])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_pieces(compare: Begin, name: str, dtype: str) -> None:
    comparison = compare("chunked prefill", name, engine_of(name, "invariant", dtype))
    cuts = [[at] for at in range(1, 130, 7)] + [[63], [64], [65], [127], [128], [129], [1, 2, 3], list(range(1, 130))]
    compare_cuts(comparison, own_model(name, dtype, "cuda"), make_ids(5, 130, VOCABULARY), cuts)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_chunks_of_the_engine(compare: Begin, dtype: str) -> None:
    whole = engine_of(SMALL, "invariant", dtype)
    assert isinstance(whole, GPT2Engine)
    comparison = compare("chunked prefill of a batch", SMALL, whole)
    batch = Batch((needle_of(130), *make_pool(SMALL, count=16, longest=90)))
    expected = run(whole, batch)
    for chunk in (16, 17, 63, 64, 65, 257):
        for slot, answer in run(GPT2Engine(whole.model, whole.numerics, chunk=chunk), batch).items():
            comparison.add(f"chunks of {chunk}", expected[slot].scores, answer.scores)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_is_decode(compare: Begin, name: str, dtype: str) -> None:
    engine = engine_of(name, "invariant", dtype)
    comparison = compare("prefill against decode", name, engine)
    for length in (12, 60, 125):
        compare_prefill_with_decode(comparison, engine, needle_of(length, steps=8))
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_context(compare: Begin, name: str, dtype: str) -> None:
    comparison = compare("whole context", name, engine_of(name, "invariant", dtype))
    # around each edge of a key block the tokens are decoded one by one
    cuts = [at + i for at in (64, 128, 512, 960, CONTEXT - 3) for i in (-1, 0, 1, 2)]
    compare_cuts(comparison, own_model(name, dtype, "cuda"), make_ids(6, CONTEXT, VOCABULARY), [cuts])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_length_and_past_of_the_cache(compare: Begin, dtype: str) -> None:
    comparison = compare("KV cache length", SMALL, engine_of(SMALL, "invariant", dtype))
    compare_capacities(comparison, own_model(SMALL, dtype, "cuda"), VOCABULARY)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_stream_and_a_busy_gpu(compare: Begin, dtype: str) -> None:
    engine = engine_of(SMALL, "invariant", dtype)
    comparison = compare("busy GPU, another stream", SMALL, engine)
    batch = Batch(tuple(make_pool(SMALL, count=9)))
    expected = run(engine, batch)
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    load = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for trial in range(3):
        with torch.cuda.stream(busy):
            for _ in range(100):
                load @ load
        for slot, answer in run(engine, batch).items():
            comparison.add(f"busy {trial}", expected[slot].scores, answer.scores)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        found = run(engine, batch)
    torch.cuda.synchronize()
    for slot, answer in found.items():
        comparison.add("another stream", expected[slot].scores, answer.scores)
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
        check = self_check(engine, VOCABULARY, width)
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
