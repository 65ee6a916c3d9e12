"""Each argument of ``generate`` gives the tokens and scores that transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import (
    CASES,
    IN_FULL,
    NAMES,
    answer_to,
    assert_equal_rows,
    case_of,
    new_tokens,
    one,
    ours,
    rows_of,
    theirs,
    tokenizer,
)
from support import TINY, client, small_gpt2
from transformers import (
    GPT2LMHeadModel,
)

from stablegen.client import Client
from stablegen.errors import (
    NonFiniteScoresError,
)
from stablegen.lab.prompts import SAMPLE


@NAMES
def test_an_argument_gives_the_tokens_and_scores_of_transformers(name: str, model: Any, asking: Client) -> None:
    rows, arguments = case_of(name, model)
    given = one(rows[0])
    expected, found = (ask(given, **arguments, **IN_FULL) for ask in (_by(theirs, model), _by(ours, asking)))
    assert torch.equal(found.sequences, expected.sequences)
    assert_equal_rows(found.scores, expected.scores)
    assert_equal_rows(found.logits, expected.logits)
    plain = theirs(model, given, **IN_FULL)
    same = torch.equal(plain.sequences, expected.sequences) and all(map(torch.equal, plain.scores, expected.scores))
    assert same is not CASES[name].changes


def _by(ask: Callable[..., Any], whom: Any) -> Callable[..., Any]:
    return lambda given, **arguments: ask(whom, given, **arguments)


def test_an_ngram_is_not_said_twice(model: Any, asking: Client) -> None:
    row = rows_of()[0]
    given = one([*row, *answer_to(model, row, 12), *row])
    found = ours(asking, given, no_repeat_ngram_size=2, **IN_FULL)
    expected = theirs(model, given, no_repeat_ngram_size=2, **IN_FULL)
    assert torch.equal(found.sequences, expected.sequences)
    assert_equal_rows(found.scores, expected.scores)
    assert not torch.equal(found.sequences, theirs(model, given))


def test_a_forced_first_token_is_the_first(model: Any, asking: Client) -> None:
    given = one([654])
    assert new_tokens(ours(asking, given, forced_bos_token_id=77), 1)[0][0] == 77
    longer = one([654, 380])
    assert torch.equal(ours(asking, longer, forced_bos_token_id=77), ours(asking, longer))


@pytest.mark.parametrize("policy", ["single", "invariant"])
def test_invalid_values_are_removed_as_in_transformers(policy: str, anew: Callable[..., Client]) -> None:
    fragile = small_gpt2(tie_word_embeddings=False)
    with torch.no_grad():  # the first feature overflows where it is nearly all that there is: behind token 7
        fragile.transformer.ln_f.weight[0] = 6.2e37
        fragile.transformer.wte.weight[7] = 0.0
        fragile.transformer.wte.weight[7, 0] = 100.0
        fragile.lm_head.weight[:, 0] = 0.01
        fragile.lm_head.weight[[20, 21], 0] = torch.tensor([0.0, -0.01])
    given = one([5, 6, 7])
    asking = anew(fragile, policy=policy)
    found = ours(asking, given, remove_invalid_values=True, **IN_FULL)
    expected = theirs(fragile, given, remove_invalid_values=True, **IN_FULL)
    first = expected.logits[0][0]
    assert first[20].isnan() and first[21] == -torch.inf and first[22] == torch.inf
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.scores[0], expected.scores[0])
    if policy == "single":
        assert_equal_rows(found.scores, expected.scores)
    with pytest.raises(NonFiniteScoresError, match="step 0"):
        ours(asking, given)


def test_a_bias_of_minus_infinity_is_a_ban(model: Any, asking: Client) -> None:
    row = rows_of()[0]
    bias = {(answer_to(model, row)[2],): float("-inf")}
    found = ours(asking, one(row), sequence_bias=bias)
    assert torch.equal(found, theirs(model, one(row), sequence_bias=bias))
    assert not torch.equal(found, theirs(model, one(row)))


def test_settings_of_the_model_itself_are_in_force(anew: Callable[..., Client]) -> None:
    own = GPT2LMHeadModel.from_pretrained(TINY).eval()
    given = one(rows_of()[0])
    plain = theirs(own, given)
    own.generation_config.repetition_penalty = 1.4
    own.generation_config.max_new_tokens = 5
    found = ours(anew(own), given, max_new_tokens=None)
    assert torch.equal(found, theirs(own, given, max_new_tokens=None))
    assert found.shape[1] == given["input_ids"].shape[1] + 5
    assert not torch.equal(found, plain[:, : found.shape[1]])


def test_what_decides_no_answer_is_no_part_of_the_key(asking: Client) -> None:
    given = one(rows_of()[0])
    first = ours(asking, given, return_dict_in_generate=True).completions[0]
    for harmless in (
        {"use_cache": False},
        {"repetition_penalty": 1.0},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.5},
        {"num_beams": 1, "num_return_sequences": 1},
        {"cache_implementation": "static"},
        {"length_penalty": 2.0},
        {"seed": 7},
        {"guidance_scale": 1.0},
        {"output_attentions": False},
        {"tokenizer": tokenizer()},
    ):
        again = ours(asking, given, return_dict_in_generate=True, **harmless).completions[0]
        assert again.cached and again.key == first.key, harmless


@pytest.mark.slow
def test_forty_prompts_greedily(model: Any, asking: Client) -> None:
    answers = set()
    for row in rows_of(SAMPLE[:40]):
        expected = theirs(model, one(row))
        assert torch.equal(ours(asking, one(row)), expected)
        answers.add(tuple(new_tokens(expected, len(row))[0]))
    assert len(answers) > 20
    assert asking.cache.stats().records == 40


def test_a_client_by_name_resolves_arguments_as_the_model_does(model: Any, tmp_path: Path) -> None:
    row = rows_of()[0]
    a = answer_to(model, row)
    with client(tmp_path) as named:
        for name in ("generation_config with arguments beside it", "ends of every kind together", "min_new_tokens"):
            arguments = CASES[name].make(a, len(row))
            found = ours(named, one(row), **arguments, **IN_FULL)
            expected = theirs(model, one(row), **arguments, **IN_FULL)
            assert torch.equal(found.sequences, expected.sequences)
            assert_equal_rows(found.scores, expected.scores)
