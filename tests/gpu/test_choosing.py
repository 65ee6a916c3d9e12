"""Processed scores, sampling and scoring on a GPU: the same bits alone, in any company, decoded or in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import DTYPES, invariant_engine, load_model, make_engine, make_ids, make_request
from fixed_shapes import static_engine

import stablegen
from stablegen.core.policy import Batch, Shape, capacity_for, load_policy
from stablegen.core.request import Request
from stablegen.engine.base import Engine, Generated
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.sampling import TokenSampler
from stablegen.engine.self_check import self_check
from stablegen.kernels.sampling import gumbel, state_of, uniforms

pytestmark = pytest.mark.gpu

SMALL = "gpt2-small"
"""Random weights: the shapes of the real one."""
VOCABULARY = 50257
CONTEXT = 1024
GIB = 2**30
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 11}
PROCESSING: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": (1, 2, 3)},
    "plain sampling": SAMPLED,
    "temperature and cuts": SAMPLED | {"temperature": 0.8, "top_k": 500, "top_p": 0.9},
    "typical": SAMPLED | {"typical_p": 0.9, "min_p": 1e-6, "eta_cutoff": 1e-6, "epsilon_cutoff": 1e-6},
    "entropy": SAMPLED | {"top_h": 0.9},
}


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def processed(seed: int, length: int, steps: int, settings: dict[str, Any], **changes: Any) -> Request:
    plain = make_request(make_ids(seed, length, VOCABULARY), steps)
    return replace(plain, params=plain.params.model_copy(update=settings | changes))


def scored(seed: int, length: int, count: int) -> Request:
    ids = tuple(make_ids(seed, length + count, VOCABULARY))
    return replace(make_request(ids[:length], count), continuation=ids[length:])


def invariant(dtype: str, **settings: Any) -> InvariantEngine:
    return invariant_engine(SMALL, dtype, "cuda", **({"kv_cache_size": GIB} | settings))


def answer(engine: Engine, batch: Batch, asked: Request) -> Generated:
    return next(done for done in list(engine.generate(batch)) if done.request is asked)


def companies(asked: Request, others: Sequence[Request]) -> list[Batch]:
    """Return batches of one up to 257 rows around a request, in several places; long prompts prefill beside it."""
    long = [make_request(make_ids(900 + i, length, VOCABULARY), 3) for i, length in enumerate((300, 1000))]
    sizes = (1, 2, 7, 15, 31, 64, 128, 256)
    around = [Batch((*others[: size // 2], asked, *others[size // 2 : size])) for size in sizes]
    return [*around, Batch((asked, *long, *others[:3])), Batch((*long, *others[:8], asked))]


def others_of(settings: dict[str, Any]) -> list[Request]:
    kinds: tuple[dict[str, Any], ...] = (settings, {}, SAMPLED, PROCESSING["temperature and cuts"])
    return [processed(50 + i, 1 + 7 * i % 40, 1 + i % 9, kinds[i % len(kinds)]) for i in range(256)]


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_the_uniform_numbers_are_the_same_bits_on_both_devices() -> None:
    states = torch.tensor([state_of(seed, seed % 3, seed) for seed in range(40)])
    assert torch.equal(uniforms(states.cuda(), VOCABULARY).cpu(), uniforms(states, VOCABULARY))
    noise, there = gumbel(states, VOCABULARY), gumbel(states.cuda(), VOCABULARY).cpu()
    assert (noise - there).abs().max() < 1e-12


def test_noise_is_the_same_alone_and_in_a_batch() -> None:
    states = torch.tensor([state_of(seed, 0, 0) for seed in range(33)]).cuda()
    together = gumbel(states, VOCABULARY)
    for row in range(33):
        assert torch.equal(gumbel(states[row : row + 1], VOCABULARY), together[row : row + 1])


def test_a_row_is_processed_to_the_same_bits_every_time() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, VOCABULARY, device="cuda") * 3
    sampler = TokenSampler(processed(1, 5, 2, PROCESSING["typical"] | {"top_p": 0.97}), rows.device)
    first = [sampler.process(row, 0)[1] for row in rows]
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(60):
        busy = busy @ busy * 1e-3
        for row, expected in zip(rows, first, strict=True):
            assert torch.equal(sampler.process(row.clone(), 0)[1], expected)
    assert all(torch.isinf(row).any() for row in first)


def test_torchs_own_cumulative_sum_is_why_its_order_is_fixed() -> None:
    """The control; where torch has one order by itself, there is nothing to fix, and the test says so."""
    torch.manual_seed(0)
    row = (torch.randn(1, 1_000_003, device="cuda") * 3).softmax(1)
    found = {row.cumsum(1).cpu().numpy().tobytes() for _ in range(200)}
    if len(found) == 1:
        pytest.skip("torch's cumulative sum did not move here")
    assert len(found) > 1


# --- invariant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROCESSING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_company_moves_no_bit_of_what_is_chosen(dtype: str, kind: str) -> None:
    engine = invariant(dtype)
    asked = processed(1, 21, 12, PROCESSING[kind])
    alone = answer(engine, Batch((asked,)), asked)
    assert len(alone.trace) == 12
    for batch in companies(asked, others_of(PROCESSING[kind])):
        engine.forget()
        assert answer(engine, batch, asked).trace == alone.trace


@pytest.mark.parametrize("kind", PROCESSING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_gives_what_decoding_gave(dtype: str, kind: str) -> None:
    engine = invariant(dtype)
    asked = [processed(seed, 1 + 31 * seed, 20, PROCESSING[kind]) for seed in range(1, 6)]
    made = {done.request.key: done.trace for done in engine.generate(Batch(tuple(asked)))}
    engine.forget()
    batch = Batch(tuple(asked))
    with closing(engine.follow(batch, {one: made[one.key].tokens for one in asked})) as followed:
        assert {done.request.key: done.trace for done in followed} == made
    engine.forget()
    begun = {one: made[one.key].tokens[:7] for one in asked}
    with closing(engine.generate(batch, begun=begun)) as resumed:
        for done in resumed:
            trace = made[done.request.key]
            assert done.trace.tokens == trace.tokens[7:]
            assert done.trace.score_hash == trace.score_hash[7:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_and_few_rows_move_no_bit(dtype: str) -> None:
    kinds = [PROCESSING["temperature and cuts"], SAMPLED | {"min_p": 0.001}, SAMPLED]
    asked = [processed(seed, 1 + 31 * (seed % 9), 9, kinds[seed % 2 * (seed % 3)]) for seed in range(1, 75)]
    expected = None
    for settings in ({}, {"graphs": False}, {"max_rows": 3}, {"chunk": 64}):
        engine = invariant(dtype, **settings)
        found = {done.request.key: done.trace for done in engine.generate(Batch(tuple(asked)))}
        expected = expected or found
        assert found == expected
        recorded = engine.sampler._recorded
        assert bool(recorded) is (settings != {"graphs": False})
        assert all(rows <= 64 for _, rows, _ in recorded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_check_of_processed_scores_passes(dtype: str) -> None:
    check = self_check(invariant(dtype), VOCABULARY, processed=True)
    assert check.passed
    assert check.slot_free


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_moves_no_bit_of_a_score(dtype: str) -> None:
    engine = invariant(dtype)
    asked = scored(1, 30, 50)
    alone = answer(engine, Batch((asked,)), asked)
    others = [scored(60 + i, 1 + 11 * i % 90, 1 + 5 * i % 40) for i in range(256)]
    for batch in companies(asked, others):
        engine.forget()
        found = answer(engine, batch, asked)
        assert found.trace == alone.trace
        assert found.logprobs == alone.logprobs
    engine.forget()
    decoded = replace(asked, continuation=(), params=asked.params)
    generated = answer(engine, Batch((decoded,)), decoded).trace
    again = replace(asked, continuation=generated.tokens)
    engine.forget()
    assert answer(engine, Batch((again,)), again).trace == generated


# --- single and padded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["single", "padded:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_shapes_repeat_what_they_choose(dtype: str, policy: str) -> None:
    model = load_model(SMALL, dtype, "cuda")
    engine, launched = (static_engine(model, policy, CONTEXT, graphs=graphs) for graphs in (True, False))
    asked = processed(1, 21, 12, PROCESSING["temperature and cuts"])
    others = [processed(2 + i, 9 + 13 * i, 5 + 9 * i, kind) for i, kind in enumerate(({}, SAMPLED, {}))]
    rows: list[tuple[Request | None, ...]] = [(asked,)] * 2
    shape = Shape(None, capacity_for(21 + 12))
    if policy != "single":
        shape = Shape(64, 256)
        rows = [(asked, None, None, None), (asked, *others), (*others, asked), (others[1], asked, None, others[0])]
    traces = [answer(one, Batch(row, shape), asked).trace for one in (engine, launched) for row in rows]
    assert len(set(traces)) == 1


@pytest.mark.parametrize("policy", ["single", "padded:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_shapes_repeat_what_they_score(dtype: str, policy: str) -> None:
    engine = make_engine(SMALL, policy, dtype, "cuda")
    asked, others = scored(1, 30, 20), [scored(2 + i, 9 + 7 * i, 4 + 9 * i) for i in range(3)]
    rows: list[tuple[Any, ...]] = [(asked,)] * 2
    shape = Shape(None, None, 0)
    if policy != "single":
        shape = Shape(64, None, 64)
        rows = [(asked, None, None, None), (asked, *others), (*others, asked)]
    found = [answer(engine, Batch(row, shape), asked) for row in rows]
    assert len({(one.trace, one.logprobs) for one in found}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_as_long_as_the_context_are_scored_alike_alone_and_together(dtype: str) -> None:
    engine = make_engine(SMALL, "padded:2", dtype, "cuda")
    asked, other = scored(1, CONTEXT - 20, 21), scored(2, CONTEXT - 20, 21)
    shape = load_policy("padded:2").shape_of(asked, engine.limits)
    found = [answer(engine, Batch(rows, shape), asked) for rows in ((asked, None), (asked, other), (other, asked))]
    assert len({(one.trace, one.logprobs) for one in found}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_beside_generation_are_whole(dtype: str) -> None:
    engine = invariant(dtype, max_rows=16)
    asked = [scored(1 + i, 3, 40) for i in range(3)]
    rows = [processed(50 + i, 5, 40, SAMPLED if i % 2 else {}) for i in range(14)]
    alone = {one.key: answer(engine, Batch((one,)), one) for one in (*asked, *rows)}
    engine.forget()
    for done in engine.generate(Batch((*rows, *asked))):
        assert done.trace == alone[done.request.key].trace
        assert done.logprobs == alone[done.request.key].logprobs


# --- the control ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sampled", "scored"])
def test_native_is_moved_by_company(kind: str) -> None:
    asked = scored(1, 30, 20) if kind == "scored" else processed(1, 21, 12, SAMPLED)
    moved = 0
    for dtype in DTYPES:
        engine = make_engine(SMALL, "native", dtype, "cuda")
        if asked.continuation:
            others = [scored(2 + i, 9 + 7 * i % 60, 20) for i in range(15)]
        else:
            others = [processed(2 + i, 9 + 7 * i % 60, 12, SAMPLED) for i in range(15)]
        alone = answer(engine, Batch((asked,)), asked)
        beside = answer(engine, Batch((asked, *others)), asked)
        same = [a == b for a, b in zip(alone.trace.score_hash, beside.trace.score_hash, strict=True)]
        moved += same.count(False)
    assert moved > 0


# --- the drop-in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["single", "invariant"])
def test_a_stabilized_model_answers_on_its_device(policy: str, tmp_path: Path) -> None:
    model = load_model(SMALL, "float32", "cuda")
    ids = torch.tensor([make_ids(seed, 20, VOCABULARY) for seed in range(4)], device="cuda")
    settings: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    own = type(model).generate
    theirs = torch.cat([own(model, row[None], max_new_tokens=12, pad_token_id=0) for row in ids])
    stablegen.stabilize(model, policy=policy, cache_dir=tmp_path)
    try:
        found = model.generate(ids, **settings)
        assert found.device == ids.device
        assert torch.equal(found, theirs)
        settings |= {"do_sample": True, "seed": 3}
        sampled = model.generate(ids, return_dict_in_generate=True, output_scores=True, **settings)
        assert all(scores.device == ids.device and scores.shape == (4, VOCABULARY) for scores in sampled.scores)
        assert {one.verdict.status for one in sampled.completions} == {"exact"}
        flipped = model.generate(ids.flip(0), **settings)
        assert torch.equal(flipped.flip(0), sampled.sequences)
    finally:
        stablegen.restore(model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_answers_of_other_numerics_are_proved_in_one_pass(dtype: str, tmp_path: Path) -> None:
    model = load_model(SMALL, dtype, "cuda")
    ids = torch.tensor([make_ids(seed, 20, VOCABULARY) for seed in range(8)], device="cuda")
    settings: dict[str, Any] = {"max_new_tokens": 24, "pad_token_id": 0, "do_sample": True, "seed": 5, "top_p": 0.95}
    stablegen.stabilize(model, policy="native", cache_dir=tmp_path)
    model.generate(ids, **settings)
    stablegen.restore(model)
    stablegen.stabilize(model, policy="invariant", cache_dir=tmp_path)
    try:
        client = model.stablegen
        proved = client.verify(list(client.cache.records()))
        afresh = client.verify(list(client.cache.records()), from_scratch=True)
        assert [one.fresh.trace for one in proved if one.fresh] == [one.fresh.trace for one in afresh if one.fresh]
        assert len(proved) == 8
    finally:
        stablegen.restore(model)
