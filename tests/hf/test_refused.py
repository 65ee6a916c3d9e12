"""What is refused by name, or passed through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import IDS, EndsAt, Favour, one, ours, rows_of, theirs, tokenizer
from support import TINY, client
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2LMHeadModel,
)
from transformers.generation import (
    LogitsProcessorList,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from stablegen.client import Client
from stablegen.errors import (
    ParameterError,
    UncachedWarning,
    UnsupportedParameterError,
)

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
    "processor": (
        {"logits_processor": LogitsProcessorList([Favour(7)])},
        "custom logits processor, Favour",
        "cache_key",
    ),
    "processor, a function": ({"logits_processor": [lambda ids, scores: scores]}, "function", "cache_key"),
    "criterion": (
        {"stopping_criteria": StoppingCriteriaList([EndsAt(7)])},
        "custom stopping criterion, EndsAt",
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
