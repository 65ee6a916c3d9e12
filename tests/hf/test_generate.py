"""``generate`` in the place of transformers' own: every argument, at every batch size, from a run and from a hit."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, client, small_gpt2, small_llama
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    WatermarkingConfig,
)
from transformers.generation import logits_process as hf

import stablegen
from stablegen.client import Client
from stablegen.errors import (
    InvalidRequestError,
    ModelError,
    NonFiniteScoresError,
    ParameterError,
    PromptError,
    UncachedWarning,
    UnsupportedParameterError,
)
from stablegen.kernels.sampling import gumbel, state_of
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


# -- what is asked -------------------------------------------------------------------------------------------------


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
    return ids[:, width:].tolist()  # type: ignore[no-any-return]


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


@pytest.fixture(scope="module")
def model() -> Any:
    return GPT2LMHeadModel.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def small() -> Any:
    """Return a model whose random weights are large enough for answers of many tokens."""
    return small_gpt2(initializer_range=0.3)


@pytest.fixture(scope="module")
def clients(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """Return a client of each policy around the small model."""
    with ExitStack() as opened:
        yield {
            policy: opened.enter_context(
                Client(small, tokenizer(), policy=policy, cache_dir=tmp_path_factory.mktemp("cache"))
            )
            for policy in POLICIES
        }


@pytest.fixture(scope="module")
def single(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(model, tokenizer(), policy="single", cache_dir=tmp_path_factory.mktemp("cache")) as made:
        yield made


@pytest.fixture
def asking(single: Client) -> Client:
    """Return a client of policy ``single`` around tiny-gpt2, its cache empty."""
    return emptied(single)


@pytest.fixture
def anew(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Return what makes clients with a cache of their own, closed when the test is over."""
    with ExitStack() as opened:
        made: list[Client] = []

        def make(model: Any, words: Any = None, **settings: Any) -> Client:
            settings = {"policy": "single", "cache_dir": tmp_path / f"cache-{len(made)}"} | settings
            made.append(opened.enter_context(Client(model, words, **settings)))
            return made[-1]

        yield make


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


# -- each argument as in transformers ------------------------------------------------------------------------------


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


# -- at every batch size -------------------------------------------------------------------------------------------


@BY_POLICY
@NAMES
def test_an_argument_gives_a_row_the_same_in_every_batch(
    name: str, policy: str, small: Any, clients: dict[str, Client]
) -> None:
    rows, arguments = case_of(name, small)
    asking = clients[policy]
    alone = each_alone(asking, rows, **arguments)
    assert len({completion.token_ids for completion in alone}) > 1
    for order in ORDERS:
        assert_as_alone(in_full(emptied(asking), padded([rows[place] for place in order]), **arguments), alone, order)
    assert_as_alone(in_full(asking, padded(rows), **arguments), alone, range(8), cached=True)


def test_transformers_own_numerics_tell_the_batches_apart(small: Any, anew: Callable[..., Client]) -> None:
    asking, rows = anew(small, policy="native"), rows_of()
    alone = each_alone(asking, rows)
    batch = in_full(emptied(asking), padded(rows)).completions
    assert any(mine.trace != other.trace for mine, other in zip(batch, alone, strict=True))


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


@BY_POLICY
def test_scores_of_a_row_are_the_same_in_every_batch_and_from_a_hit(policy: str, clients: dict[str, Client]) -> None:
    asking = emptied(clients[policy])
    rows = rows_of()[:3]
    free = ours(asking, one(rows[1]), return_dict_in_generate=True).completions[0].token_ids
    arguments = {"repetition_penalty": 1.1, "eos_token_id": free[3], "renormalize_logits": True} | IN_FULL
    alone = [ours(asking, one(row), **arguments) for row in rows]
    lengths = [len(out.scores) for out in alone]
    assert min(lengths) < max(lengths) == NEW
    run = ours(emptied(asking), padded(rows), **arguments)
    hit = ours(asking, padded(rows), **arguments)
    assert [done.cached for done in (*run.completions, *hit.completions)] == [False] * 3 + [True] * 3
    assert_equal_rows(hit.scores, run.scores)
    assert_equal_rows(hit.logits, run.logits)
    for row, length in enumerate(lengths):
        for kind in ("scores", "logits"):
            assert_equal_rows([step[row] for step in run[kind]][:length], [step[0] for step in alone[row][kind]])
            assert not any(step[row].any() for step in run[kind][length:])  # those of rows that have ended are 0
        assert run.completions[row].trace.scores == tuple(
            run.scores[step][row, token].item() for step, token in enumerate(run.completions[row].token_ids)
        )


