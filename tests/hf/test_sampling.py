"""Sampling through ``generate``: a function of the request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generating import (
    BY_POLICY,
    IN_FULL,
    NEW,
    ORDERS,
    PROMPTS,
    SAMPLED,
    answer_to,
    assert_as_alone,
    assert_equal_rows,
    each_alone,
    emptied,
    in_full,
    new_tokens,
    one,
    ours,
    padded,
    rows_of,
    theirs,
    tokenizer,
)
from transformers import (
    GenerationConfig,
)
from transformers.generation import logits_process as hf

from stablegen.client import Client
from stablegen.errors import (
    ParameterError,
    UncachedWarning,
)
from stablegen.kernels.sampling import gumbel, state_of

WARPERS: dict[str, tuple[float, Callable[[], Any]]] = {
    "temperature": (0.7, lambda: hf.TemperatureLogitsWarper(0.7)),
    "top_h": (0.4, lambda: hf.TopHLogitsWarper(0.4)),
    "top_k": (5, lambda: hf.TopKLogitsWarper(5)),
    "top_p": (0.6, lambda: hf.TopPLogitsWarper(0.6)),
    "min_p": (0.2, lambda: hf.MinPLogitsWarper(0.2)),
    "typical_p": (0.5, lambda: hf.TypicalLogitsWarper(0.5)),
    "epsilon_cutoff": (0.02, lambda: hf.EpsilonLogitsWarper(0.02)),
    "eta_cutoff": (0.05, lambda: hf.EtaLogitsWarper(0.05)),
}


def test_a_seeded_sample_is_the_same_alone_in_batches_and_under_every_policy(clients: dict[str, Client]) -> None:
    rows = rows_of()
    by_policy = []
    for asking in clients.values():
        alone = each_alone(asking, rows, **SAMPLED)
        for order in ORDERS:
            assert_as_alone(in_full(emptied(asking), padded([rows[place] for place in order]), **SAMPLED), alone, order)
        assert_as_alone(in_full(asking, padded(rows), **SAMPLED), alone, range(8), cached=True)
        by_policy.append([completion.token_ids for completion in alone])
    assert by_policy[0] == by_policy[1] == by_policy[2]
    greedy = [tuple(answer) for answer in new_tokens(ours(clients["single"], padded(rows)), max(map(len, rows)))]
    assert sum(map(tuple.__eq__, greedy, by_policy[0])) < 4


def test_seeds_and_sample_indices_name_different_samples(asking: Client) -> None:
    given = one(rows_of()[0])
    named = [{"seed": seed, "sample_index": index} for seed in range(3) for index in range(3)]
    answers = [ours(asking, given, **SAMPLED | chosen)[0].tolist() for chosen in named]
    assert len(set(map(tuple, answers))) >= 8
    assert asking.cache.stats().records == 9


def test_complete_and_generate_make_the_same_request(asking: Client) -> None:
    for arguments in (SAMPLED, {"do_sample": True, "seed": 3, "top_k": 0}, {"repetition_penalty": 1.2}):
        text = asking.complete(PROMPTS[0], max_new_tokens=NEW, **arguments)
        ids = ours(asking, one(rows_of()[0]), return_dict_in_generate=True, **arguments).completions[0]
        assert (text.cached, ids.cached) == (False, True)
        assert text.key == ids.key and text.trace == ids.trace


@pytest.mark.parametrize("name", WARPERS)
def test_a_sample_lies_in_what_transformers_warper_leaves(name: str, asking: Client) -> None:
    value, make = WARPERS[name]
    row = rows_of()[0]
    answers = set()
    for seed in range(3):
        out = ours(asking, one(row), do_sample=True, seed=seed, **{"top_k": 0, name: value}, **IN_FULL)
        ids = out.sequences
        expected = [make()(ids[:, : len(row) + step], logits.clone()) for step, logits in enumerate(out.logits)]
        assert_equal_rows(out.scores, expected)
        tokens = out.completions[0].token_ids
        assert all(out.scores[step][0, token] > -torch.inf for step, token in enumerate(tokens))
        banned = sum(int(torch.isinf(scores).sum()) for scores in out.scores)
        assert (banned > 0) is (name != "temperature")
        assert not torch.equal(out.scores[0], out.logits[0])
        answers.add(tokens)
    assert len(answers) > 1


def test_warpers_stand_in_transformers_order(asking: Client) -> None:
    row = rows_of()[0]
    settings = {name: value for name, (value, _) in WARPERS.items()} | {"top_k": 30, "top_p": 0.95, "typical_p": 0.95}
    settings |= {"temperature": 2.0, "top_h": 0.9, "min_p": 0.01, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002}
    out = ours(asking, one(row), do_sample=True, seed=1, repetition_penalty=1.3, **settings, **IN_FULL)
    torch.manual_seed(0)
    forced = GenerationConfig(do_sample=True, repetition_penalty=1.3, **settings)
    expected = theirs(asking.source.resolver(), one(row), do_sample=None, generation_config=forced, **IN_FULL)
    assert_equal_rows(out.scores[:1], expected.scores[:1])  # what follows depends on what was drawn
    assert 1 < int((out.scores[0] > -torch.inf).sum()) < 30


def test_top_p_of_0_leaves_one_token_as_in_transformers(model: Any, asking: Client) -> None:
    row = rows_of()[0]
    given = one(row)
    for seed in range(3):
        out = ours(asking, given, do_sample=True, seed=seed, top_k=0, top_p=0.0)
        assert torch.equal(out, theirs(model, given, do_sample=True, top_k=0, top_p=0.0))
        assert new_tokens(out, len(row))[0] == answer_to(model, row)


def test_the_default_of_50_tokens_is_in_force_in_sampling(asking: Client) -> None:
    out = ours(asking, one(rows_of()[0]), do_sample=True, seed=1, temperature=3.0, **IN_FULL)
    assert [int((scores > -torch.inf).sum()) for scores in out.scores] == [50] * len(out.scores)


def test_one_seed_a_row(asking: Client) -> None:
    rows = rows_of()[:3]
    settings = SAMPLED | {"return_dict_in_generate": True}
    alone = [
        ours(asking, one(row), **settings | {"seed": seed}).completions[0]
        for row, seed in zip(rows, (5, 6, 5), strict=True)
    ]
    for seeds in ([5, 6, 5], (5, 6, 5), torch.tensor([5, 6, 5])):
        assert_as_alone(ours(emptied(asking), padded(rows), **settings | {"seed": seeds}), alone, range(3))
    same: dict[str, Any] = {"max_new_tokens": NEW, **SAMPLED, "seed": [5, 6, 5]}
    texts = asking.complete(PROMPTS[:3], **same)
    assert [(done.key, done.cached) for done in texts] == [(done.key, True) for done in alone]
    shared = ours(asking, padded(rows), **settings | {"seed": torch.tensor(5)}).completions
    assert [done.cached for done in shared] == [True, False, True]


@pytest.mark.parametrize("seed", [[1, 2], [1, 2, 3, 4], [], torch.tensor([1, 2])], ids=repr)
def test_another_number_of_seeds_than_rows_is_refused(seed: Any, asking: Client) -> None:
    with pytest.raises(ParameterError, match="for 3 rows"):
        ours(asking, padded(rows_of()[:3]), do_sample=True, seed=seed)
    if not isinstance(seed, torch.Tensor):
        with pytest.raises(ParameterError, match="for 3 rows"):
            asking.complete(PROMPTS[:3], do_sample=True, seed=seed)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1", [1.5], torch.tensor([1.5])], ids=repr)
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any, asking: Client) -> None:
    with pytest.raises(ParameterError):
        ours(asking, one(rows_of()[0]), do_sample=True, seed=seed)
    assert asking.cache.stats().records == 0


def test_several_samples_of_a_prompt_are_cached_one_by_one(asking: Client) -> None:
    rows = rows_of()[:2]
    settings = SAMPLED | {"return_dict_in_generate": True}
    found = ours(asking, padded(rows), num_return_sequences=4, **settings)
    assert found.sequences.shape[0] == len(found.completions) == 8
    assert len({done.key for done in found.completions}) == asking.cache.stats().records == 8
    assert len({done.token_ids for done in found.completions}) == 8
    assert [list(done.record.request.prompt_ids) for done in found.completions] == [
        rows[place // 4] for place in range(8)
    ]
    third = ours(asking, one(rows[0]), sample_index=2, **settings).completions[0]
    assert third.cached and third.key == found.completions[2].key and third.trace == found.completions[2].trace
    later = ours(asking, one(rows[1]), sample_index=1, num_return_sequences=3, **settings).completions
    assert [(done.key, done.cached) for done in later] == [(done.key, True) for done in found.completions[5:]]
    by_row = ours(asking, padded(rows), num_return_sequences=2, **settings | {"seed": [11, 12]}).completions
    assert [done.cached for done in by_row] == [True, True, False, False]


def test_samples_are_drawn_from_the_scores(clients: dict[str, Client]) -> None:
    from scipy.stats import chisquare

    asking, row, draws = emptied(clients["invariant"]), rows_of()[0], 250
    settings = {"do_sample": True, "max_new_tokens": 1, "top_k": 6, "temperature": 0.8}
    scores = ours(asking, one(row), seed=0, **settings, **IN_FULL).scores[0]
    kept = torch.nonzero(scores[0] > -torch.inf).flatten().tolist()
    assert len(kept) == 6
    chances = torch.softmax(scores[0, kept].double(), dim=0)
    chances /= chances.sum()
    by_index = ours(asking, one(row), seed=1, num_return_sequences=draws, **settings)
    by_seed = ours(asking, padded([row] * draws), seed=range(100, 100 + draws), **settings)
    for found in (by_index, by_seed):
        counted = Counter(found[:, -1].tolist())
        counts = [counted[token] for token in kept]
        assert sum(counts) == draws
        assert chisquare(counts, (chances * draws).tolist()).pvalue > 0.01
        assert chisquare(counts).pvalue < 1e-6  # so many draws would tell of other chances


def test_without_a_seed_nothing_is_cached_and_it_is_said_once(small: Any, anew: Callable[..., Client]) -> None:
    asking = anew(small, tokenizer())
    given = padded([[5, 6, 7], [5, 6, 7]])
    free = {"do_sample": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    with pytest.warns(UncachedWarning, match="no seed") as told:
        first = ours(asking, given, **free)
    assert len(told) == 1
    torch.manual_seed(3)
    second = ours(asking, given, **free)  # where a warning is an error
    third = ours(asking, given, **free)
    assert torch.equal(first.sequences, second.sequences)
    assert not torch.equal(first.sequences, third.sequences)
    assert not torch.equal(first.sequences[0], first.sequences[1])
    assert not any(done.cached for out in (first, second, third) for done in out.completions)
    assert isinstance(asking.complete("Hello", do_sample=True, max_new_tokens=2).text, str)
    assert asking.cache.stats().records == 0
    fresh = anew(small, tokenizer())
    with pytest.warns(UncachedWarning, match="no seed") as told:
        drawn = {fresh.complete("Hello", do_sample=True, max_new_tokens=4).token_ids for _ in range(3)}
    assert len(told) == 1 and len(drawn) > 1
    assert fresh.cache.stats().records == 0


def test_a_sample_without_a_seed_is_not_read_from_the_cache(small: Any, anew: Callable[..., Client]) -> None:
    asking = anew(small)
    ours(asking, one([5, 6, 7]), do_sample=True, seed=3)
    before = list(asking.cache.records())
    with pytest.warns(UncachedWarning):
        ours(asking, one([5, 6, 7]), do_sample=True)
    assert [record.key for record in asking.cache.records()] == [record.key for record in before]


@BY_POLICY
def test_a_margin_is_how_far_the_best_of_scores_and_noise_is_ahead(policy: str, clients: dict[str, Client]) -> None:
    rows = rows_of()[:3]
    out = ours(emptied(clients[policy]), padded(rows), sample_index=4, num_return_sequences=2, **SAMPLED, **IN_FULL)
    nearer = steps = 0
    for row, done in enumerate(out.completions):
        assert len(done.trace) == NEW
        for step, token in enumerate(done.token_ids):
            state = torch.tensor([state_of(int(SAMPLED["seed"]), 4 + row % 2, step)])
            noisy = out.scores[step][row].double() + gumbel(state, out.scores[step].shape[1])[0]
            best = torch.topk(noisy, 2)
            assert best.indices[0] == token
            margin = done.trace.scores[step] - done.trace.runner_up_scores[step]
            ahead = (best.values[0] - best.values[1]).item()
            # nearer yet may be the edge of what is sampled from
            assert 0 <= margin <= ahead + 4e-6
            nearer += margin < ahead - 4e-6
            score = out.scores[step][row, token].item()
            assert done.trace.scores[step] == score
            steps += 1
    assert 0 < nearer < steps


def test_where_one_token_is_kept_the_margin_is_the_greedy_one(model: Any, asking: Client) -> None:
    row = rows_of()[0]
    greedy = ours(asking, one(row), return_dict_in_generate=True).completions[0]
    for _ in range(2):
        done = ours(asking, one(row), do_sample=True, seed=1, top_k=1, return_dict_in_generate=True).completions[0]
        assert list(done.token_ids) == answer_to(model, row)
        assert done.trace.margins == greedy.trace.margins
        assert done.trace.runner_ups == greedy.trace.runner_ups
        assert done.verdict.status == "exact"
    assert done.cached
