"""Sampling as a function of the request: the numbers drawn, the distribution they make, and the margins they leave."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest
from support import client, request, save, small_gpt2

from stablegen.core.params import GenerationParams
from stablegen.engine.processors import processors_for
from stablegen.engine.sampling import TokenSampler, sample
from stablegen.errors import ParameterError
from stablegen.kernels.base import RowSummary
from stablegen.kernels.reference import log_probs, summarise_rows
from stablegen.kernels.sampling import gumbel, state_of, uniforms

ROW = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.25, 0.0, -0.5, -1.0, -1.0, -2.0, -3.0, -30.0])
DRAWS = 3000
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> Any:
    """Yield a SplitMix64 generator's numbers, as its authors write it."""
    while True:
        state = (state + _GOLDEN) % 2**64
        x = state
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        yield x ^ (x >> 31)


def sampler(seed: int, **settings: Any) -> TokenSampler:
    params = GenerationParams(max_new_tokens=1, do_sample=True, seed=seed, **settings)
    return TokenSampler(request((1, 2, 3), params=params), torch.device("cpu"))


def drawn(row: torch.Tensor, seeds: range, **settings: Any) -> RowSummary:
    samplers = [sampler(seed, **settings) for seed in seeds]
    scores = row.repeat(len(samplers), 1)
    return sample(samplers, scores, [0] * len(samplers), summarise_rows(scores).hashes)


def frequencies(**settings: Any) -> list[int]:
    return torch.bincount(drawn(ROW, range(DRAWS), **settings).tokens[:, 0], minlength=len(ROW)).tolist()


def expected(**settings: Any) -> torch.Tensor:
    """Return the probabilities [V] that transformers' own processors leave."""
    asked = request((1, 2, 3), params=GenerationParams(max_new_tokens=1, do_sample=True, seed=0, **settings))
    row = ROW[None]
    for processor in processors_for(asked, torch.device("cpu")):
        row = processor(torch.tensor([[1, 2, 3]]), row)
    return row[0].double().softmax(0)


def p_value(found: list[int], probabilities: torch.Tensor) -> float:
    kept = [index for index, share in enumerate(probabilities.tolist()) if share * DRAWS > 1]
    rest = [index for index in range(len(found)) if index not in kept]
    counts = [found[index] for index in kept] + [sum(found[index] for index in rest)]
    shares = [float(probabilities[index]) for index in kept] + [float(probabilities[rest].sum())]
    if shares[-1] == 0.0:
        assert counts[-1] == 0
        counts, shares = counts[:-1], shares[:-1]
    if len(shares) == 1:
        return 1.0
    return float(chisquare(counts, [share * DRAWS for share in shares]).pvalue)


def test_the_numbers_are_splitmix64s() -> None:
    state = state_of(7, 0, 3)
    found = uniforms(torch.tensor([state]), 50)[0]
    theirs = [((x >> 12) * 2 + 1) * 2.0**-53 for x in islice(splitmix64(state % 2**64), 50)]
    assert found.tolist() == theirs


def test_the_numbers_are_inside_the_open_interval() -> None:
    # whatever is drawn, the noise is a number: the least and the largest that can be
    for odd in (1, 2**53 - 1):
        noise = -torch.log(-torch.log(torch.tensor(odd, dtype=torch.float64) * 2.0**-53))
        assert torch.isfinite(noise)


def test_seed_sample_and_step_all_tell() -> None:
    states = {state_of(*named) for named in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (10, 0, 0), (1, 0, 10))}
    assert len(states) == 6


@pytest.mark.parametrize("axis", ["tokens", "seeds", "steps", "samples"])
def test_the_numbers_are_uniform_along_every_axis(axis: str) -> None:
    if axis == "tokens":
        found = uniforms(torch.tensor([state_of(0, 0, 0)]), 20_000)[0]
    else:
        place = ["seeds", "samples", "steps"].index(axis)
        named = [tuple(i if at == place else 0 for at in range(3)) for i in range(20_000)]
        found = uniforms(torch.tensor([state_of(*one) for one in named]), 3)[:, 2]
    assert kstest(found.numpy(), "uniform").pvalue > 1e-3
    following = torch.stack((found[:-1], found[1:]))
    assert abs(torch.corrcoef(following)[0, 1].item()) < 0.03


