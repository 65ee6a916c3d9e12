"""A stabilized model in the place of its own: settings, copies, pipelines, threads."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import (
    IDS,
    NEW,
    PAD,
    PROMPTS,
    Computed,
    KeyedEndsAt,
    KeyedFavour,
    Recorder,
    answer_to,
    assert_heard_the_same,
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
from support import TINY, small_gpt2, small_llama
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    pipeline,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

import stablegen
from stablegen.client import Client
from stablegen.errors import (
    ModelError,
    ParameterError,
    PromptError,
    UncachedWarning,
    UnsupportedParameterError,
)


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
        stablegen.stabilize(small, on_risk="nonsense")  # type: ignore[arg-type]
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
            assert Path(made.cache.where) == alone_in_the_world / "answers"
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