# -- sampling ------------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "seed": 11, "temperature": 1.3, "top_k": 40, "top_p": 0.9}
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
    expected = theirs(asking.source.model, one(row), do_sample=None, generation_config=forced, **IN_FULL)
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
    texts = asking.complete(PROMPTS[:3], max_new_tokens=NEW, **SAMPLED | {"seed": [5, 6, 5]})
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
            state = torch.tensor([state_of(SAMPLED["seed"], 4 + row % 2, step)])
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


# -- streamers -----------------------------------------------------------------------------------------------------


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


@BY_POLICY
@pytest.mark.parametrize("places", [[0], [0, 1, 2], [1, 0, 1, 2]], ids=["alone", "three", "one of them twice"])
def test_a_streamer_hears_what_it_does_of_transformers(
    places: list[int], policy: str, small: Any, clients: dict[str, Client]
) -> None:
    rows = [rows_of()[place] for place in places]
    arguments = {"eos_token_id": answer_to(small, rows_of()[0])[2]}
    expected = Recorder()
    out = theirs(small, padded(rows), streamer=expected, **arguments)
    assert expected.heard[-1] is None and len(expected.heard) == out.shape[1] - max(map(len, rows)) + 2
    asking = emptied(clients[policy])

    def hear() -> list[bool]:
        found = Recorder()
        done = in_full(asking, padded(rows), streamer=found, **arguments)
        assert torch.equal(done.sequences, out)
        assert_heard_the_same(found, expected)
        return [completion.cached for completion in done.completions]

    assert hear() == [False] * len(rows)
    assert hear() == [True] * len(rows)
    ours(emptied(asking), one(rows[0]), **arguments)
    assert hear() == [place == places[0] for place in places]


@BY_POLICY
def test_a_streamer_hears_rows_that_end_by_stop_strings(policy: str, small: Any, clients: dict[str, Client]) -> None:
    rows = rows_of()[:3]
    arguments = {"stop_strings": text_of(answer_to(small, rows[0])[3]), "tokenizer": tokenizer()}
    expected = Recorder()
    out = theirs(small, padded(rows), streamer=expected, **arguments)
    lengths = [(row != PAD).sum().item() for row in out]
    assert len(set(lengths)) > 1
    asking = emptied(clients[policy])
    for _ in range(2):
        found = Recorder()
        assert torch.equal(ours(asking, padded(rows), streamer=found, **arguments), out)
        assert_heard_the_same(found, expected)


def test_a_streamer_hears_several_samples(asking: Client) -> None:
    heard = []
    for _ in range(2):
        recorder = Recorder()
        out = ours(asking, padded(rows_of()[:2]), streamer=recorder, num_return_sequences=2, **SAMPLED)
        told = [value for value in recorder.heard if value is not None]
        width = told[0].shape[1]
        assert torch.equal(told[0], out[:, :width])
        assert torch.equal(torch.stack(told[1:], dim=1), out[:, width:])
        heard.append(recorder)
    assert_heard_the_same(*heard)


@BY_POLICY
def test_a_streamer_hears_the_first_token_while_the_others_are_computed(
    policy: str, clients: dict[str, Client]
) -> None:
    asking = emptied(clients[policy])
    kept: list[int] = []

    class Watching(Recorder):
        def put(self, value: torch.Tensor) -> None:
            kept.append(asking.cache.stats().records)

    ours(asking, padded(rows_of()[:2]), streamer=Watching())
    assert len(kept) == 1 + NEW
    assert kept[1] < 2  # the other's record is there: rows run one by one under ``single``
    assert asking.cache.stats().records == 2


