"""Which private names of the installed transformers are gone; all that this project uses stand in one file."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixed_shapes import small_model
from transformers.generation import StopStringCriteria

import stablegen
from stablegen.engine import private
from stablegen.tokenizer import Tokenizer

PACKAGE = Path(stablegen.__file__).parent
FIRST = (5, 6, 7)
"""Tokens before the last."""
NAMES = (*private._METHODS, *private._CONFIG, *private._PREPARED, *private._STOP_STRINGS, "CacheLayerMixin")


@pytest.fixture(scope="module")
def stop_strings() -> StopStringCriteria:
    tokenizer = Tokenizer.from_file(PACKAGE / "models" / "tiny-gpt2" / "tokenizer.json", "7" * 64)
    return StopStringCriteria(tokenizer.for_transformers(), ["the", "end."])


def test_no_name_is_gone(stop_strings: StopStringCriteria) -> None:
    missing = private.missing_names(small_model("gpt2"), stop_strings)
    assert missing == [], f"this transformers has no {', '.join(missing)}: adapt {private.__file__}"


def test_a_name_that_is_gone_is_named() -> None:
    class Renamed:
        """A model of another transformers."""

        _validate_model_kwargs = _prepare_generated_length = None
        config = SimpleNamespace(_name_or_path="")
        generation_config = SimpleNamespace(_pad_token_tensor=None)

    missing = private.missing_names(Renamed(), SimpleNamespace(embedding_vec=None, num_stop_strings=1))
    assert missing == [
        "model._prepare_generation_config",
        "model._prepare_special_tokens",
        "model._prepare_attention_mask_for_generation",
        "model._validate_generated_length",
        "model.config._attn_implementation",
        "generation_config._eos_token_tensor",
        "StopStringCriteria.max_valid_positions",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_stands_in_one_file(name: str) -> None:
    users = [
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if re.search(rf"(?<![\w\"']){re.escape(name)}\b|\.{re.escape(name)}\b", file.read_text(encoding="utf-8"))
    ]
    assert users == ["engine/private.py"], name


def test_what_generate_prepares_is_read_back() -> None:
    model = small_model("gpt2")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    config, rest = private.prepare_generation_config(model, None, {"max_new_tokens": 7, "eos_token_id": [3, 9]})
    private.validate_model_kwargs(model, rest)
    with pytest.raises(ValueError, match="not_an_argument"):
        private.validate_model_kwargs(model, {"not_an_argument": 1})
    private.prepare_special_tokens(model, config, ids, masked=True)
    assert private.end_tokens(config) == [3, 9]
    pad = private.pad_token(config)
    assert pad is None or isinstance(pad, torch.Tensor)
    assert private.infer_attention_mask(model, ids, config).shape == ids.shape
    lengths = private.prepare_lengths(model, config, ids, default_max=True, default_min=True)
    assert lengths.max_length == 3 + 7
    assert private.attention_of(model.config) == "sdpa"
    assert private.name_of(model.config) == ""


def test_stop_strings_end_with_these_tokens(stop_strings: StopStringCriteria) -> None:
    ends = private.last_tokens(stop_strings)
    vocabulary = private.stop_strings_table(stop_strings).shape[0]
    assert 0 < len(ends) < vocabulary
    ending = [
        index
        for index in range(vocabulary)
        if bool(stop_strings(torch.tensor([[*FIRST, index]]), None)) and index not in ends
    ]
    assert ending == []
