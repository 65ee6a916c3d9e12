"""Prompts, models' answers and callers' own objects that several tests of ``generate`` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from support import TINY
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.generation import (
    LogitsProcessor,
    StoppingCriteria,
)

from stablegen.client import Client
from stablegen.lab.prompts import SAMPLE

NEW = 8
PAD = 9
"""A token that no prompt here holds and no answer."""
END = 0
"""The model's end token, which is where its texts begin too."""
POLICIES = ("single", "padded:3", "invariant")
PROMPTS = tuple(SAMPLE[number] for number in (0, 1, 2, 3, 4, 16, 17, 38))
EQUAL = 5
"""Tokens of each prompt where all are of one length."""
ORDERS = ([5, 2, 7], [6, 7, 1, 0, 3, 5, 4, 2])
"""Prompts by their places, as batches of other sizes and in other orders hold them."""
IN_FULL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
Make = Callable[[Sequence[int], int], dict[str, Any]]


@cache
def tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"), eos_token="<|endoftext|>")


def rows_of(prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    return [tokenizer()(prompt)["input_ids"] for prompt in prompts]


def one(row: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the arguments that a prompt alone is given by."""
    return padded([row])


def padded(rows: Sequence[Sequence[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Return the arguments that prompts of several lengths are given by."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[place, where] = torch.tensor(row)
        mask[place, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def theirs(model: Any, given: dict[str, torch.Tensor], **arguments: Any) -> Any:
    """Return what transformers' own ``generate`` gives, whatever stands in its place."""
    filled = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | arguments
    return type(model).generate(model, **given, **_without_nothing(filled))


def ours(asking: Any, given: dict[str, torch.Tensor], **arguments: Any) -> Any:
    """Return what a client gives, or a stabilized model."""
    filled = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | arguments
    return asking.generate(**given, **_without_nothing(filled))


def _without_nothing(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def new_tokens(out: Any, width: int) -> list[list[int]]:
    ids = out if isinstance(out, torch.Tensor) else out.sequences
    return ids[:, width:].tolist()


def answer_to(model: Any, row: Sequence[int], new: int = NEW) -> list[int]:
    """Return the greedy answer to a prompt as transformers gives it."""
    return new_tokens(theirs(model, one(row), max_new_tokens=new), len(row))[0]


def text_of(*tokens: int) -> str:
    return str(tokenizer().decode(list(tokens)))


@dataclass(frozen=True)
class Case:
    """An argument of ``generate``: made from a greedy answer and the prompts' width in tokens.

    ``length``: that of all prompts, where it counts; ``changes``: whether answer or scores are others by it.
    """

    make: Make
    length: int | None = None
    changes: bool = True


CASES: dict[str, Case] = {
    "nothing": Case(lambda a, w: {}, changes=False),
    "max_length": Case(lambda a, w: {"max_length": w + 5, "max_new_tokens": None}, EQUAL),
    "min_length": Case(lambda a, w: {"min_length": w + 6, "eos_token_id": a[2]}, EQUAL),
    "min_new_tokens": Case(lambda a, w: {"min_new_tokens": 5, "eos_token_id": [a[1], a[2]]}),
    "repetition_penalty": Case(lambda a, w: {"repetition_penalty": 1.4}),
    "repetition_penalty below 1": Case(lambda a, w: {"repetition_penalty": 0.7}),
    "encoder_repetition_penalty": Case(lambda a, w: {"encoder_repetition_penalty": 1.7}),
    "no_repeat_ngram_size 1": Case(lambda a, w: {"no_repeat_ngram_size": 1}),
    "encoder_no_repeat_ngram_size": Case(lambda a, w: {"encoder_no_repeat_ngram_size": 1}),
    "bad_words_ids, single": Case(lambda a, w: {"bad_words_ids": [[a[2]], [a[0]]]}),
    "bad_words_ids, several": Case(lambda a, w: {"bad_words_ids": [[a[1], a[2]], [a[3], a[4], a[5]]]}),
    "bad_words_ids, both": Case(lambda a, w: {"bad_words_ids": [[a[1], a[2]], [a[5]]], "eos_token_id": a[5]}),
    "suppress_tokens": Case(lambda a, w: {"suppress_tokens": [a[0], a[3]]}),
    "begin_suppress_tokens": Case(lambda a, w: {"begin_suppress_tokens": [a[0], a[1]]}),
    "sequence_bias, a dict": Case(lambda a, w: {"sequence_bias": {(a[2],): -9.0, (a[0], a[1]): -4.5, (7,): 0.5}}),
    "sequence_bias, a list": Case(lambda a, w: {"sequence_bias": [[[a[1]], -9.5], [[a[2], a[3]], -20.0]]}),
    "forced_bos_token_id": Case(lambda a, w: {"forced_bos_token_id": 77}, 1),
    "forced_bos_token_id and begin_suppress_tokens": Case(
        lambda a, w: {"forced_bos_token_id": a[1], "begin_suppress_tokens": [a[0], a[1], a[2]]}, 1
    ),
    "forced_eos_token_id": Case(lambda a, w: {"forced_eos_token_id": 77}),
    "forced_eos_token_id, several": Case(lambda a, w: {"forced_eos_token_id": [78, 77]}),
    "exponential_decay_length_penalty": Case(lambda a, w: {"exponential_decay_length_penalty": (2, 1.8)}),
    "eos_token_id": Case(lambda a, w: {"eos_token_id": a[3]}),
    "eos_token_id, several": Case(lambda a, w: {"eos_token_id": [a[5], a[2]]}),
    "remove_invalid_values": Case(lambda a, w: {"remove_invalid_values": True}, changes=False),
    "renormalize_logits": Case(lambda a, w: {"renormalize_logits": True}),
    "stop_strings": Case(lambda a, w: {"stop_strings": text_of(a[3]), "tokenizer": tokenizer()}),
    "stop_strings, several": Case(
        lambda a, w: {"stop_strings": ["never said", text_of(a[1], a[2])[-3:]], "tokenizer": tokenizer()}
    ),
    "generation_config": Case(
        lambda a, w: {
            "generation_config": GenerationConfig(max_new_tokens=6, repetition_penalty=1.4, bad_words_ids=[[a[1]]]),
            "max_new_tokens": None,
        }
    ),
    "generation_config with arguments beside it": Case(
        lambda a, w: {
            "generation_config": GenerationConfig(max_new_tokens=3, repetition_penalty=1.9, suppress_tokens=[a[0]]),
            "max_new_tokens": 7,
            "repetition_penalty": 1.2,
        }
    ),
    "words, penalties and lengths together": Case(
        lambda a, w: {
            "bad_words_ids": [[a[0]], [a[2], a[3]]],
            "sequence_bias": {(a[1],): 4.0},
            "repetition_penalty": 1.2,
            "encoder_repetition_penalty": 1.1,
            "no_repeat_ngram_size": 2,
            "suppress_tokens": [a[4]],
            "begin_suppress_tokens": [a[1]],
            "min_new_tokens": 4,
            "exponential_decay_length_penalty": (5, 1.3),
            "renormalize_logits": True,
        }
    ),
    "ends of every kind together": Case(
        lambda a, w: {
            "eos_token_id": [a[1], a[6]],
            "min_new_tokens": 3,
            "forced_eos_token_id": a[6],
            "stop_strings": ["never said", text_of(a[5])],
            "tokenizer": tokenizer(),
        }
    ),
}
"""Every argument that decides a greedy answer."""
NAMES = pytest.mark.parametrize("name", CASES)
BY_POLICY = pytest.mark.parametrize("policy", POLICIES)


def emptied(asking: Client) -> Client:
    """Return a client whose cache holds nothing, so that all it is asked is computed."""
    asking.cache.clear()
    assert asking.cache.stats().records == 0
    return asking


def case_of(name: str, model: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """Return prompts for a case, and its arguments; they are made for the first of the prompts."""
    case = CASES[name]
    rows = rows_of()
    if case.length:
        rows = of_one_length(case.length)
    return rows, case.make(answer_to(model, rows[0]), len(rows[0]))


def of_one_length(length: int) -> list[list[int]]:
    """Return eight prompts of so many tokens that are all different."""
    return [[*row[: length - 1], row[length - 1] + place] for place, row in enumerate(rows_of())]


def assert_equal_rows(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine.shape == other.shape and mine.dtype == other.dtype == torch.float32
        assert torch.equal(mine, other), f"step {step}"


def in_full(asking: Any, given: dict[str, torch.Tensor], **arguments: Any) -> Any:
    return ours(asking, given, return_dict_in_generate=True, **arguments)


def each_alone(asking: Client, rows: Sequence[Sequence[int]], **arguments: Any) -> list[Any]:
    """Return the completions of prompts that are asked for one by one, none of them from the cache."""
    emptied(asking)
    found = [in_full(asking, one(row), **arguments).completions[0] for row in rows]
    assert not any(completion.cached for completion in found)
    return found


def assert_as_alone(found: Any, alone: Sequence[Any], order: Sequence[int], *, cached: bool = False) -> None:
    """Check that each row of an output is what the row alone was: tokens, and every step's scores."""
    width = found.sequences.shape[1] - max(len(alone[place].token_ids) for place in order)
    for row, place in enumerate(order):
        mine, expected = found.completions[row], alone[place]
        assert mine.cached is cached
        assert mine.key == expected.key
        assert mine.token_ids == expected.token_ids
        assert mine.trace == expected.trace
        assert mine.record.finish_reason == expected.record.finish_reason
        filled = [*expected.token_ids, *[PAD] * (len(found.sequences[row]) - width - len(expected.token_ids))]
        assert found.sequences[row, width:].tolist() == filled


SAMPLED = {"do_sample": True, "seed": 11, "temperature": 1.3, "top_k": 40, "top_p": 0.9}


class Recorder:
    """A streamer that keeps what it is handed; None is the end."""

    def __init__(self) -> None:
        self.heard: list[torch.Tensor | None] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.clone())

    def end(self) -> None:
        self.heard.append(None)


def assert_heard_the_same(mine: Recorder, other: Recorder) -> None:
    assert len(mine.heard) == len(other.heard)
    for found, expected in zip(mine.heard, other.heard, strict=True):
        assert (found is None) is (expected is None)
        if found is not None and expected is not None:
            assert found.dtype == expected.dtype
            assert found.device == expected.device
            assert torch.equal(found, expected)


class Favour(LogitsProcessor):
    """A processor with nothing to know it by."""

    def __init__(self, token: int, amount: float = 30.0) -> None:
        self.token, self.amount = token, amount

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] += self.amount * (input_ids[:, -1] != self.token)
        return scores


class KeyedFavour(Favour):
    @property
    def cache_key(self) -> str:
        return f"favour {self.token} by {self.amount}"


class EndsAt(StoppingCriteria):
    """A criterion with nothing to know it by."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


class KeyedEndsAt(EndsAt):
    @property
    def cache_key(self) -> str:
        return f"ends at {self.token}"


IDS = torch.tensor([[5, 6, 7]])


@dataclass
class Computed:
    """The keys of what engines ran, self-checks left out."""

    keys: list[str] = field(default_factory=list)