def test_a_text_streamer_in_a_thread(small: Any, clients: dict[str, Client]) -> None:
    def chunks(ask: Callable[..., Any], whom: Any) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
        given = one(rows_of()[3])
        thread = threading.Thread(target=ask, args=(whom, given), kwargs={"streamer": streamer, "max_new_tokens": 12})
        thread.start()
        try:
            return list(streamer)
        finally:
            thread.join()

    expected = chunks(theirs, small)
    assert len(expected) > 3
    for asking in map(emptied, clients.values()):
        assert chunks(ours, asking) == expected
        assert chunks(ours, asking) == expected


def test_a_text_streamer_takes_one_row(model: Any, asking: Client) -> None:
    for ask, whom in ((theirs, model), (ours, asking)):
        with pytest.raises(ValueError, match="batch size 1"):
            ask(whom, padded(rows_of()[:2]), streamer=TextStreamer(tokenizer()))
    assert asking.cache.stats().records == 0


def test_a_text_streamer_prints_what_it_does_of_transformers(
    model: Any, asking: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for ask, whom in ((theirs, model), (ours, asking), (ours, asking)):
        ask(whom, one(rows_of()[0]), streamer=TextStreamer(tokenizer()), max_new_tokens=12)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert printed[0].startswith("What do you think")


# -- results in kind -----------------------------------------------------------------------------------------------


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


# -- what is refused -----------------------------------------------------------------------------------------------


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
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "beams": ({"num_beams": 2}, "beam search", "num_beams=1"),
    "sampled beams": ({"num_beams": 2, "do_sample": True, "seed": 1}, "beam sample", "num_beams=1"),
    "groups of beams": ({"num_beams": 4, "num_beam_groups": 2}, "group beam search", "num_beams=1"),
    "forced words": ({"force_words_ids": [[5]]}, "constrained beam search", "num_beams=1"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search", "Leave penalty_alpha out"),
    "dola": ({"dola_layers": "high"}, "dola generation", "Leave dola_layers out"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted generation", "Leave prompt_lookup_num_tokens"),
    "assistant": ({"assistant_model": object()}, "assistant_model", "Leave it out"),
    "prefix": ({"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "prefix_allowed_tokens_fn", "bad_words_ids"),
    "time": ({"max_time": 60.0}, "max_time=60.0", "Use max_new_tokens"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale=1.5", "Leave it out"),
    "healing": ({"token_healing": True}, "token_healing=True", "Trim the prompt"),
    "watermark": ({"watermarking_config": WatermarkingConfig()}, "watermarking_config", "Leave it out"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 3, 256)}, "inputs_embeds", "Give input_ids"),
    "past": ({"past_key_values": DynamicCache()}, "past_key_values", "Give the whole prompt"),
    "positions": ({"position_ids": torch.tensor([[0, 1, 2]])}, "position_ids", "Leave it out"),
    "token types": ({"token_type_ids": torch.zeros_like(IDS)}, "token_type_ids", "Leave it out"),
    "attentions": ({"output_attentions": True}, "output_attentions=True", "Call the model itself"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states=True", "Call the model itself"),
    "custom, by name": ({"custom_generate": "someone/something"}, "custom_generate", "Leave it out"),
    "custom, a function": ({"custom_generate": lambda model, **_: None}, "custom_generate", "Leave it out"),
    "negative prompt": ({"negative_prompt_ids": IDS}, "negative_prompt_ids", "Leave it out"),
    "paged": ({"cache_implementation": "paged"}, "cache_implementation='paged'", "Leave it out"),
    "processor": ({"logits_processor": LogitsProcessorList([Favour(7)])}, "processor of its own, Favour", "cache_key"),
    "processor, a function": ({"logits_processor": [lambda ids, scores: scores]}, "function", "cache_key"),
    "criterion": (
        {"stopping_criteria": StoppingCriteriaList([EndsAt(7)])},
        "criterion of its own, EndsAt",
        "cache_key",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_policy_makes_stable_is_refused_by_name(name: str, asking: Client) -> None:
    arguments, what, instead = REFUSED[name]
    given = {} if "inputs_embeds" in arguments else {"input_ids": IDS}
    with pytest.raises(UnsupportedParameterError) as caught:
        ours(asking, given, **arguments)
    assert what in caught.value.problem
    assert instead in str(caught.value.hint) and "unsupported='passthrough'" in str(caught.value.hint)
    assert isinstance(caught.value, ValueError)
    assert asking.cache.stats().records == 0


def test_a_setting_is_refused_in_a_configuration_too(asking: Client) -> None:
    with pytest.raises(UnsupportedParameterError, match="beam search"):
        asking.generate(IDS, GenerationConfig(num_beams=3, max_new_tokens=2))


PASSED_ON: dict[str, Callable[[], dict[str, Any]]] = {
    "beams": lambda: {"num_beams": 3},
    "time": lambda: {"max_time": 600.0},
    "processor": lambda: {"logits_processor": LogitsProcessorList([Favour(7)])},
    "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([EndsAt(291)])},
    "hidden states": lambda: {"output_hidden_states": True, "return_dict_in_generate": True},
    "attentions": lambda: {"output_attentions": True, "return_dict_in_generate": True},
    "lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "prefix": lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7, 8]},
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_is_passed_through_is_transformers_own(name: str, anew: Callable[..., Client]) -> None:
    own = GPT2LMHeadModel.from_pretrained(TINY, attn_implementation="eager").eval()
    given = one(rows_of()[0])
    expected = theirs(own, given, **PASSED_ON[name]())
    changes = name in ("beams", "processor", "criterion", "prefix")
    assert torch.equal(theirs(own, given), getattr(expected, "sequences", expected)) is not changes
    asking = anew(own, tokenizer())
    arguments, equal_ones = PASSED_ON[name](), PASSED_ON[name]()
    with pytest.raises(UnsupportedParameterError):
        ours(asking, given, unsupported="raise", **arguments)
    with pytest.warns(UncachedWarning, match="not cached") as told:
        first = ours(asking, given, unsupported="passthrough", **arguments)
    assert len(told) == 1
    again = ours(asking, given, unsupported="passthrough", **equal_ones)  # where a warning is an error
    for found in (first, again):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected)
            continue
        assert torch.equal(found.sequences, expected.sequences)
        for kind in ("hidden_states", "attentions"):
            assert (kind in found) is (kind in expected) is (f"output_{kind}" in PASSED_ON[name]())
            for mine, other in zip(found.get(kind, ()), expected.get(kind, ()), strict=True):
                assert all(map(torch.equal, mine, other))
    assert asking.cache.stats().records == 0


def test_a_client_by_name_passes_on_to_a_model_of_its_own(model: Any, tmp_path: Path) -> None:
    given = one(rows_of()[0])
    with client(tmp_path) as named:
        with pytest.warns(UncachedWarning, match="beam search"):
            found = ours(named, given, num_beams=2, unsupported="passthrough")
        assert torch.equal(found, theirs(model, given, num_beams=2))
        assert not torch.equal(found, theirs(model, given))


def test_passing_through_leaves_what_is_supported_cached(asking: Client) -> None:
    given = one(rows_of()[0])
    out = ours(asking, given, unsupported="passthrough", return_dict_in_generate=True, repetition_penalty=1.2)
    assert not out.completions[0].cached
    assert asking.cache.stats().records == 1


def test_an_unknown_argument_is_refused_as_in_transformers(model: Any, asking: Client) -> None:
    given = one(rows_of()[0])
    for ask, whom in ((theirs, model), (ours, asking)):
        with pytest.raises(ValueError, match=r"model_kwargs.*max_token"):
            ask(whom, given, max_token=3)
    with pytest.raises(ParameterError, match="model_kwargs"):
        ours(asking, given, unsupported="passthrough", max_token=3)


@pytest.mark.parametrize("unsupported", ["other", None, True], ids=repr)
def test_another_way_with_the_unsupported_is_refused(unsupported: Any, asking: Client) -> None:
    with pytest.raises(ParameterError, match="'raise', 'passthrough'"):
        asking.generate(IDS, max_new_tokens=1, unsupported=unsupported)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": None, "max_length": 3},
        {"temperature": 0.0, "do_sample": True, "seed": 1},
        {"repetition_penalty": -1.0},
        {"num_return_sequences": 2},
        {"bad_words_ids": [[-1]]},
        {"bad_words_ids": []},
        {"do_sample": True, "seed": 1, "min_p": 1.5},
        {"sequence_bias": {}},
        {"stop_strings": [], "tokenizer": tokenizer()},
    ],
    ids=repr,
)
def test_a_value_that_transformers_refuses_is_refused(arguments: dict[str, Any], model: Any, asking: Client) -> None:
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with pytest.raises(ParameterError):
        ours(asking, given, **arguments)
    without_seed = {name: value for name, value in arguments.items() if name != "seed"}
    with pytest.raises(ValueError):  # noqa: PT011 - any of transformers' own
        theirs(model, given, **without_seed)


# -- the caller's own processors and criteria ----------------------------------------------------------------------


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
        with pytest.raises(InvalidRequestError, match="has not seen"):
            later.verify(record)
        with pytest.raises(InvalidRequestError, match="has not seen"):
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


# -- in the place of a model's own ---------------------------------------------------------------------------------


@pytest.fixture
def alone_in_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a folder without a configuration, and in an environment without one."""
    for name in ("POLICY", "ON_RISK", "APP", "CONFIG", "CACHE_DIR", "DTYPE", "DEVICE", "MODEL", "ACCEPTED_RISK"):
        monkeypatch.delenv(f"STABLEGEN_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stabilized(alone_in_the_world: Path) -> Iterator[Any]:
    """Return a stabilized GPT-2 with its tokenizer."""
    stable = stablegen.stabilize(small_gpt2(), tokenizer(), cache_dir=alone_in_the_world / "cache")
    yield stable
    if "stablegen" in vars(stable):
        stablegen.restore(stable)


def test_a_stabilized_model_is_the_same_object_and_its_answers_are_cached(alone_in_the_world: Path) -> None:
    plain = small_gpt2()
    rows = [[5, 6, 7], [8, 9, 10, 11], [12]]
    width = max(map(len, rows))
    expected = [
        new_tokens(plain.generate(**one(row), max_new_tokens=NEW, pad_token_id=PAD), len(row))[0] for row in rows
    ]
    stable = stablegen.stabilize(plain, tokenizer(), cache_dir=alone_in_the_world / "cache")
    assert stable is plain and isinstance(stable.stablegen, Client)
    for cached in (False, True):
        out = stable.generate(**padded(rows), max_new_tokens=NEW, pad_token_id=PAD, return_dict_in_generate=True)
        assert [done.cached for done in out.completions] == [cached] * 3
        assert new_tokens(out, width) == expected
    assert stable.stablegen.cache.stats().records == 3
    assert (
        stable.stablegen.generate(**padded(rows), max_new_tokens=NEW, return_dict_in_generate=True)
        .completions[0]
        .cached
    )
    with pytest.raises(UnsupportedParameterError):
        stable.generate(IDS, num_beams=2)
    assert stablegen.restore(stable) is plain
    assert not hasattr(plain, "stablegen") and "generate" not in vars(plain)
    assert plain.generate.__func__ is GPT2LMHeadModel.generate
    assert type(plain.generate(IDS, max_new_tokens=2, pad_token_id=PAD, return_dict_in_generate=True)) is (
        GenerateDecoderOnlyOutput
    )


def test_arguments_by_place_mean_what_they_do_in_transformers(stabilized: Any) -> None:
    config = GenerationConfig(max_new_tokens=NEW, pad_token_id=PAD)
    processors = LogitsProcessorList([KeyedFavour(77)])
    criteria = StoppingCriteriaList([KeyedEndsAt(77)])
    expected, found = Recorder(), Recorder()
    out = GPT2LMHeadModel.generate(stabilized, IDS, config, processors, criteria, None, None, None, expected)
    assert torch.equal(stabilized.generate(IDS, config, processors, criteria, None, None, None, found), out)
    assert new_tokens(out, 3) == [[77]]
    assert_heard_the_same(found, expected)
    with pytest.raises(UnsupportedParameterError, match="prefix_allowed_tokens_fn"):
        stabilized.generate(IDS, config, None, None, lambda row, ids: [5])


def test_a_model_that_is_not_stabilized_cannot_be_restored(small: Any) -> None:
    with pytest.raises(ModelError, match="not stabilized"):
        stablegen.restore(small)


def test_a_restored_model_cannot_be_restored_again(stabilized: Any) -> None:
    stablegen.restore(stabilized)
    with pytest.raises(ModelError, match="not stabilized"):
        stablegen.restore(stabilized)


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_stabilized_model_is_not_copied(take: Callable[[Any], Any], stabilized: Any) -> None:
    with pytest.raises(ModelError, match=r"stablegen\.restore"):
        take(stabilized)
    take(stablegen.restore(stabilized))


def test_a_stabilized_model_is_saved_as_any_other(stabilized: Any, tmp_path: Path) -> None:
    stabilized.save_pretrained(tmp_path / "saved")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(theirs(again, one([5, 6, 7])), ours(stabilized, one([5, 6, 7])))


def test_weights_that_change_make_other_keys(stabilized: Any) -> None:
    first = ours(stabilized, one([5, 6, 7]), return_dict_in_generate=True).completions[0]
    with torch.no_grad():
        stabilized.transformer.wte.weight[100] *= 50
    second = ours(stabilized, one([5, 6, 7]), return_dict_in_generate=True)
    assert not second.completions[0].cached and second.completions[0].key != first.key
    assert torch.equal(second.sequences, theirs(stabilized, one([5, 6, 7])))


def test_stabilized_twice_a_model_has_a_new_client(stabilized: Any, tmp_path: Path) -> None:
    first = stabilized.stablegen
    assert stablegen.stabilize(stabilized, policy="single", cache_dir=tmp_path / "other") is stabilized
    assert stabilized.stablegen is not first
    assert str(stabilized.stablegen.policy) == "single"
    assert ours(stabilized, one([5, 6, 7])).shape == (1, 3 + NEW)
    assert stabilized.stablegen.cache.stats().records == 1
    assert "stablegen" not in vars(stablegen.restore(stabilized))
    assert stabilized.generate.__func__ is GPT2LMHeadModel.generate


def test_a_stabilization_that_fails_leaves_the_model_as_it_was(stabilized: Any, small: Any) -> None:
    before = stabilized.stablegen
    with pytest.raises(stablegen.StablegenError):
        stablegen.stabilize(stabilized, policy="nonsense")
    assert stabilized.stablegen is before and ours(stabilized, one([5, 6, 7])).shape == (1, 3 + NEW)
    with pytest.raises(stablegen.StablegenError):
        stablegen.stabilize(small, on_risk="nonsense")
    assert "generate" not in vars(small) and "stablegen" not in vars(small)


def test_the_policy_is_invariant_for_a_gpt2_and_single_for_others(alone_in_the_world: Path) -> None:
    for made, policy in ((small_gpt2(), "invariant"), (small_llama(), "single")):
        stable = stablegen.stabilize(made, cache_dir=alone_in_the_world / policy)
        assert str(stable.stablegen.policy) == policy
        assert torch.equal(ours(stable, one([5, 6, 7])), theirs(made, one([5, 6, 7])))
        stablegen.restore(stable)


def test_settings_come_from_the_configuration(
    alone_in_the_world: Path, monkeypatch: pytest.MonkeyPatch, small: Any
) -> None:
    text = """
    [defaults]
    policy = "padded:4"
    on_risk = "serve"
    cache_dir = "answers"
    [apps.chat]
    policy = "single"
    """
    (alone_in_the_world / "stablegen.toml").write_text(text, encoding="utf-8")

    def settled(**given: Any) -> tuple[str, str, str | None]:
        made = stablegen.stabilize(small, **given).stablegen
        try:
            assert made.cache.path == alone_in_the_world / "answers"
            return str(made.policy), made.on_risk, made.app
        finally:
            stablegen.restore(small)

    assert settled() == ("padded:4", "serve", None)
    assert settled(app="chat") == ("single", "serve", "chat")
    assert settled(policy="invariant", on_risk="raise") == ("invariant", "raise", None)
    monkeypatch.setenv("STABLEGEN_POLICY", "padded:2")
    assert settled(app="chat") == ("padded:2", "serve", "chat")


def test_a_configured_policy_is_in_force_for_other_architectures_too(alone_in_the_world: Path) -> None:
    (alone_in_the_world / "stablegen.toml").write_text('[defaults]\npolicy = "padded:2"\n', encoding="utf-8")
    stable = stablegen.stabilize(small_llama(), cache_dir=alone_in_the_world / "cache")
    assert str(stable.stablegen.policy) == "padded:2"
    stablegen.restore(stable)


def test_without_a_tokenizer_there_are_tokens_and_no_text(alone_in_the_world: Path) -> None:
    stable = stablegen.stabilize(small_gpt2(), cache_dir=alone_in_the_world / "cache")
    for cached in (False, True):
        done = ours(stable, one([5, 6, 7]), return_dict_in_generate=True).completions[0]
        assert done.cached is cached and done.text == "" and len(done.token_ids) == NEW
    with pytest.raises(ParameterError, match="tokenizer"):
        ours(stable, one([5, 6, 7]), stop_strings="a")
    with pytest.raises(PromptError, match="tokenizer"):
        stable.stablegen.complete("Hello")
    stablegen.restore(stable)


def test_without_a_tokenizer_of_its_own_a_client_takes_that_of_the_call(
    model: Any, anew: Callable[..., Client]
) -> None:
    row = rows_of()[0]
    stops = text_of(answer_to(model, row)[3])
    bare = anew(model)
    for _ in range(2):
        found = ours(bare, one(row), stop_strings=stops, tokenizer=tokenizer())
        assert torch.equal(found, theirs(model, one(row), stop_strings=stops, tokenizer=tokenizer()))
    assert found.shape[1] == len(row) + 4


def test_without_a_tokenizer_of_its_own_a_client_takes_a_criterion_of_stop_strings(
    model: Any, anew: Callable[..., Client]
) -> None:
    row = rows_of()[0]
    own = StoppingCriteriaList([StopStringCriteria(tokenizer(), [text_of(answer_to(model, row)[3])])])
    found = ours(anew(model), one(row), stopping_criteria=own)
    assert torch.equal(found, theirs(model, one(row), stopping_criteria=own))
    assert found.shape[1] == len(row) + 4


def test_what_a_stabilized_model_does_with_the_unsupported(alone_in_the_world: Path) -> None:
    stable = stablegen.stabilize(small_gpt2(), cache_dir=alone_in_the_world / "cache", unsupported="passthrough")
    with pytest.warns(UncachedWarning, match="beam search"):
        found = ours(stable, one([5, 6, 7]), num_beams=2)
    assert torch.equal(found, theirs(stable, one([5, 6, 7]), num_beams=2))
    with pytest.raises(UnsupportedParameterError):
        ours(stable, one([5, 6, 7]), num_beams=2, unsupported="raise")
    stablegen.restore(stable)


# -- a pipeline ----------------------------------------------------------------------------------------------------


def piped(stable: Any, **arguments: Any) -> list[list[int]]:
    """Return the token ids that a pipeline gives for each prompt, without padding."""
    words = copy.deepcopy(tokenizer())
    words.pad_token, words.padding_side = words.convert_ids_to_tokens(PAD), "left"
    pipe = pipeline("text-generation", model=stable, tokenizer=words)
    found = pipe(list(PROMPTS), return_tensors=True, **arguments)
    return [[token for token in out[0]["generated_token_ids"] if token != PAD] for out in found]


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "seed": 5}], ids=["greedy", "sampled"])
def test_a_pipeline_gives_the_same_at_every_batch_size(settings: dict[str, Any], stabilized: Any) -> None:
    one_by_one = piped(stabilized, batch_size=1, max_new_tokens=NEW, **settings)
    assert stabilized.stablegen.cache.stats().records == len(PROMPTS)
    emptied(stabilized.stablegen)
    assert piped(stabilized, batch_size=8, max_new_tokens=NEW, **settings) == one_by_one
    assert [out[: len(row)] for out, row in zip(one_by_one, rows_of(), strict=True)] == rows_of()
    assert len({tuple(out[-NEW:]) for out in one_by_one}) > 1
    assert piped(stabilized, batch_size=3, max_new_tokens=NEW, **settings) == one_by_one
    assert stabilized.stablegen.cache.stats().records == len(PROMPTS)


def test_a_pipeline_samples_by_its_own_defaults(stabilized: Any) -> None:
    sampled = piped(stabilized, max_new_tokens=NEW, seed=5)
    for record in stabilized.stablegen.cache.records():
        assert record.request.params.do_sample
        assert record.request.params.temperature == 0.7
        assert record.request.params.seed == 5
    assert sampled != piped(stabilized, max_new_tokens=NEW, do_sample=False)
    assert stabilized.stablegen.cache.stats().records == 2 * len(PROMPTS)


def test_a_pipeline_without_a_seed_is_told_once(stabilized: Any) -> None:
    with pytest.warns(UncachedWarning, match="no seed") as told:
        piped(stabilized, max_new_tokens=2)
    assert len(told) == 1
    assert stabilized.stablegen.cache.stats().records == 0


def test_a_pipeline_stops_at_its_stop_sequence(model: Any, alone_in_the_world: Path) -> None:
    row = rows_of()[0]
    stop = text_of(answer_to(model, row)[3])
    own = GPT2LMHeadModel.from_pretrained(TINY).eval()
    stable = stablegen.stabilize(own, tokenizer(), policy="single", cache_dir=alone_in_the_world / "cache")
    found = piped(stable, max_new_tokens=NEW, do_sample=False, stop_sequence=stop)
    expected = [theirs(model, one(row), stop_strings=stop, tokenizer=tokenizer())[0].tolist() for row in rows_of()]
    assert found == expected
    assert len(found[0]) == len(row) + 4
    stablegen.restore(stable)


# -- threads -------------------------------------------------------------------------------------------------------


@dataclass
class Computed:
    """The keys of what engines ran, self-checks left out."""

    keys: list[str] = field(default_factory=list)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    from stablegen.engine.invariant.engine import GPT2Engine
    from stablegen.engine.transformers.engine import TransformersEngine

    seen = Computed()

    def watch(kind: Any) -> None:
        generate = kind.generate

        def watched(engine: Any, batch: Any, *rest: Any) -> Iterator[Any]:
            seen.keys.extend(asked.key for _, asked in batch.requests if asked.model.digest != "self-check")
            return generate(engine, batch, *rest)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, "generate", watched)

    watch(TransformersEngine)
    watch(GPT2Engine)
    return seen


@pytest.mark.parametrize("policy", ["invariant", "padded:3"])
def test_threads_that_ask_for_the_same_compute_it_once(
    policy: str, small: Any, anew: Callable[..., Client], computed: Computed
) -> None:
    rows = [[7 + 3 * row + place for place in range(1 + row)] for row in range(6)]
    settings: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 4}, {"repetition_penalty": 1.5}]
    arguments = {"return_dict_in_generate": True, "eos_token_id": 4000}
    alone_client = anew(small, policy=policy)
    alone = [
        [ours(alone_client, one(row), **chosen, **arguments).completions[0] for row in rows] for chosen in settings
    ]
    assert len({done.token_ids for answers in alone for done in answers}) > 9
    computed.keys.clear()
    shared = anew(small, policy=policy)
    ready = threading.Barrier(8)

    def ask(number: int) -> list[tuple[int, list[int], Any]]:
        ready.wait()
        found = []
        for turn in range(3):
            kind = (number + turn) % 3
            order = [(number * 5 + turn + place) % 6 for place in range(2 + number % 3)]
            given = padded([rows[place] for place in order])
            found.append((kind, order, ours(shared, given, **settings[kind], **arguments)))
        return found

    with ThreadPoolExecutor(8) as pool:
        results = [result for results in pool.map(ask, range(8)) for result in results]
    for kind, order, out in results:
        for row, place in enumerate(order):
            assert out.completions[row].key == alone[kind][place].key
            assert out.completions[row].trace == alone[kind][place].trace
    asked = {alone[kind][place].key for kind, order, _ in results for place in order}
    assert len(asked) > 12
    assert Counter(computed.keys) == Counter(asked)


def test_one_model_in_many_threads_is_told_once_of_a_missing_seed(stabilized: Any) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ours(stabilized, one([5, 6, 7]), do_sample=True)[0].tolist(), range(8)))
    assert len([one for one in told if issubclass(one.category, UncachedWarning)]) == 1
    assert len(set(map(tuple, answers))) > 4
