"""Bad input: a named error each, which says what was given, what is accepted and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import client, small_directory, small_gpt2

from stablegen.client import Client
from stablegen.core.policy import load_policy
from stablegen.errors import (
    AttentionMaskError,
    CacheDirectoryError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    DeviceError,
    DtypeError,
    ModelError,
    ParameterError,
    PolicyError,
    PromptError,
    RecordNotFoundError,
    StablegenError,
    UnsupportedParameterError,
)
from stablegen.machine.device import Device

IDS = torch.tensor([[5, 6, 7]])
Given = SimpleNamespace
Case = tuple[str, Callable[[Given], Any], type[StablegenError], str, str]


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client(tmp_path_factory.mktemp("cache"), model=small_directory()) as made:
        yield made


def ask(*arguments: Any, **named: Any) -> Callable[[Given], Any]:
    return lambda given: given.client.complete(*arguments, **named)


def generate(ids: Any, **named: Any) -> Callable[[Given], Any]:
    return lambda given: given.client.generate(ids, **({"max_new_tokens": 1} | named))


def make(**settings: Any) -> Callable[[Given], Any]:
    return lambda given: client(given.folder / "cache", **settings)


def on_a_t4(given: Given) -> Any:
    old = Device("cuda:0", "Tesla T4", capability=(7, 5), sm_count=40)
    given.patch.setattr("stablegen.machine.device.visible_gpus", lambda: [old])
    given.patch.setattr("stablegen.machine.plan.torch_cuda_version", lambda: "13.0")
    return client(given.folder / "cache", device="cuda", dtype="bfloat16")


def without_a_gpu(given: Given) -> Any:
    given.patch.setattr("stablegen.machine.device.visible_gpus", list)
    given.patch.setattr("stablegen.machine.plan.torch_cuda_version", lambda: "13.0")
    return client(given.folder / "cache", device="cuda:1")


def a_file_for_a_directory(given: Given) -> Any:
    (given.folder / "cache").write_text("x")
    return client(given.folder / "cache")


def an_empty_model_directory(given: Given) -> Any:
    (given.folder / "model").mkdir()
    return client(given.folder / "cache", model=given.folder / "model")


def nan_in_the_weights(given: Given) -> Any:
    model = small_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias[7] = torch.nan
    return Client(model, given.client.tokenizer._backend, cache_dir=given.folder / "cache")


CASES: list[Case] = [
    ("an empty prompt", ask(""), PromptError, "empty", "at least one token"),
    ("one empty prompt of several", ask(["a", ""]), PromptError, "empty", "at least one token"),
    ("a number for a prompt", ask(5), PromptError, "5 (int)", "a string.*generate"),
    ("a number among prompts", ask(["a", 5]), PromptError, "5 (int)", "a string.*generate"),
    ("no prompt", ask(None), PromptError, "None (NoneType)", "a string"),
    ("bytes for a prompt", ask(b"Hello"), PromptError, "b'Hello' (bytes)", "a string"),
    ("half a character", ask("a\ud800b"), PromptError, r"a\ud800b", "."),
    ("a prompt over the context", ask("word " * 600), ContextLengthError, "256", "at most 255.*Shorten"),
    (
        "a prompt of the context",
        generate(IDS[:, :1].repeat(1, 256)),
        ContextLengthError,
        "256",
        "at most 255",
    ),
    (
        "an answer over it",
        ask("Hello", max_new_tokens=256),
        ContextLengthError,
        "max_new_tokens=256",
        "up to 25",
    ),
    ("no new tokens", ask("Hello", max_new_tokens=0), ParameterError, "max_new_tokens=0", "at least 1"),
    ("fewer than none", ask("Hello", max_new_tokens=-3), ParameterError, "max_new_tokens=-3", "at least 1"),
    ("half a token", ask("Hello", max_new_tokens=1.5), ParameterError, "max_new_tokens=1.5", "whole number"),
    ("a word for an end", ask("Hello", eos_token_id="no"), ParameterError, "eos_token_id='no'", "a token id"),
    (
        "a fraction for an end",
        ask("Hello", eos_token_id=1.5),
        ParameterError,
        "eos_token_id=1.5",
        "a token id",
    ),
    (
        "sampling",
        ask("Hello", temperature=0.7),
        ParameterError,
        "temperature=0.7 has no effect without sampling",
        "together with do_sample=True",
    ),
    ("a temperature of zero", ask("Hello", do_sample=True, temperature=0), ParameterError, "temperature=0", "above 0"),
    ("a seed below zero", ask("Hello", do_sample=True, seed=-1), ParameterError, "seed=-1", "whole number from 0"),
    ("too few seeds", ask(["a", "b"], do_sample=True, seed=[1]), ParameterError, "for 2 rows", "one for each row"),
    ("a word unknown", ask("Hello", bad_words_ids=[[4096]]), PromptError, "token id 4096", "0 to 4095"),
    ("no stop string", ask("Hello", stop_strings=""), ParameterError, "stop_strings=''", "a string that is not empty"),
    ("a parameter unknown", ask("Hello", max_tokens=4), UnsupportedParameterError, "max_tokens=4", "max_new_tokens"),
    ("beams", generate(IDS, num_beams=4), UnsupportedParameterError, "beam search", "num_beams=1"),
    ("an argument unknown", generate(IDS, max_tokens=4), ParameterError, "max_tokens", "refuses"),
    ("nothing to continue", lambda given: given.client.score("Hello", ""), PromptError, "empty", "one token"),
    (
        "two kinds",
        lambda given: given.client.score(["Hello"], [[1]]),
        PromptError,
        "a prompt is of type str, its continuation of type list",
        "two strings",
    ),
    ("another mask", generate(IDS, attention_mask=IDS[:, :2]), AttentionMaskError, "(1, 2)", "equal shape"),
    (
        "a mask with holes",
        generate(IDS, attention_mask=torch.tensor([[1, 0, 1]])),
        AttentionMaskError,
        "row 0 of the attention mask has holes",
        "one run of ones.*Remove",
    ),
    ("ids the model lacks", generate(IDS + 5000), PromptError, "outside the vocabulary", "0 to 4095"),
    ("ids below zero", generate(IDS - 9), PromptError, "outside the vocabulary", "0 to 4095"),
    ("a list of ids", generate([[1, 2]]), PromptError, "list", "LongTensor"),
    ("a policy unknown", make(policy="batched"), ConfigError, "'batched'", "'single', 'padded:N'"),
    ("a policy of no rows", make(policy="padded:0"), ConfigError, "'padded:0'", "N from 1 to 4096"),
    ("no such policy", lambda _: load_policy("padded:0"), PolicyError, "'padded:0'", "N from 1"),
    ("a dtype unknown", make(dtype="float8"), ConfigError, "'float8'", "float32, float16, bfloat16"),
    ("a dtype the device lacks", on_a_t4, DtypeError, "Tesla T4", "float32, float16"),
    ("a device that is not there", without_a_gpu, DeviceError, "'cuda:1'", "'cpu' or 'auto'"),
    ("a device unknown", make(device="tpu"), ConfigError, "'tpu'", "auto, cpu, cuda"),
    (
        "no such key",
        lambda given: given.client.inspect("abc"),
        RecordNotFoundError,
        "'abc'",
        "64 hexadecimal",
    ),
    ("a file for a cache", a_file_for_a_directory, CacheDirectoryError, "cache", "a directory.*Choose"),
    ("no such model", make(model="./nowhere"), CheckpointError, "nowhere", "config.json.*'gpt2'"),
    (
        "an empty model",
        an_empty_model_directory,
        CheckpointError,
        "config.json, tokenizer.json",
        "save_pretr",
    ),
    ("weights with NaN", nan_in_the_weights, ModelError, "transformer.ln_f.bias", "Load the model again"),
]


@pytest.mark.parametrize(
    ("act", "kind", "given", "told"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_named_error(
    act: Callable[[Given], Any],
    kind: type[StablegenError],
    given: str,
    told: str,
    asking: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(StablegenError, match=f"(?s){told}") as caught:
        act(Given(client=asking, folder=tmp_path, patch=monkeypatch))
    error = caught.value
    assert type(error) is kind
    assert given in error.problem
    assert error.accepted or error.hint
    assert str(error) == error.message
    assert error.message.endswith(".")
    assert "\n" not in error.message


def test_nothing_of_a_call_with_bad_input_is_run(asking: Client) -> None:
    before = asking.cache.stats().records
    with pytest.raises(PromptError):
        asking.complete(["something new", ""], max_new_tokens=1)
    assert asking.cache.stats().records == before


def test_right_padding_is_accepted(asking: Client) -> None:
    padded = asking.generate(
        torch.tensor([[5, 6, 7, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0]]), max_new_tokens=2
    )
    assert padded[0, 4:].tolist() == asking.generate(IDS, max_new_tokens=2)[0, 3:].tolist()
