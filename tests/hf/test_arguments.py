"""``stablegen/hf/README.md``'s table of arguments: every one is listed once, and is treated as it says."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, client, save, small_gpt2
from transformers import GenerationConfig, GenerationMixin, GPT2LMHeadModel, LogitsProcessorList

from stablegen.client import Client
from stablegen.engine.processors import processors_for
from stablegen.errors import ParameterError, UnsupportedParameterError
from stablegen.hf.arguments import resolve

README = Path(__file__).parents[2] / "stablegen" / "hf" / "README.md"
OWN = {"seed", "sample_index", "unsupported"}
OF_THE_MODEL = {"inputs_embeds", "past_key_values", "position_ids", "token_type_ids"}
IDS = torch.tensor([[5, 6, 7]])
VALUES: dict[str, Any] = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "use_mtp": True,
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "is_assistant": True,
    "prefix_allowed_tokens_fn": lambda *_: [5],
    "max_time": 1.0,
    "guidance_scale": 1.5,
    "negative_prompt_ids": IDS,
    "negative_prompt_attention_mask": IDS,
    "watermarking_config": {"greenlist_ratio": 0.5},
    "token_healing": True,
    "synced_gpus": True,
    "custom_generate": "somebody/something",
    "output_attentions": True,
    "output_hidden_states": True,
    "inputs_embeds": torch.zeros(1, 3, 256),
    "past_key_values": object(),
    "position_ids": IDS,
    "token_type_ids": IDS,
}


def listed() -> dict[str, str]:
    """Return what the table says of each argument, and check that it says it once."""
    table = README.read_text(encoding="utf-8").split("<!-- arguments of generate -->")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    found = [(name, answered.strip()) for names, answered in rows for name in re.findall(r"`(\w+)`", names)]
    assert {name for name, count in Counter(name for name, _ in found).items() if count > 1} == set()
    return dict(found)


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(GPT2LMHeadModel.from_pretrained(TINY).eval(), None, cache_dir=tmp_path_factory.mktemp("cache"))


def test_every_argument_is_listed() -> None:
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    settings = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    popped = {"input_ids", "attention_mask", "tokenizer", "assistant_tokenizer", "trust_remote_code"}
    wanted = arguments | settings | popped | OWN | OF_THE_MODEL | {"top_h", "low_memory", "transformers_version"}
    wanted |= {"constraints", "force_words_ids", "num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers"}
    assert wanted - set(listed()) == set()
    # the older of the supported versions lacks some
    assert set(listed()) - wanted <= {"use_mtp", "assistant_ensemble_weight", "speculation_type", "prefill_chunk_size"}


@pytest.mark.parametrize("name", sorted(name for name, said in listed().items() if said.startswith("refused")))
def test_what_is_refused_says_what_to_do_instead(name: str, asking: Client) -> None:
    if name == "use_mtp" and not hasattr(GenerationConfig(), name):
        pytest.skip("this transformers has no use_mtp")
    given = {name: VALUES[name]}
    if name == "penalty_alpha":
        given["top_k"] = 4
    if name == "num_beam_groups":
        given["num_beams"] = 4
    with pytest.raises(UnsupportedParameterError, match=r"no policy makes stable.*Or pass unsupported='passthrough'"):
        asking.generate(IDS, max_new_tokens=2, **given)


@pytest.mark.parametrize("name", sorted(name for name, said in listed().items() if said.startswith("changes")))
def test_what_changes_no_answer_is_no_part_of_the_key(name: str, asking: Client) -> None:
    values: dict[str, Any] = {"use_cache": False, "early_stopping": True, "cache_implementation": "static"}
    values |= {"assistant_ensemble_weight": 0.5}
    values |= dict.fromkeys(("compile_config", "continuous_batching_config", "cache_config"))
    value = values.get(name, 1)
    plain = resolve(asking.session, IDS, GenerationConfig(max_new_tokens=2), None, 0, {}).requests
    config = GenerationConfig(max_new_tokens=2)
    if name != "trust_remote_code":
        setattr(config, name, value)
    assert resolve(asking.session, IDS, config, None, 0, {}).requests == plain
    if name == "trust_remote_code":
        assert resolve(asking.session, IDS, GenerationConfig(max_new_tokens=2), None, 0, {name: True}).requests == plain


SETTINGS: list[dict[str, Any]] = [
    {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [6, 7]],
        "sequence_bias": {(9,): 1.0},
    },
    {"encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 2, "min_new_tokens": 2, "eos_token_id": [0, 3]},
    {"forced_bos_token_id": 4, "forced_eos_token_id": 5, "remove_invalid_values": True, "suppress_tokens": [8]},
    {"begin_suppress_tokens": [8], "exponential_decay_length_penalty": (2, 1.1), "renormalize_logits": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "top_h": 0.5},
    {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "repetition_penalty": 1.1},
    {"do_sample": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_processors_are_those_that_transformers_makes_in_its_order(settings: dict[str, Any], asking: Client) -> None:
    config = GenerationConfig(max_new_tokens=4, **settings)
    (asked,) = resolve(asking.session, IDS, config, 1, 0, {}).requests
    model = asking.source.resolver()
    resolved, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(resolved, True, device=IDS.device, batch_size=1)
    resolved = model._prepare_generated_length(resolved, True, True, "input_ids", 3, IDS)
    theirs = model._get_logits_processor(
        resolved,
        input_ids_seq_length=3,
        encoder_input_ids=IDS,
        logits_processor=LogitsProcessorList(),
        device="cpu",
        model_kwargs={},
    )
    # a least length is two processors there, which do the same
    expected = [type(one).__name__ for one in theirs if type(one).__name__ != "MinLengthLogitsProcessor"]
    assert [type(one).__name__ for one in processors_for(asked, torch.device("cpu"))] == expected


@pytest.mark.parametrize(
    "act",
    [
        lambda asking: asking.make_request((5,), {"stop_strings": "a"}),
        lambda asking: asking.generate(IDS, stop_strings="a", max_new_tokens=1),
    ],
    ids=["request", "generate"],
)
def test_stop_strings_want_a_tokenizer(act: Callable[[Client], Any], asking: Client) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        act(asking)


class Boost:
    cache_key = "boost"

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.amount


def test_two_processors_of_one_key_are_refused(asking: Client) -> None:
    with pytest.raises(ParameterError, match="cache_key 'boost'"):
        asking.generate(IDS, max_new_tokens=2, logits_processor=LogitsProcessorList([Boost(1.0), Boost(2.0)]))


def test_a_seed_is_not_ignored_where_a_call_is_passed_through(asking: Client) -> None:
    with pytest.raises(ParameterError, match=r"passed through.*manual_seed"):
        asking.generate(IDS, max_new_tokens=2, num_beams=2, seed=3, unsupported="passthrough")


def test_a_configuration_that_changed_is_read_again(tmp_path: Path) -> None:
    directory = save(small_gpt2(), tmp_path / "model")
    file = directory / "generation_config.json"
    with client(tmp_path / "cache", model=directory) as asking:
        answer = asking.generate(IDS, max_new_tokens=6)[0, 3:].tolist()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": answer[0]}))
    with client(tmp_path / "cache", model=directory) as asking:
        assert asking.generate(IDS, max_new_tokens=6)[0, 3:].tolist() == answer[:1]
