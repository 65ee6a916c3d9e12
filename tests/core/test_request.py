"""The request key: equal if and only if the same was asked; and what a prompt must be."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import MODEL, client, python, request

from stablegen.core.params import GenerationParams
from stablegen.core.request import SCHEMA, ModelIdentity, Request, check_fits, check_prompt
from stablegen.errors import ContextLengthError, ParameterError, PromptError, UnsupportedParameterError

# small pools, so that equal pairs come up as well as unequal ones
ids = st.lists(st.sampled_from([0, 1, 255, 256, 2**31, 2**32 - 1]), min_size=1, max_size=3).map(tuple)
params = st.builds(
    GenerationParams,
    max_new_tokens=st.integers(1, 3),
    eos_token_ids=st.sampled_from([(), (0,), (1,), (0, 1)]),
)
models = st.sampled_from(
    [
        ModelIdentity(source="digest", digest="a"),
        ModelIdentity(source="digest", digest="b"),
        ModelIdentity(source="hub", repo="a", commit="b"),
        ModelIdentity(source="hub", repo="a", commit="c"),
        ModelIdentity(source="hub", repo="ab", commit=""),
    ]
)
requests = st.builds(Request, ids, params, models, st.sampled_from(["t", "u"]), st.sampled_from([None, "x", "y"]))


@given(requests, requests)
def test_keys_are_equal_if_and_only_if_the_same_was_asked(one: Request, other: Request) -> None:
    assert (one.key == other.key) == (one == other)


def test_the_key_is_the_sha256_of_the_canonical_bytes() -> None:
    asked = Request((1, 258), GenerationParams(max_new_tokens=3, eos_token_ids=(0,)), MODEL, "t")
    head = f'{{"model":{{"digest":"{MODEL.digest}"}},"params":{{"eos_token_ids":[0],"max_new_tokens":3}},'
    canonical = f'{head}"schema":{SCHEMA},"tokenizer":"t"}}\n'.encode() + b"\1\0\0\0\2\1\0\0"
    assert asked.canonical() == canonical
    assert asked.key == hashlib.sha256(canonical).hexdigest()


def test_the_key_is_the_same_in_another_process() -> None:
    code = """
import json
from stablegen.core.params import GenerationParams
from stablegen.core.request import ModelIdentity, Request
model = ModelIdentity(source="digest", digest="5" * 64)
print(json.dumps(Request((1, 2, 3), GenerationParams(max_new_tokens=4), model, "7" * 64).key))
"""
    assert python(code) == request().key


@pytest.mark.parametrize(
    "changed",
    [
        request((1, 2, 4)),
        request((1, 2, 3, 3)),
        request((3, 2, 1)),
        request(new=5),
        request(model=ModelIdentity(source="digest", digest="6" * 64)),
        request(model=ModelIdentity(source="hub", repo="some", commit="5" * 64)),
        request(tokenizer="8" * 64),
        Request((1, 2, 3), GenerationParams(max_new_tokens=4, eos_token_ids=(9,)), MODEL, "7" * 64),
    ],
    ids=["an id", "one more id", "order", "max_new_tokens", "weights", "hub", "tokenizer", "eos"],
)
def test_whatever_changes_the_answer_changes_the_key(changed: Request) -> None:
    assert changed.key != request().key


@pytest.mark.parametrize(
    "same",
    [request(prompt="a text"), request(model=MODEL.model_copy(update={"name": "another name"}))],
    ids=["prompt text", "model name"],
)
def test_what_only_informs_is_not_in_the_key(same: Request) -> None:
    assert same.key == request().key


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "padded:8"},
        {"policy": "invariant"},
        {"policy": "native"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"on_risk": "serve"},
        {"accepted_risk": 0.5},
    ],
    ids=str,
)
def test_how_it_is_computed_is_not_in_the_key(settings: dict[str, Any], tmp_path: Path) -> None:
    with client(tmp_path) as plain, client(tmp_path, **settings) as other:
        assert other.request("Hello", max_new_tokens=3).key == plain.request("Hello", max_new_tokens=3).key


@given(st.lists(st.integers(0, 9), max_size=4).flatmap(lambda eos: st.tuples(st.just(eos), st.permutations(eos))))
def test_the_order_of_end_tokens_does_not_matter(pair: tuple[list[int], list[int]]) -> None:
    one, other = (
        GenerationParams.from_arguments({"max_new_tokens": 3, "eos_token_id": eos}, eos_token_ids=()) for eos in pair
    )
    assert one == other


def test_parameters_left_out_are_resolved() -> None:
    resolved = GenerationParams.from_arguments({}, eos_token_ids=(5,))
    assert resolved == GenerationParams(max_new_tokens=64, eos_token_ids=(5,))
    assert resolved == GenerationParams.from_arguments({"max_new_tokens": 64, "eos_token_id": 5}, eos_token_ids=())
    assert GenerationParams.from_arguments({"eos_token_id": []}, eos_token_ids=(5,)).eos_token_ids == ()


@pytest.mark.parametrize("value", [0, -1, 1.0, "8", True])
def test_a_bad_budget_is_refused(value: object) -> None:
    with pytest.raises(ParameterError, match=f"max_new_tokens={value!r}.*at least 1"):
        GenerationParams.from_arguments({"max_new_tokens": value}, eos_token_ids=())


@pytest.mark.parametrize("value", [-1, "0", [0, "1"], [True], True, 3.5, [[0]]])
def test_bad_end_tokens_are_refused(value: object) -> None:
    with pytest.raises(ParameterError, match="eos_token_id="):
        GenerationParams.from_arguments({"eos_token_id": value}, eos_token_ids=())


@pytest.mark.parametrize("name", ["num_beams", "stop", "max_tokens"])
def test_an_unsupported_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedParameterError, match=f"{name}=1 is not supported.*max_new_tokens, min_new_tokens"):
        GenerationParams.from_arguments({name: 1}, eos_token_ids=())


@pytest.mark.parametrize("prompt", ["", None, 5, b"bytes", ["a"]])
def test_a_prompt_is_text(prompt: object) -> None:
    with pytest.raises(PromptError):
        check_prompt(prompt)


@pytest.mark.parametrize(("length", "new"), [(1, 9), (9, 1)])
def test_prompt_and_answer_fit_the_context(length: int, new: int) -> None:
    asked = request((3,) * length, new=new)
    assert check_fits(asked, context=10, vocabulary=4) is asked


@pytest.mark.parametrize(
    ("length", "new", "error", "told"),
    [
        (9, 2, ContextLengthError, "max_new_tokens up to 1 "),
        (2, 9, ContextLengthError, "max_new_tokens up to 8 "),
        (10, 1, ContextLengthError, "at most 9 tokens"),
        (11, 1, ContextLengthError, "at most 9 tokens"),
        (0, 1, PromptError, "no tokens"),
    ],
)
def test_what_does_not_fit_is_refused(length: int, new: int, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        check_fits(request((3,) * length, new=new), context=10, vocabulary=4)


@pytest.mark.parametrize("token", [4, -1])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(PromptError, match="0 to 3"):
        check_fits(request((1, token)), context=10, vocabulary=4)