def test_a_row_draws_the_same_alone_and_beside_others() -> None:
    states = torch.tensor([state_of(seed, 0, 5) for seed in range(9)])
    together = gumbel(states, 4097)
    for row, state in enumerate(states):
        assert torch.equal(together[row : row + 1], gumbel(state[None], 4097))
    assert len({row.numpy().tobytes() for row in together}) == 9


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 2},  # a tie at the edge
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"typical_p": 0.6},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.1},
    {"top_h": 0.5},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.8},
    {"suppress_tokens": (0,)},
    {"renormalize_logits": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(map(str, settings.items())))
def test_the_distribution_is_the_softmax_of_the_processed_scores(settings: dict[str, Any]) -> None:
    found, probabilities = frequencies(**settings), expected(**settings)
    assert all(not count or share > 0 for count, share in zip(found, probabilities.tolist(), strict=True))
    assert p_value(found, probabilities) > 1e-3


def test_the_test_of_the_distribution_can_fail() -> None:
    assert p_value(frequencies(temperature=1.25), expected()) < 1e-6
    assert p_value(frequencies(top_p=0.9), expected()) < 1e-6


def test_the_margin_is_what_the_winner_won_by_and_the_score_its_own() -> None:
    seeds = range(40)
    best = drawn(ROW, seeds, temperature=0.5)
    for row, seed in enumerate(seeds):
        ranked = (ROW / 0.5).double() + gumbel(torch.tensor([state_of(seed, 0, 0)]), len(ROW))[0]
        order = ranked.argsort(descending=True)
        assert best.tokens[row].tolist() == order[:2].tolist()
        winner = ROW[order[0]] / 0.5
        assert best.scores[row, 0] == winner
        assert best.scores[row, 1] == (winner.double() - (ranked[order[0]] - ranked[order[1]])).float()


def test_a_greedy_row_keeps_the_runner_ups_own_score() -> None:
    asked = request((1, 2, 3), params=GenerationParams(max_new_tokens=1, repetition_penalty=1.3))
    scores = ROW[None] * 1e-4
    scores[0, 0] = 1000.0
    best = sample([TokenSampler(asked, torch.device("cpu"))], scores, [0], summarise_rows(scores).hashes)
    (penalty,) = processors_for(asked, torch.device("cpu"))
    processed = penalty(torch.tensor([[1, 2, 3]]), scores)
    assert torch.equal(best.scores, processed.gather(1, best.tokens))


def test_where_one_token_is_kept_the_margin_is_its_distance_from_the_next() -> None:
    best = drawn(ROW, range(3), top_k=1)
    assert best.tokens.tolist() == [[0, 1]] * 3  # of the two that tie behind it the first
    assert best.scores.tolist() == [[2.0, 1.5]] * 3
    assert best.finite.all()


