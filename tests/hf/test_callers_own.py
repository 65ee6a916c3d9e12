"""Logits processors and stopping criteria of the caller's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generating import (
    BY_POLICY,
    IN_FULL,
    NEW,
    SAMPLED,
    KeyedEndsAt,
    KeyedFavour,
    answer_to,
    assert_as_alone,
    assert_equal_rows,
    emptied,
    new_tokens,
    one,
    ours,
    padded,
    rows_of,
    text_of,
    theirs,
    tokenizer,
)
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)

from stablegen.client import Client
from stablegen.errors import (
    InvalidRequestError,
)


@BY_POLICY
def test_a_processor_with_a_cache_key_is_applied_and_cached(
    policy: str, small: Any, clients: dict[str, Client]
) -> None:
    asking, row = emptied(clients[policy]), rows_of()[0]
    own = LogitsProcessorList([KeyedFavour(77)])
    found = ours(asking, one(row), logits_processor=own, **IN_FULL)
    expected = theirs(small, one(row), logits_processor=own, **IN_FULL)
    assert torch.equal(found.sequences, expected.sequences)
    assert new_tokens(found, len(row))[0][::2] == [77] * (NEW // 2)
    if policy == "single":
        assert_equal_rows(found.scores, expected.scores)
    plain = ours(asking, one(row), return_dict_in_generate=True).completions[0]
    other = ours(asking, one(row), logits_processor=[KeyedFavour(78)], return_dict_in_generate=True).completions[0]
    again = ours(asking, one(row), logits_processor=[KeyedFavour(77)], return_dict_in_generate=True).completions[0]
    mine = found.completions[0]
    assert not mine.cached and not other.cached and not plain.cached
    assert again.cached and again.key == mine.key and again.trace == mine.trace
    assert len({plain.key, mine.key, other.key}) == 3


@BY_POLICY
def test_a_criterion_with_a_cache_key_is_applied_and_cached(
    policy: str, small: Any, clients: dict[str, Client]
) -> None:
    asking, rows = emptied(clients[policy]), rows_of()
    token = answer_to(small, rows[0])[3]
    arguments = {"return_dict_in_generate": True, "stopping_criteria": StoppingCriteriaList([KeyedEndsAt(token)])}
    alone = [ours(asking, one(row), **arguments).completions[0] for row in rows]
    assert list(alone[0].token_ids) == answer_to(small, rows[0])[:4]
    assert alone[0].record.finish_reason == "stop"
    for row, done in zip(rows, alone, strict=True):
        expected = theirs(small, one(row), stopping_criteria=arguments["stopping_criteria"])
        assert list(done.token_ids) == new_tokens(expected, len(row))[0]
    order = [3, 0, 6]
    assert_as_alone(ours(emptied(asking), padded([rows[place] for place in order]), **arguments), alone, order)
    again = ours(asking, one(rows[0]), return_dict_in_generate=True, stopping_criteria=[KeyedEndsAt(token)])
    assert again.completions[0].cached and again.completions[0].trace == alone[0].trace
    other = ours(asking, one(rows[0]), return_dict_in_generate=True, stopping_criteria=[KeyedEndsAt(token + 1)])
    assert not other.completions[0].cached and other.completions[0].key != alone[0].key


def test_own_processors_stand_where_transformers_puts_them(model: Any, asking: Client) -> None:
    class Half(LogitsProcessor):
        cache_key = "half of what is above -10"

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.where(scores > -10, scores / 2, scores)

    class Penalty(RepetitionPenaltyLogitsProcessor):
        cache_key = "a penalty of another type"

    row = rows_of()[0]
    own = LogitsProcessorList([Half(), Penalty(2.0), KeyedFavour(5, 3.0)])
    arguments = {
        "logits_processor": own,
        "repetition_penalty": 1.2,
        "suppress_tokens": [291],
        "renormalize_logits": True,
    }
    found, expected = (ask(whom, one(row), **arguments, **IN_FULL) for ask, whom in ((ours, asking), (theirs, model)))
    assert torch.equal(found.sequences, expected.sequences)
    assert_equal_rows(found.scores, expected.scores)
    reordered = ours(asking, one(row), **arguments | {"logits_processor": own[::-1]}, **IN_FULL)
    assert reordered.completions[0].key != found.completions[0].key


def keyed(processor: Any, key: str) -> Any:
    processor.cache_key = key
    return processor


@pytest.mark.parametrize("count", [1, 2])
def test_an_own_processor_takes_the_place_of_one_of_its_type(count: int, model: Any, asking: Client) -> None:
    row = rows_of()[0]
    own = [keyed(RepetitionPenaltyLogitsProcessor(factor), f"penalty {factor}") for factor in (1.6, 2.2)][:count]
    arguments = {"logits_processor": LogitsProcessorList(own), "repetition_penalty": 1.2, "suppress_tokens": [291]}
    found, expected = (ask(whom, one(row), **arguments, **IN_FULL) for ask, whom in ((ours, asking), (theirs, model)))
    assert_equal_rows(found.scores[:1], expected.scores[:1])
    assert torch.equal(found.sequences, expected.sequences)
    assert_equal_rows(found.scores, expected.scores)


def test_an_own_processor_is_applied_before_the_warpers(asking: Client) -> None:
    row = rows_of()[0]
    arguments = SAMPLED | {"top_k": 3, "logits_processor": [KeyedFavour(77), KeyedFavour(78, 29.0)]}
    for seed in range(3):
        out = ours(asking, one(row), **arguments | {"seed": seed}, **IN_FULL)
        assert out.scores[0][0, 77] > -torch.inf and out.completions[0].token_ids[0] in (77, 78)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processor", "criterion"])
def test_a_client_that_has_not_seen_a_key_serves_and_judges_but_cannot_verify(
    kind: str, model: Any, tmp_path: Path
) -> None:
    row = rows_of()[0]
    arguments = {
        "processor": lambda: {"logits_processor": [KeyedFavour(77)]},
        "criterion": lambda: {"stopping_criteria": [KeyedEndsAt(answer_to(model, row)[3])]},
    }[kind]
    with Client(model, tokenizer(), cache_dir=tmp_path) as first:
        made = ours(first, one(row), **arguments(), return_dict_in_generate=True).completions[0]
        assert first.verify(made).verdict.status == "exact"
    with Client(model, tokenizer(), cache_dir=tmp_path) as later:
        record = later.inspect(made.key)
        assert record == made.record
        assert later.judge(record).status == "exact"
        with pytest.raises(InvalidRequestError, match="does not have them"):
            later.verify(record)
        with pytest.raises(InvalidRequestError, match="does not have them"):
            later.verify(made.key)
        served = ours(later, one(row), **arguments(), return_dict_in_generate=True).completions[0]
        assert served.cached and served.trace == made.trace and served.verdict.status == "exact"
        assert later.verify(made.key).verdict.status == "exact"


@pytest.mark.parametrize("policy", ["single", "invariant"])
def test_transformers_own_criteria_behave_as_in_transformers(
    policy: str, small: Any, clients: dict[str, Client]
) -> None:
    asking, row = emptied(clients[policy]), rows_of()[4]
    a, width = answer_to(small, row), len(row)
    lists: dict[str, list[Any]] = {
        "shorter": [MaxLengthCriteria(max_length=width + 3)],
        "longer": [MaxLengthCriteria(max_length=width + NEW + 2)],
        "end": [EosTokenCriteria(eos_token_id=a[2])],
        "ends": [EosTokenCriteria(eos_token_id=torch.tensor([a[5], a[3]]))],
        "text": [StopStringCriteria(tokenizer(), [text_of(a[4])])],
        "all": [
            StopStringCriteria(tokenizer(), text_of(a[4])),
            EosTokenCriteria(eos_token_id=a[6]),
            MaxLengthCriteria(max_length=width + 7),
        ],
    }
    lengths = {}
    for name, criteria in lists.items():
        own = StoppingCriteriaList(criteria)
        found = ours(asking, one(row), stopping_criteria=own)
        assert torch.equal(found, theirs(small, one(row), stopping_criteria=own)), name
        lengths[name] = found.shape[1] - width
    assert lengths == {"shorter": 3, "longer": NEW + 2, "end": 3, "ends": 4, "text": 5, "all": 5}


def test_an_end_given_as_a_criterion_is_no_end_to_the_processors(model: Any, asking: Client) -> None:
    row = rows_of()[0]
    own = StoppingCriteriaList([EosTokenCriteria(eos_token_id=answer_to(model, row)[2])])
    arguments = {"stopping_criteria": own, "min_new_tokens": 5}
    assert torch.equal(ours(asking, one(row), **arguments), theirs(model, one(row), **arguments))


def test_a_length_given_as_a_criterion_is_no_length_to_the_processors(model: Any, asking: Client) -> None:
    row = rows_of()[0]
    own = StoppingCriteriaList([MaxLengthCriteria(max_length=len(row) + 4)])
    arguments = {"stopping_criteria": own, "forced_eos_token_id": 77}
    assert torch.equal(ours(asking, one(row), **arguments), theirs(model, one(row), **arguments))


def test_an_own_processor_of_a_length_stands_as_in_transformers(model: Any, asking: Client) -> None:
    row = rows_of()[0]
    a = answer_to(model, row)
    own = keyed(MinNewTokensLengthLogitsProcessor(len(row), 4, a[2]), f"not {a[2]} in the first 4")
    arguments = {"logits_processor": LogitsProcessorList([own]), "eos_token_id": a[2]}
    found = ours(asking, one(row), **arguments)
    assert torch.equal(found, theirs(model, one(row), **arguments))
    assert found.shape[1] > len(row) + 3
