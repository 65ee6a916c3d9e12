"""``client.generate`` as ``model.generate``: shapes, padding, masks, and the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_ids
from fixed_shapes import VOCABULARY, small_model
from support import TINY, client, small_gpt2
from tokenizers import Tokenizer

from stablegen.client import Client
from stablegen.errors import AttentionMaskError, ContextLengthError, PromptError

PROMPTS = ["Tell me about yourself.\nanswer : ", "What is your name?\nanswer : ", "Once upon a time", "No"]
NEW = 8
PAD = 9


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def asking(model: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(model, tokenizer, policy="single", cache_dir=tmp_path_factory.mktemp("cache")) as made:
        yield made


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    if side == "left":
        ids = [gap + row for gap, row in zip(gaps, rows, strict=True)]
        mask = [gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    else:
        ids = [row + gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [[1] * len(row) + gap for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_tokens_as_the_models_own_generate(
    prompt: str, asking: Client, model: Any, tokenizer: Tokenizer
) -> None:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    mask = torch.ones_like(ids)
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    ours = asking.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype == torch.int64


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_other_architectures_answer_as_their_own_generate(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = small_model(kind)
    arguments = {"max_new_tokens": NEW, "eos_token_id": [], "pad_token_id": PAD}
    answers = set()
    with Client(other, tokenizer, policy="single", cache_dir=tmp_path) as asking:
        for seed, length in enumerate((1, 2, 7, 20)):
            ids = torch.tensor([make_ids(seed, length, VOCABULARY)])
            theirs = other.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **arguments)
            assert torch.equal(asking.generate(ids, **arguments), theirs)
            answers.add(tuple(theirs[0, length:].tolist()))
    assert len(answers) > 1


def test_end_tokens_and_padding_as_the_models_own(asking: Client, model: Any, tokenizer: Tokenizer) -> None:
    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    free = [asking.generate(torch.tensor([row]), max_new_tokens=NEW)[0, len(row) :].tolist() for row in rows]
    ids, mask = padded(rows, "left")
    arguments = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": free[0][2], "pad_token_id": PAD}
    ours = asking.generate(ids, **arguments)
    assert torch.equal(ours, model.generate(ids, do_sample=False, **arguments))
    assert ours[0, ids.shape[1] :].tolist() == free[0][:3] + [PAD] * (ours.shape[1] - ids.shape[1] - 3)


def test_shorter_answers_are_filled_with_the_end_token(asking: Client, tokenizer: Tokenizer) -> None:
    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS[:2]]
    free = [asking.generate(torch.tensor([row]), max_new_tokens=NEW)[0, len(row) :].tolist() for row in rows]
    end = next(token for token in free[0] if token not in free[1])
    ids, mask = padded(rows, "left")
    filled = asking.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=end)
    length = free[0].index(end) + 1
    assert filled[0, ids.shape[1] :].tolist() == free[0][:length] + [end] * (NEW - length)
    assert filled[1, ids.shape[1] :].tolist() == free[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_stripped_and_never_seen(side: str, asking: Client, tokenizer: Tokenizer) -> None:
    rows = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    ids, mask = padded(rows, side)
    found = asking.generate(ids, attention_mask=mask, max_new_tokens=NEW, return_dict_in_generate=True, pad_token_id=0)
    alone = [asking.complete(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    assert [one.trace for one in found.completions] == [one.trace for one in alone]
    assert [one.key for one in found.completions] == [one.key for one in alone]
    assert all(one.cached for one in alone)
    assert torch.equal(found.sequences[:, : ids.shape[1]], ids)
    assert found.sequences.shape == (len(PROMPTS), ids.shape[1] + NEW)


def test_a_dict_has_sequences_and_completions(asking: Client) -> None:
    from transformers.generation import GenerateDecoderOnlyOutput

    ids = torch.tensor([[5, 6], [7, 8], [5, 6]])
    found = asking.generate(input_ids=ids, max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(found, GenerateDecoderOnlyOutput)
    assert torch.equal(found.sequences, asking.generate(ids, max_new_tokens=2))
    assert found["sequences"] is found.sequences
    assert [found.sequences[row, 2:].tolist() for row in range(3)] == [list(one.token_ids) for one in found.completions]
    assert found.completions[0] is found.completions[2]
    assert found.completions[0].record.request.prompt is None


def test_twenty_tokens_unless_told(asking: Client) -> None:
    with pytest.warns(UserWarning, match="model-agnostic default"):  # transformers' own
        assert asking.generate(torch.tensor([[5, 6]]), eos_token_id=[]).shape == (1, 22)


def test_a_mask_of_booleans_or_floats(asking: Client) -> None:
    ids, mask = torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]])
    plain = asking.generate(ids, attention_mask=mask, max_new_tokens=2)
    for kind in (torch.bool, torch.float32):
        assert torch.equal(asking.generate(ids, attention_mask=mask.to(kind), max_new_tokens=2), plain)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.ones(2, 3), r"is of shape \(2, 3\), the ids are of shape \(2, 4\).*equal shape"),
        (torch.ones(4), r"is of shape \(4,\)"),
        ([[1, 1, 1, 1]] * 2, "is a list"),
        (torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), "row 1 .*has holes.*one run of ones.*Remove"),
        (torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), "row 0 .*is empty.*at least one token"),
    ],
    ids=["shape", "one dimension", "list", "holes", "empty row"],
)
def test_a_bad_mask_is_refused(mask: Any, told: str, asking: Client) -> None:
    with pytest.raises(AttentionMaskError, match=told):
        asking.generate(torch.tensor([[5, 6, 7, 8]] * 2), attention_mask=mask, max_new_tokens=1)


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2]],
        torch.tensor([1, 2]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[True, False]]),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor([[1, 4096]]),
        torch.tensor([[1, -1]]),
        torch.tensor([[1, 2**40]]),
    ],
    ids=["list", "one row", "floats", "booleans", "no ids", "no rows", "too large", "negative", "huge"],
)
def test_bad_ids_are_refused(ids: Any, asking: Client) -> None:
    with pytest.raises(PromptError):
        asking.generate(ids, max_new_tokens=1)


def test_ids_given_twice_are_refused(asking: Client) -> None:
    ids = torch.tensor([[1, 2]])
    with pytest.raises(PromptError):
        asking.generate(ids, input_ids=ids + 1, max_new_tokens=1)


def test_the_context_counts_tokens_and_not_padding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Client(small_gpt2(n_positions=16), tokenizer, cache_dir=tmp_path) as small:
        ids = torch.tensor([[0] * 14 + [5, 6]])
        mask = torch.tensor([[0] * 14 + [1, 1]])
        assert small.generate(ids, attention_mask=mask, max_new_tokens=14, eos_token_id=[]).shape == (1, 30)
        with pytest.raises(ContextLengthError):
            small.generate(ids, attention_mask=mask, max_new_tokens=15)


def test_a_client_by_name_generates_too(asking: Client, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with client(tmp_path) as named:
        assert torch.equal(named.generate(ids, max_new_tokens=3), asking.generate(ids, max_new_tokens=3))
