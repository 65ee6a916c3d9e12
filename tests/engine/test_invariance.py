"""What each policy promises, on full score rows, bit for bit, on a CPU; and `native`, which must break it.

Recording a CUDA graph (property 8) has no counterpart here: a CPU launches every pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import invariance
import pytest
import torch
from broken_kernels import (
    AttentionByPages,
    AttentionByTokens,
    LoneDecode,
    ManyRowsDecode,
    SplitByBatch,
    SplitByLargeBatch,
    SplitBySlot,
)
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
    OTHER_ARCHITECTURES,
    TINY,
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
    vocabulary_of,
    watch_leases,
    watch_passes,
)
from invariance import Clients, compare_companies_of_client, exact_engine, fingerprints, fingerprints_elsewhere, main

from stablegen.client import Client
from stablegen.core.policy import Batch, Shape
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.self_check import self_check
from stablegen.errors import PolicyError, PromiseWarning
from stablegen.kernels.base import KernelSet
from stablegen.kernels.reference import ReferenceKernels

Begin = Callable[[str, str, Any], Comparison]
"""Begins the comparison of a property, with a model, under an engine's numerics or a client's."""

GPT2S = ("random-gpt2", "tiny-gpt2")
PROMPT = 21


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Leave the other processors to other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def needle_of(name: str, length: int = PROMPT, steps: int = 4) -> Any:
    return make_request(make_ids(1000, length, vocabulary_of(name)), steps)


# --- invariant --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "largest", "at_once"),
    [
        ("random-gpt2", "float32", 257, 512),
        ("random-gpt2", "float16", 65, 65),
        ("random-gpt2", "bfloat16", 65, 16),
        *[("tiny-gpt2", dtype, 17, 16) for dtype in DTYPES],
    ],
)
def test_batch_size(compare: Begin, name: str, dtype: str, largest: int, at_once: int) -> None:
    engine = invariant_engine(name, dtype, max_rows=at_once)
    comparison = compare("batch size", name, engine)
    with watch_passes() as passes:
        compare_sizes(comparison, engine, make_pool(name), [size for size in SIZES if size <= largest])
    assert max(map(len, passes)) == min(largest, at_once)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_whether_the_scores_are_observed(compare: Begin, dtype: str) -> None:
    engine = shared_engine("random-gpt2", "invariant", dtype)
    comparison = compare("observed or not", "random-gpt2", engine)
    batch = Batch(tuple(make_request(make_ids(i, 1 + 5 * i, 1031), 1 + 7 * i % 19) for i in range(20)))
    observed = run(engine, batch)
    for slot, trace in traces(engine, batch).items():
        comparison.add_hashes("not observed", observed[slot].trace.score_hash, trace.score_hash)
        assert trace == observed[slot].trace
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GPT2S)
def test_slot_and_permutation(compare: Begin, name: str, dtype: str) -> None:
    engine = shared_engine(name, "invariant", dtype)
    comparison = compare("slot", name, engine)
    compare_slots(comparison, engine, needle_of(name), make_pool(name, count=8))
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GPT2S)
def test_neighbours(compare: Begin, name: str, dtype: str) -> None:
    engine = shared_engine(name, "invariant", dtype)
    comparison = compare("neighbours", name, engine)
    compare_neighbours(comparison, engine, needle_of(name), vocabulary_of(name), [1, 33, 100])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GPT2S)
def test_neighbours_in_another_phase(compare: Begin, name: str, dtype: str) -> None:
    comparison = compare("phase", name, shared_engine(name, "invariant", dtype))
    compare_phases(comparison, own_model(name, dtype), vocabulary_of(name), [1, 5, 16, 17])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_is_computed_while_the_needle_decodes(compare: Begin, dtype: str) -> None:
    engine = invariant_engine("random-gpt2", dtype, chunk=17)
    comparison = compare("a prefill beside", "random-gpt2", engine)
    compare_interleaved(comparison, engine, needle_of("random-gpt2", steps=9), 1031, [1, 60, 180])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_needle_among_fillers(compare: Begin, dtype: str) -> None:
    engine = shared_engine("random-gpt2", "invariant", dtype)
    comparison = compare("needle among fillers", "random-gpt2", engine)
    compare_needle(comparison, engine, needle_of("random-gpt2", 90, 6), 1031, trials=2, rows=8, longest=180)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_of_the_engine(compare: Begin, dtype: str) -> None:
    make = partial(invariant_engine, "random-gpt2", dtype)
    comparison = compare("rows, pages and chunks bounded", "random-gpt2", make())
    compare_limits(comparison, make, [needle_of("random-gpt2", 130), *make_pool("random-gpt2", count=8, longest=70)])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_forced_answers(compare: Begin, dtype: str) -> None:
    engine = invariant_engine("random-gpt2", dtype)
    comparison = compare("teacher-forced answers", "random-gpt2", engine)
    pool = [make_request(make_ids(i, 1 + 9 * i, 1031), 1 + 11 * i % 40) for i in range(8)]
    compare_teacher_forced(comparison, engine, pool)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_prefixes(compare: Begin, dtype: str) -> None:
    make = partial(invariant_engine, "random-gpt2", dtype)
    comparison = compare("shared prefixes", "random-gpt2", make())
    compare_prefixes(comparison, make, 1031)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_of_memory(compare: Begin, dtype: str) -> None:
    make = partial(invariant_engine, "random-gpt2", dtype)
    comparison = compare("out of memory", "random-gpt2", make())
    compare_out_of_memory(comparison, make, 1031, ["attention"])
    comparison.assert_equal()


@pytest.mark.parametrize(
    ("name", "dtype", "every"),
    [("random-gpt2", "float32", 1), ("random-gpt2", "float16", 3), ("random-gpt2", "bfloat16", 3)]
    + [("tiny-gpt2", dtype, 11) for dtype in DTYPES],
)
def test_prefill_in_pieces(compare: Begin, name: str, dtype: str, every: int) -> None:
    comparison = compare("chunked prefill", name, shared_engine(name, "invariant", dtype))
    cuts = [[at] for at in range(1, 70, every)] + [[1, 2, 3], [16, 32, 48, 64], [15, 17, 63, 65], list(range(1, 70))]
    compare_cuts(comparison, own_model(name, dtype), make_ids(5, 70, vocabulary_of(name)), cuts)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_chunks_of_the_engine(compare: Begin, dtype: str) -> None:
    whole = shared_engine("random-gpt2", "invariant", dtype)
    assert isinstance(whole, InvariantEngine)
    comparison = compare("chunked prefill of a batch", "random-gpt2", whole)
    batch = Batch((needle_of("random-gpt2", 70), *make_pool("random-gpt2", count=5)))
    expected = run(whole, batch)
    for chunk in (1, 2, 7, 16, 63, 64, 65):
        for slot, answer in run(InvariantEngine(whole.model, whole.numerics, chunk=chunk), batch).items():
            comparison.add(f"chunks of {chunk}", expected[slot].scores, answer.scores)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GPT2S)
def test_prefill_is_decode(compare: Begin, name: str, dtype: str) -> None:
    engine = shared_engine(name, "invariant", dtype)
    comparison = compare("prefill against decode", name, engine)
    compare_prefill_with_decode(comparison, engine, needle_of(name, 60, steps=8))  # across a block of 64 keys
    comparison.assert_equal()


def test_prefill_is_decode_in_a_long_context(compare: Begin) -> None:
    comparison = compare("long context", "tiny-gpt2", shared_engine("tiny-gpt2", "invariant", "float32"))
    edges = [127, 128, 129, 191, 192, 193, 511, 512, 513, 575, 576, 577]
    compare_cuts(comparison, own_model("tiny-gpt2", "float32"), make_ids(6, 600, 4096), [edges])
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_over_every_edge_of_a_page(compare: Begin, dtype: str) -> None:
    engine = invariant_engine("random-gpt2", dtype)
    comparison = compare("edges of pages", "random-gpt2", engine)
    compare_edges(comparison, engine, 1031)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_context_decoded(compare: Begin, dtype: str) -> None:
    engine = invariant_engine("random-gpt2", dtype)
    comparison = compare("whole context", "random-gpt2", engine)
    compare_whole_context(comparison, engine, 1031)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GPT2S)
def test_length_and_past_of_the_cache(compare: Begin, name: str, dtype: str) -> None:
    comparison = compare("KV cache length", name, shared_engine(name, "invariant", dtype))
    compare_capacities(comparison, own_model(name, dtype), vocabulary_of(name))
    comparison.assert_equal()


@pytest.mark.parametrize("policy", ["invariant", "single"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_restart_of_the_engine(compare: Begin, policy: str, dtype: str) -> None:
    first, second = (make_engine("random-gpt2", policy, dtype) for _ in range(2))
    assert first.numerics == second.numerics
    comparison = compare("engine restart", "random-gpt2", first)
    for request in make_pool("random-gpt2", count=3, seed=40):
        comparison.add("restarted", alone(first, request).scores, alone(second, request).scores)
    comparison.assert_equal()


def test_another_process(compare: Begin) -> None:
    here, there = fingerprints("random-gpt2", "cpu"), fingerprints_elsewhere("random-gpt2", "cpu")
    assert here.keys() == there.keys()
    for setup, mine in here.items():
        policy, dtype = setup.split()
        comparison = compare("another process", "random-gpt2", shared_engine("random-gpt2", policy, dtype))
        assert mine["numerics"] == there[setup]["numerics"]
        comparison.add_hashes(setup, mine["hashes"], there[setup]["hashes"])
        comparison.assert_equal()


def test_what_is_recorded_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", str(tmp_path), "--device", "cpu", "--size", "tiny"]) == 0
    (file,) = tmp_path.glob("replay-*.json")
    assert capsys.readouterr().out.split() == [str(file)]
    kept = json.loads(file.read_text(encoding="utf-8"))
    paths = os.pathsep.join(filter(None, [str(Path(TINY).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(invariance.__file__), "replay", str(file), "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(DTYPES, "equal")

    kept["dtypes"]["float16"]["answers"][3] = "another"
    kept["dtypes"]["bfloat16"]["numerics"]["torch"] = "1.0"
    kept["dtypes"]["float32"]["numerics"] |= {"device_model": "another", "sm_count": 1}
    file.write_text(json.dumps(kept), encoding="utf-8")
    assert main(["replay", str(file), "--device", "cpu"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["float32"] == "equal"
    assert told["float16"] == "1 answers differ"
    assert "torch 1.0 there" in told["bfloat16"]


# --- single and padded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["random-gpt2", "tiny-gpt2", *OTHER_ARCHITECTURES])
def test_single_repeats(compare: Begin, name: str, dtype: str) -> None:
    engine = shared_engine(name, "single", dtype)
    comparison = compare("repeated after others", name, engine)
    needle = needle_of(name, 9)
    first = alone(engine, needle)
    comparison.add("again", first.scores, alone(engine, needle).scores)
    for other in make_pool(name, count=3):
        alone(engine, other)
        comparison.add("after others", first.scores, alone(engine, needle).scores)
    comparison.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "rows"),
    [
        *[(name, dtype, rows) for name in GPT2S for dtype in ("float32", "bfloat16") for rows in (4, 8)],
        ("random-gpt2", "float16", 2),  # transformers computes it slowly on a CPU
        *[(name, dtype, 4) for name in OTHER_ARCHITECTURES for dtype in ("float32", "bfloat16")],
    ],
)
def test_padded_company(compare: Begin, name: str, dtype: str, rows: int) -> None:
    engine = shared_engine(name, f"padded:{rows}", dtype)
    check = self_check(engine, vocabulary_of(name), Shape(64))
    assert check.passed, check.checks
    comparison = compare("company in a padded batch", name, engine)
    needle, others = needle_of(name), make_pool(name, count=7, longest=60)
    companies = padded_companies(needle, others, rows, 64, moved=check.slot_free)
    expected = run(engine, companies.pop("alone"))[0].scores
    for situation, batch in companies.items():
        answers = run(engine, batch)
        found = next(answers[slot] for slot, request in batch.requests if request is needle)
        comparison.add(situation, expected, found.scores)
    comparison.assert_equal()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "dtype"),
    [(policy, "float32") for policy in ("invariant", "single", "padded:4", "padded:8")]
    + [(policy, "bfloat16") for policy in ("invariant", "padded:4")],
)
def test_company_through_the_client(compare: Begin, tmp_path: Path, policy: str, dtype: str) -> None:
    clients = Clients(tmp_path, "random-gpt2", policy, dtype)
    assert clients.check.passed, clients.check.checks
    comparison = compare("company through the client", "random-gpt2", clients)
    prompts = [make_ids(i, length, 1031) for i, length in enumerate((21, 40, 1, 63, 12, 100))]
    records = compare_companies_of_client(comparison, clients, prompts)
    slots = {record.composition.slot for record in records}
    if policy == "single" or not clients.check.slot_free:
        assert slots == {0}
    else:
        assert len(slots) > 2
    comparison.assert_equal()


@pytest.mark.parametrize("policy", ["invariant", "single", "padded:4"])
def test_padding_side_and_amount(compare: Begin, tmp_path: Path, policy: str) -> None:
    clients = Clients(tmp_path, "random-gpt2", policy, "float32")
    comparison = compare("padding", "random-gpt2", clients)
    prompts = [make_ids(1, 20, 1031), make_ids(2, 13, 1031)]
    expected = None
    for left, right in ((0, 0), (1, 0), (0, 1), (9, 30), (63, 0), (0, 64)):
        for pad in (0, 1030):
            width = left + 20 + right
            ids, mask = torch.full((2, width), pad), torch.zeros(2, width, dtype=torch.int64)
            for row, prompt in enumerate(prompts):
                ids[row, left : left + len(prompt)] = torch.tensor(prompt)
                mask[row, left : left + len(prompt)] = 1
            with clients.fresh() as client:
                out = client.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
            traces = [done.trace for done in out.completions]
            assert out.sequences[:, width:].tolist() == [list(trace.tokens) for trace in traces]
            expected = expected or traces
            for first, trace in zip(expected, traces, strict=True):
                comparison.add_hashes(f"{left} left, {right} right", first.score_hash, trace.score_hash)
    comparison.assert_equal()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_invariant_refuses_a_llama(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(PolicyError, match="'llama', not GPT-2"):
        make_engine("random-llama", "invariant", dtype)
    with pytest.raises(PolicyError, match="'llama', not GPT-2"):
        Clients(tmp_path, "random-llama", "invariant", dtype)


# --- the control ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_native_breaks_what_the_others_promise(compare: Begin) -> None:
    differing: dict[str, int] = {}
    for name in ("random-gpt2", "tiny-gpt2", *OTHER_ARCHITECTURES):
        for dtype in ("float32", "bfloat16"):
            if differing.get(name):
                break  # one bit that moved is what the control has to show
            engine = shared_engine(name, "native", dtype)
            comparison = compare("control", name, engine)
            compare_sizes(comparison, engine, make_pool(name, count=9), [2, 3, 8, 16, 33])
            compare_neighbours(comparison, engine, needle_of(name), vocabulary_of(name), [1, 33, 100])
            compare_slots(comparison, engine, needle_of(name), make_pool(name, count=4))
            compare_prefill_with_decode(comparison, engine, needle_of(name, 60))
            differing[name] = differing.get(name, 0) + comparison.differing
    assert all(differing.values()), f"no bit of some model moved under native: its tests show nothing: {differing}"


def test_native_breaks_it_through_the_client(compare: Begin, tmp_path: Path) -> None:
    clients = Clients(tmp_path, "random-gpt2", "native", "float32")
    assert not clients.check.passed
    comparison = compare("control through the client", "random-gpt2", clients)
    compare_companies_of_client(comparison, clients, [make_ids(i, 5 + 17 * i, 1031) for i in range(6)])
    assert comparison.differing > 0


@pytest.mark.slow
@pytest.mark.usefixtures("chained_products")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_triton_kernels_make_an_engine(dtype: str) -> None:
    # the kernels of a GPU, in the interpreter: their own tests are in test_kernels.py, here they are put together
    pytest.importorskip("triton", reason="triton is not installed")
    from stablegen.kernels.triton import TritonKernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = exact_engine("tiny", dtype, device, TritonKernels(), chunk=17, max_rows=2)
    needle, long, short = (
        make_request(make_ids(i, n, 211), steps) for i, n, steps in ((0, 7, 3), (1, 26, 1), (2, 2, 2))
    )
    expected = alone(engine, needle)
    with watch_passes() as passes:
        beside = run(engine, Batch((needle, long, short)))[0]
    # it decodes while a chunk is computed, then beside another that decodes
    assert any(min(piece.start for piece in pieces) < 0 < max(piece.start for piece in pieces) for pieces in passes)
    assert torch.equal(beside.scores.view(torch.int32), expected.scores.view(torch.int32))
    prefilled = alone(engine, make_request((*needle.prompt_ids, *expected.trace.tokens[:2]), 1))
    assert prefilled.trace.score_hash[0] == expected.trace.score_hash[2]
    reference = alone(exact_engine("tiny", dtype), needle)
    error = (expected.scores.cpu()[0] - reference.scores[0]).norm() / reference.scores[0].norm()
    assert error < {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]


BROKEN = [SplitByBatch, SplitBySlot, AttentionByTokens]
BROKEN_AT_SIZE = [SplitByLargeBatch, AttentionByPages, LoneDecode]


def broken_model(kernels: KernelSet, dtype: str) -> GPT2:
    model = load_model("random-gpt2", dtype)
    own = getattr(torch, dtype)
    return GPT2(model.config.to_dict(), model.state_dict(), kernels, dtype=own, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", BROKEN + BROKEN_AT_SIZE)
def test_broken_kernels_fail_the_self_check(kernels: type[KernelSet], dtype: str) -> None:
    numerics = shared_engine("random-gpt2", "invariant", dtype).numerics
    assert not self_check(InvariantEngine(broken_model(kernels(), dtype), numerics), 1031).passed


def test_the_self_check_runs_as_many_rows_as_the_engine() -> None:
    numerics = shared_engine("random-gpt2", "invariant", "float32").numerics
    assert not self_check(
        InvariantEngine(broken_model(ManyRowsDecode(), "float32"), numerics, max_rows=128), 1031
    ).passed
    good = InvariantEngine(broken_model(ReferenceKernels(), "float32"), numerics, max_rows=128)
    with watch_passes() as passes:
        assert self_check(good, 1031).passed
    decoding = {len(pieces) for pieces in passes if all(piece.start < 0 for piece in pieces)}
    assert {1, 9, 16} < decoding
    assert any(32 < rows <= 64 for rows in decoding) and any(rows > 64 for rows in decoding)
    assert max(sum(piece.count for piece in pieces) for pieces in passes) > 512


def test_the_self_check_computes_long_prompts_anew() -> None:
    numerics = shared_engine("random-gpt2", "invariant", "float32").numerics
    engine = InvariantEngine(broken_model(ReferenceKernels(), "float32"), numerics)
    with watch_leases() as shared:
        assert self_check(engine, 1031).passed
    # one run alone takes over what the one before has left
    assert sum(positions > 0 for positions in shared) == 1


@pytest.mark.parametrize("kernels", BROKEN)
def test_broken_kernels_are_seen_by_these_tests(kernels: type[KernelSet]) -> None:
    name, model = "random-gpt2", broken_model(kernels(), "float32")
    numerics = shared_engine(name, "invariant", "float32").numerics
    engine, small = InvariantEngine(model, numerics), InvariantEngine(model, numerics, chunk=30)
    checks: dict[str, Callable[[Comparison], None]] = {
        "sizes": lambda c: compare_sizes(c, engine, make_pool(name), [2, 16, 33]),
        "slots": lambda c: compare_slots(c, engine, needle_of(name, 7), make_pool(name, count=8)),
        "neighbours": lambda c: compare_neighbours(c, engine, needle_of(name, 7), 1031, [33]),
        "prefill": lambda c: compare_prefill_with_decode(c, engine, needle_of(name, 30)),
        "cuts": lambda c: compare_cuts(c, model, make_ids(5, 40, 1031), [[3], [20], [33]]),
        "phases": lambda c: compare_phases(c, model, 1031, [16]),
        "interleaved": lambda c: compare_interleaved(c, small, needle_of(name, 7, 6), 1031, [60]),
        "needle": lambda c: compare_needle(c, engine, needle_of(name, 70), 1031, trials=1, rows=12, longest=90),
        "edges": lambda c: compare_edges(c, engine, 1031),
    }
    blind = []
    for check, compare_with in checks.items():
        comparison = Comparison("", check, name, "invariant", "float32", "cpu")
        compare_with(comparison)
        if not comparison.moved:
            blind.append(check)
    assert blind == []


@pytest.mark.parametrize("kernels", BROKEN)
@pytest.mark.fresh_checks
def test_nothing_is_exact_with_broken_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernels: type[KernelSet]
) -> None:
    from tokenizers import Tokenizer

    monkeypatch.setattr("stablegen.engine.loading.kernels_for", lambda device: kernels())
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    with Client(
        load_model("random-gpt2"), tokenizer, policy="invariant", on_risk="serve", cache_dir=tmp_path
    ) as client:
        request = client.make_request(make_ids(1, 30, 1031), {"max_new_tokens": 4})
        with pytest.warns(PromiseWarning, match="does not keep its promise"):
            first = client.run([request])[0]
        hit = client.run([request])[0]
    assert not first.cached and hit.cached
    assert first.verdict.status != "exact" and hit.verdict.status != "exact"


# --- agreement with transformers --------------------------------------------------------------------------------------


def logits_of(model: Any, ids: Sequence[int], steps: int) -> torch.Tensor:
    """Return the raw scores [steps, V] of transformers' own ``generate``."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(out.logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["random-gpt2", "tiny-gpt2", "random-llama"])