def test_where_nothing_else_can_be_chosen_the_margin_is_infinite() -> None:
    best = drawn(ROW, range(3), suppress_tokens=tuple(range(1, len(ROW))))
    assert best.tokens[:, 0].tolist() == [0, 0, 0]
    assert best.scores[:, 1].tolist() == [float("-inf")] * 3


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_k": 30, "temperature": 0.7}, {"top_k": 1}], ids=str)
def test_scores_that_move_by_less_than_half_the_margin_change_no_choice(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    edges = 0
    for seed in range(60):
        row = torch.randn(200) * 3
        best = drawn(row, range(seed, seed + 1), **settings)
        margin = float(best.scores[0, 0] - best.scores[0, 1])
        scale = settings.get("temperature", 1.0) * margin * 0.499
        for attempt in range(8):
            # each as far as it may: to and fro at random, and all against the winner
            moved = torch.randint(0, 2, row.shape) * 2 - 1 if attempt else torch.ones_like(row)
            moved[best.tokens[0, 0]] = -1
            again = drawn(row + scale * moved, range(seed, seed + 1), **settings)
            assert again.tokens[0, 0] == best.tokens[0, 0]
        plain = drawn(row, range(seed, seed + 1), **{k: v for k, v in settings.items() if k != "top_k"})
        edges += margin != float(plain.scores[0, 0] - plain.scores[0, 1])
        # by a little more than half of it, the runner-up against all others or all others against the winner, it does
        against = torch.full((2, len(row)), -1.0)
        against[0, best.tokens[0, 1]] = 1
        against[1] = 1
        against[1, best.tokens[0, 0]] = -1
        further = scale * (0.502 / 0.499)
        changed = [drawn(row + further * one, range(seed, seed + 1), **settings).tokens[0, 0] for one in against]
        assert any(token != best.tokens[0, 0] for token in changed)
    assert bool(edges) is ("top_k" in settings)


def test_where_no_token_is_left_the_row_is_not_finite() -> None:
    assert not drawn(ROW, range(1), suppress_tokens=tuple(range(len(ROW)))).finite.any()


def test_the_hash_tells_the_models_scores_and_the_processed_ones_apart() -> None:
    plain = drawn(ROW, range(1), top_k=3).hashes
    hidden = ROW.clone()
    hidden[-1] -= 1  # behind the cut: processed, the rows are the same
    assert drawn(hidden, range(1), top_k=3).hashes != plain
    assert drawn(ROW, range(1), top_k=4).hashes != plain
    assert drawn(ROW, range(1), top_k=3).hashes == plain


def test_greedy_and_sampled_rows_choose_side_by_side_what_they_choose_alone() -> None:
    greedy = TokenSampler(
        request((1, 2, 3), params=GenerationParams(max_new_tokens=1, repetition_penalty=2.0)), torch.device("cpu")
    )
    rows = [greedy, sampler(4), sampler(5, top_k=2), greedy, sampler(4)]
    scores = torch.stack([ROW + 0.1 * i for i in range(len(rows))])
    together = sample(rows, scores, [0] * len(rows), summarise_rows(scores).hashes)
    for at, one in zip(count(), rows):
        alone = sample([one], scores[at : at + 1], [0], summarise_rows(scores[at : at + 1]).hashes)
        for name in ("tokens", "scores", "hashes", "finite"):
            assert torch.equal(getattr(together, name)[at : at + 1], getattr(alone, name))


def test_log_probabilities_are_those_of_log_softmax() -> None:
    torch.manual_seed(0)
    scores = torch.randn(7, 4097) * 8
    tokens = torch.randint(0, 4097, (7,))
    found = log_probs(scores, tokens)
    truth = scores.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert (found.double() - truth).abs().max() < 4e-6
    for row in range(7):
        assert torch.equal(found[row : row + 1], log_probs(scores[row : row + 1], tokens[row : row + 1]))


def test_where_typical_p_leaves_out_the_best_the_margin_is_that_of_what_is_kept() -> None:
    best = drawn(ROW, range(20), typical_p=0.2)
    assert (best.scores[:, 0] > best.scores[:, 1]).all()


def test_the_number_of_threads_set_later_moves_no_bit_of_what_is_sampled(tmp_path: Path) -> None:
    """A sum over a long row is cut by the number of threads, and this vocabulary's are long enough."""
    directory = save(small_gpt2(vocab_size=50257), tmp_path / "model")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with client(tmp_path / "cache", model=directory) as asking:
            seeds = list(range(8))
            settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "typical_p": 0.9, "eos_token_id": []}
            made = asking.complete(["Hello"] * 8, seed=seeds, **settings)
            torch.set_num_threads(1)
            found = asking.verify(made, from_scratch=True)
            assert {one.verdict.status for one in found} == {"exact"}
            scored = asking.score([[1, 2]] * 4, [[at, 7, 9] for at in range(4)])
            torch.set_num_threads(2)
            assert {one.verdict.status for one in asking.verify(scored, from_scratch=True)} == {"exact"}
    finally:
        torch.set_num_threads(before)


def test_a_seed_left_out_among_others_is_refused(tmp_path: Path) -> None:
    with client(tmp_path) as asking, pytest.raises(ParameterError, match="no seed"):
        asking.complete(["a", "b"], do_sample=True, seed=[1, None])
