"""Results of ``generate`` are in kind; padding and masks mean what they do in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import (
    BY_POLICY,
    END,
    EQUAL,
    IN_FULL,
    NEW,
    PAD,
    SAMPLED,
    answer_to,
    assert_as_alone,
    assert_equal_rows,
    emptied,
    new_tokens,
    one,
    ours,
    padded,
    rows_of,
    theirs,
)
from transformers import (
    GenerationConfig,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
)

from stablegen.client import Client
from stablegen.errors import (
    PromptError,
)


def test_ids_come_back_as_a_long_tensor(model: Any, asking: Client) -> None:
    for kind in (torch.int64, torch.int32):
        given = padded(rows_of()[:2])
        given["input_ids"] = given["input_ids"].to(kind)
        found, expected = ours(asking, given), theirs(model, given)
        assert type(found) is torch.Tensor
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)


def test_a_dict_holds_what_was_asked_for(asking: Client) -> None:
    given = one(rows_of()[0])
    plain = ours(asking, given, return_dict_in_generate=True)
    assert isinstance(plain, GenerateDecoderOnlyOutput)
    assert plain.scores is None and plain.logits is None
    assert [plain.attentions, plain.hidden_states, plain.past_key_values] == [None] * 3
    assert "scores" not in plain and "completions" in plain
    both = ours(asking, given, **IN_FULL)
    for kind, other in (("scores", "logits"), ("logits", "scores")):
        found = ours(asking, given, return_dict_in_generate=True, **{f"output_{kind}": True})
        assert found[kind] is not None and getattr(found, other) is None
        assert isinstance(found[kind], tuple)
        assert_equal_rows(found[kind], both[kind])
    assert isinstance(ours(asking, given, output_scores=True, output_logits=True), torch.Tensor)


def test_scores_from_a_hit_are_those_of_the_run_after_sampling(clients: dict[str, Client]) -> None:
    for asking in map(emptied, clients.values()):
        run, hit = (ours(asking, padded(rows_of()[:3]), **SAMPLED, **IN_FULL) for _ in range(2))
        assert not any(done.cached for done in run.completions)
        assert all(done.cached for done in hit.completions)
        assert_equal_rows(hit.scores, run.scores)
        assert_equal_rows(hit.logits, run.logits)


def test_rows_that_ended_early_are_filled(model: Any, asking: Client) -> None:
    rows = [row[:EQUAL] for row in rows_of()[:4]]
    answers = [answer_to(model, row) for row in rows]
    ends = [answers[0][1], answers[1][4]]
    for pad, filler in ((PAD, PAD), (None, ends[0])):
        arguments = {"eos_token_id": ends, "pad_token_id": pad}
        found = ours(asking, padded(rows), **arguments)
        assert torch.equal(found, theirs(model, padded(rows), **arguments))
        assert new_tokens(found, EQUAL)[0] == [*answers[0][:2], *[filler] * (found.shape[1] - EQUAL - 2)]


def test_no_prompt_begins_with_the_first_token(model: Any, asking: Client) -> None:
    expected = type(model).generate(model, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    assert torch.equal(asking.generate(max_new_tokens=NEW, pad_token_id=PAD), expected)
    assert torch.equal(asking.generate(None, max_new_tokens=NEW, pad_token_id=PAD), expected)
    assert expected[0, 0] == END and expected.shape == (1, 1 + NEW)
    other = asking.generate(bos_token_id=77, max_new_tokens=NEW, pad_token_id=PAD)
    assert torch.equal(
        other, type(model).generate(model, bos_token_id=77, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    )
    assert other[0, 0] == 77


def test_ids_by_name_or_place(asking: Client) -> None:
    given = one(rows_of()[0])
    ids = given["input_ids"]
    expected = ours(asking, given)
    for found in (
        asking.generate(ids, max_new_tokens=NEW),
        asking.generate(inputs=ids, max_new_tokens=NEW),
        asking.generate(input_ids=ids, max_new_tokens=NEW),
        asking.generate(ids, GenerationConfig(max_new_tokens=NEW)),
    ):
        assert torch.equal(found, expected)
    with pytest.raises(PromptError, match="both"):
        asking.generate(ids, input_ids=ids, max_new_tokens=NEW)


@BY_POLICY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_seen(side: str, policy: str, clients: dict[str, Client]) -> None:
    asking, rows = emptied(clients[policy]), rows_of()
    arguments = {"encoder_repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "return_dict_in_generate": True}
    alone = [ours(asking, one(row), **arguments).completions[0] for row in rows]
    given = padded(rows, side)
    found = ours(emptied(asking), given, **arguments)
    assert_as_alone(found, alone, range(len(rows)))
    assert torch.equal(found.sequences[:, : given["input_ids"].shape[1]], given["input_ids"])


def test_a_mask_is_inferred_as_transformers_infers_it(model: Any, asking: Client) -> None:
    rows = rows_of()[:3]
    given = padded(rows)
    bare = {"input_ids": given["input_ids"]}
    inferred = ours(asking, bare, pad_token_id=PAD)
    assert torch.equal(inferred, theirs(model, bare, pad_token_id=PAD))
    assert torch.equal(inferred, ours(asking, given))
    # where the pad token is an end token too, or there is none, it stands for itself
    for settings in ({"pad_token_id": PAD, "eos_token_id": PAD}, {"pad_token_id": None}, {"pad_token_id": 77}):
        found = ours(asking, bare, **settings)
        assert torch.equal(found, theirs(model, bare, **settings))
        assert not torch.equal(found[1], inferred[1])
    with pytest.raises(PromptError, match="row 1"):
        ours(asking, {"input_ids": torch.tensor([[5, 6], [PAD, PAD]])}, pad_token_id=PAD)