def test_single_is_transformers_generate(compare: Begin, name: str, dtype: str) -> None:
    engine = shared_engine(name, "single", dtype)
    comparison = compare("agreement with generate", name, engine)
    request = needle_of(name, 9, steps=5)
    comparison.add("generate", logits_of(load_model(name, dtype), request.prompt_ids, 5), alone(engine, request).scores)
    comparison.assert_equal()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GPT2S)
def test_invariant_is_as_accurate_as_transformers(name: str, dtype: str) -> None:
    ids = make_ids(8, 70, vocabulary_of(name))
    ours = Packed(own_model(name, dtype)).feed((0, ids))[0]
    with torch.inference_mode():
        model = load_model(name, dtype)
        theirs = model(input_ids=torch.tensor([ids])).logits[0]
        exact = deepcopy(model).double()(input_ids=torch.tensor([ids])).logits[0]
    assert relative_error(ours, theirs) < {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    assert relative_error(ours, exact) < {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
    assert relative_error(ours, exact) < 2 * relative_error(theirs, exact)


# --- a trained model with the real vocabulary -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_mini_gpt2(compare: Begin, mini_gpt2: str, dtype: str) -> None:
    engine = shared_engine(mini_gpt2, "invariant", dtype)
    comparison = compare("batch size, decode, chunked prefill", mini_gpt2, engine)
    compare_sizes(comparison, engine, make_pool(mini_gpt2, count=5), [2, 17])
    compare_prefill_with_decode(comparison, engine, needle_of(mini_gpt2))
    compare_cuts(comparison, own_model(mini_gpt2, dtype), make_ids(5, 70, 50257), [[17], [63, 64, 65]])
    comparison.assert_equal()


def test_native_breaks_mini_gpt2(compare: Begin, mini_gpt2: str) -> None:
    engine = shared_engine(mini_gpt2, "native", "float32")
    comparison = compare("control", mini_gpt2, engine)
    compare_sizes(comparison, engine, make_pool(mini_gpt2, count=5), [2, 17])
    compare_prefill_with_decode(comparison, engine, needle_of(mini_gpt2))
    assert comparison.differing > 0
