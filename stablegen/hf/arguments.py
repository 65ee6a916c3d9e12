"""``model.generate``'s arguments as requests, resolved as transformers resolves them: by transformers itself.

Every argument is part of a request, or known to change no answer, or refused with a named error; the README beside
this file lists which is which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from stablegen.core.request import Request, check_fits
from stablegen.engine import private
from stablegen.errors import AttentionMaskError, ParameterError, PromptError, UnsupportedParameterError
from stablegen.session.intake import NO_SEED, check_seeds
from stablegen.session.session import Session
from stablegen.tokenizer import Tokenizer

_ID_DTYPES = (torch.int64, torch.int32)
_MODES = ("greedy_search", "sample")
_ARGUMENTS: Mapping[str, str] = {
    "prefix_allowed_tokens_fn": "Use bad_words_ids, suppress_tokens or a processor with a cache_key",
    "synced_gpus": "Run one process a GPU, each with its own client",
    "assistant_model": "Leave it out: batch-invariant decoding is faster, and gives the same tokens",
    "assistant_tokenizer": "Leave it out, as well as assistant_model",
    "negative_prompt_ids": "Leave it out",
    "negative_prompt_attention_mask": "Leave it out",
    "custom_generate": "Leave it out",
}
"""Arguments of ``generate`` that are refused, and what to do instead."""
_MODEL_ARGUMENTS: Mapping[str, str] = {
    "inputs_embeds": "Give input_ids",
    "past_key_values": "Give the whole prompt: a batch-invariant policy computes shared beginnings once",
    "output_attentions": "Call the model itself on the generated ids",
    "output_hidden_states": "Call the model itself on the generated ids",
    "position_ids": "Leave it out: positions come from the attention mask",
}
"""Arguments of the model that are refused, and what to do instead; all others but the mask are refused too."""
_SETTINGS: Mapping[str, tuple[object, str]] = {
    "max_time": (None, "Use max_new_tokens: answers that a clock ends differ from run to run"),
    "token_healing": (False, "Trim the prompt beforehand"),
    "guidance_scale": (1.0, "Leave it out"),
    "watermarking_config": (None, "Leave it out"),
    "output_attentions": (False, "Call the model itself on the generated ids"),
    "output_hidden_states": (False, "Call the model itself on the generated ids"),
    "is_assistant": (False, "Leave it out"),
}
"""Settings of a ``GenerationConfig`` that are refused, the value that turns each off, and what to do instead."""
_BEAMS = "Use greedy decoding or sampling: num_beams=1"
_INSTEAD: Mapping[str, str] = {
    "assisted_generation": "Leave prompt_lookup_num_tokens, assistant_early_exit and use_mtp out",
    "contrastive_search": "Leave penalty_alpha out",
    "dola_generation": "Leave dola_layers out",
}
"""What to do instead of a generation mode; ``_BEAMS`` is for any other."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A call of ``generate``, resolved.

    ``ids`` [B * num_return_sequences, S]: the prompts as given, padding included; ``requests``: one for each.
    ``seeded``: whether answers are functions of the requests, and so may be cached. ``pad``: the id that fills up
    shorter answers.
    """

    ids: torch.Tensor
    requests: Sequence[Request]
    seeded: bool
    pad: int
    streamer: Any
    as_dict: bool
    wants_scores: bool
    wants_logits: bool


def resolve(
    session: Session,
    inputs: torch.Tensor | None,
    generation_config: Any,
    seed: int | Sequence[int] | torch.Tensor | None,
    sample_index: int,
    arguments: dict[str, Any],
) -> GenerateCall:
    """Return the call that ``generate``'s arguments describe.

    Raises ``UnsupportedParameterError`` for what no policy could make stable, ``ParameterError`` for what transformers
    refuses too, ``PromptError``, ``AttentionMaskError`` and ``ContextLengthError`` for prompts.
    """
    source = session.source
    model = source.resolver()
    own = _Own.taken_from(arguments)
    config, rest, defaulted = _configured(model, generation_config, arguments)
    ids, keep = _prompts(model, config, inputs, rest)
    budget, least = _lengths(model, config, ids, defaulted)
    asked = _settings(config) | {"min_new_tokens": least, "max_new_tokens": budget}
    asked |= own.replacing(ids.shape[1], asked)
    ending = own.criteria_by_key()
    if asked.get("stop_strings") and own.tokenizer is not None and not source.tokenizer.is_of(own.tokenizer):
        key, make = criterion_of(StopStringCriteria(own.tokenizer, asked.pop("stop_strings")))
        ending[key] = make
    copies = config.num_return_sequences or 1
    seeds, seeded = _seeds(seed, len(ids), copies, sampled=bool(config.do_sample))
    if not seeded:
        session.own.warn_once("seed", NO_SEED)
    intake = session.refresh().intake
    requests: list[Request] = []
    for row, kept in zip(ids.tolist(), keep.tolist(), strict=True):
        prompt = [token for token, real in zip(row, kept, strict=True) if real]
        for copy in range(copies):
            drawn: dict[str, Any] = {"seed": seeds[len(requests)]} if seeds else {}
            if config.do_sample or sample_index:
                drawn["sample_index"] = sample_index + copy if isinstance(sample_index, int) else sample_index
            made = intake.make_request(
                prompt, asked | drawn, logits_processors=own.processors_by_key(), stopping_criteria=ending
            )
            requests.append(check_fits(made, source.context, source.vocabulary))
    pad = private.pad_token(config)
    return GenerateCall(
        ids.repeat_interleave(copies, dim=0),
        requests,
        seeded,
        0 if pad is None else int(pad.flatten()[0]),
        own.streamer,
        bool(config.return_dict_in_generate),
        bool(config.output_scores),
        bool(config.output_logits),
    )


@dataclass(frozen=True, slots=True)
class _Own:
    """The objects among the caller's arguments: processors, criteria, a streamer, a tokenizer."""

    processors: Sequence[Any]
    criteria: Sequence[Any]
    streamer: Any
    tokenizer: Any

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> _Own:
        """Take the objects out of ``generate``'s arguments; raise where one is refused."""
        arguments.pop("trust_remote_code", None)  # belongs to custom_generate, which is refused
        for name, instead in _ARGUMENTS.items():
            value = arguments.pop(name, None)
            if value is not None and value is not False:
                raise _refused(_shown(name, value), instead)
        processors, criteria = (arguments.pop(name, None) or () for name in ("logits_processor", "stopping_criteria"))
        return cls(
            tuple(processors), tuple(criteria), arguments.pop("streamer", None), arguments.pop("tokenizer", None)
        )

    def processors_by_key(self) -> dict[str, Any]:
        """Return the logits processors by their cache keys."""
        found: dict[str, Any] = {}
        for processor in self.processors:
            key = _key_of(processor, "logits processor")
            if found.setdefault(key, processor) is not processor:
                raise ParameterError(f"two logits processors have the cache_key {key!r}", accepted="one of each key")
        return found

    def criteria_by_key(self) -> dict[str, Callable[[int], Any]]:
        """Return the stopping criteria that are not transformers' own by their cache keys."""
        replacing = (MaxLengthCriteria, EosTokenCriteria)
        found: dict[str, Any] = {}
        for criterion in self.criteria:
            if type(criterion) in replacing:
                continue
            key, make = criterion_of(criterion)
            if key in found:
                raise ParameterError(f"two stopping criteria have the cache_key {key!r}", accepted="one of each key")
            found[key] = make
        return found

    def replacing(self, width: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of criteria that replace transformers' own, for prompts ``width`` tokens wide.

        ``asked``: the settings without them; processors still use its end tokens and its length.
        """
        found: dict[str, Any] = {}
        for criterion in self.criteria:
            if type(criterion) is MaxLengthCriteria:
                found["max_new_tokens"] = criterion.max_length - width
                if found["max_new_tokens"] > asked["max_new_tokens"] and asked["forced_eos_token_id"] is not None:
                    raise _refused("a MaxLengthCriteria beyond max_length and forced_eos_token_id", "Give max_length")
                if found["max_new_tokens"] < asked["max_new_tokens"]:
                    found["forced_eos_token_id"] = None  # it is never reached
            if type(criterion) is EosTokenCriteria:
                ends = torch.as_tensor(criterion.eos_token_id).flatten().tolist()
                found |= {"eos_token_id": ends, "processed_eos_token_id": asked["eos_token_id"]}
            if type(criterion) is StopStringCriteria:
                found["stop_strings"] = None
        return found


def _configured(
    model: Any, generation_config: Any, arguments: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, bool]]:
    """Return the resolved configuration, the arguments that are the model's, and which lengths are not set."""
    defaulted = {
        name: arguments.get(name) is None
        and all(getattr(place, name, None) is None for place in (generation_config, model.generation_config))
        for name in ("max_length", "min_length")
    }
    try:
        config, rest = private.prepare_generation_config(model, generation_config, arguments)
        private.validate_model_kwargs(model, rest)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ParameterError(
            f"transformers refuses the arguments of generate: {reason}",
            hint="stablegen/hf/README.md lists every argument; check the spelling",
        ) from error
    _check_settings(config, rest)
    if not torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else []).numel():
        config.eos_token_id = None  # an empty list means none too
    return config, rest, defaulted


def _prompts(
    model: Any, config: Any, inputs: torch.Tensor | None, rest: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompts [B, S] as given, and where tokens are, bool; prepare the configuration's special tokens."""
    given, mask = rest.pop("input_ids", None), rest.pop("attention_mask", None)
    for name, value in rest.items():
        if value is not None and name != "use_cache":
            raise _refused(_shown(name, value), _MODEL_ARGUMENTS.get(name, "Leave it out"))
    if inputs is not None and given is not None:
        raise PromptError("generate was given both inputs and input_ids", accepted="one of them")
    ids = _check_ids(inputs if inputs is not None else given, config)
    private.prepare_special_tokens(model, config, ids, masked=mask is not None)
    return ids, _inferred(model, ids, config) if mask is None else _keep(ids, mask)


def _refused(what: str, instead: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(
        f"generate was given {what}, whose answers no policy makes stable",
        accepted="greedy decoding and sampling; stablegen/hf/README.md lists every argument",
        hint=f"{instead}. Or pass unsupported='passthrough': transformers then runs the call unchanged, uncached",
    )


def _shown(name: str, value: Any) -> str:
    """Return an argument in a few words, on one line."""
    if isinstance(value, torch.Tensor):
        return f"{name}, a tensor of shape {tuple(value.shape)}"
    if callable(value) or not isinstance(value, str | int | float | bool | list | tuple | dict):
        return f"{name}, of type {type(value).__name__}"
    return f"{name}={value!r:.60}"


def _check_settings(config: Any, rest: Mapping[str, Any]) -> None:
    """Raise ``UnsupportedParameterError`` for a generation mode or setting that is refused."""
    mode = str(config.get_generation_mode(None).value)
    if mode not in _MODES:
        raise _refused(f"settings that select {mode.replace('_', ' ')}", _INSTEAD.get(mode, _BEAMS))
    for name, (nothing, instead) in _SETTINGS.items():
        value = getattr(config, name, None)
        if value is not None and value != nothing:
            raise _refused(_shown(name, value), instead)
    if getattr(config, "cache_implementation", None) == "paged" or rest.get("cache_implementation") == "paged":
        raise _refused(
            "cache_implementation='paged'", "Leave it out: batch-invariant policies have a paged cache of their own"
        )
    if (config.num_return_sequences or 1) > 1 and not config.do_sample:
        raise ParameterError(
            f"num_return_sequences={config.num_return_sequences} without sampling",
            accepted="several sequences with do_sample=True",
            hint="Greedy decoding would return equal copies",
        )


def _check_ids(ids: Any, config: Any) -> torch.Tensor:
    if ids is None:
        if config.bos_token_id is None:
            raise PromptError(
                "generate was given no prompt, and the model has no bos_token_id to begin with",
                accepted="input_ids [B, S], a LongTensor with at least one id",
            )
        ids = torch.tensor([[int(torch.as_tensor(config.bos_token_id).flatten()[0])]])
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in _ID_DTYPES or ids.numel() == 0:
        is_tensor = isinstance(ids, torch.Tensor)
        given = f"a tensor of shape {tuple(ids.shape)} and {ids.dtype}" if is_tensor else type(ids).__name__
        raise PromptError(f"generate was given {given}", accepted="input_ids [B, S], a LongTensor with at least one id")
    return ids


def _keep(ids: torch.Tensor, mask: Any) -> torch.Tensor:
    """Return where the caller's mask says that tokens are, [B, S] bool."""
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        given = f"of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise AttentionMaskError(
            f"the attention mask is {given}, the ids are of shape {tuple(ids.shape)}",
            accepted="a tensor of equal shape",
        )
    keep = mask != 0
    for row in range(len(ids)):
        places = keep[row].nonzero().flatten()
        if len(places) == 0:
            raise AttentionMaskError(f"row {row} of the attention mask is empty", accepted="at least one token a row")
        if int(places[-1] - places[0]) + 1 != len(places):
            raise AttentionMaskError(
                f"row {row} of the attention mask has holes",
                accepted="one run of ones a row, padded on either side",
                hint="Remove the masked tokens from inside the prompt",
            )
    return keep


def _inferred(model: Any, ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the mask that transformers would infer, [B, S] bool: all but the pad tokens, where it can tell.

    A token masked inside a prompt is dropped, because positions are counted by the mask.
    """
    keep: torch.Tensor = private.infer_attention_mask(model, ids, config) != 0
    for row in range(len(ids)):
        if not keep[row].any():
            raise PromptError(
                f"row {row} holds only pad tokens", accepted="at least one token a row, or an attention_mask"
            )
    return keep


def _lengths(model: Any, config: Any, ids: torch.Tensor, defaulted: Mapping[str, bool]) -> tuple[int, int]:
    """Return the most and the fewest new tokens; lengths count the padded width, as in transformers."""
    width = ids.shape[1]
    if config.max_new_tokens is not None and config.max_new_tokens < 1:
        raise ParameterError(
            f"max_new_tokens={config.max_new_tokens!r} is not valid", accepted="a whole number of at least 1"
        )
    try:
        config = private.prepare_lengths(
            model, config, ids, default_max=defaulted["max_length"], default_min=defaulted["min_length"]
        )
    except (ValueError, TypeError) as error:
        raise ParameterError(
            f"transformers refuses the lengths given to generate: {error}", accepted="max_new_tokens of at least 1"
        ) from error
    return config.max_length - width, max(0, (config.min_length or 0) - width)


def _settings(config: Any) -> dict[str, Any]:
    """Return a resolved configuration's settings that decide an answer; those without effect are left out."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) else value

    names = ["repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"]
    names += ["encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"]
    names += ["begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"]
    names += ["exponential_decay_length_penalty", "renormalize_logits", "stop_strings", "do_sample"]
    if config.do_sample:
        names += ["temperature", "top_h", "top_k", "min_p"]
    asked = {name: plain(getattr(config, name, None)) for name in names}
    if config.do_sample:
        # transformers ignores values outside these bounds
        shares = {name: getattr(config, name) for name in ("top_p", "typical_p")}
        asked |= {name: share for name, share in shares.items() if share is not None and share < 1}
        cutoffs = {name: getattr(config, name) or 0.0 for name in ("epsilon_cutoff", "eta_cutoff")}
        asked |= {name: value for name, value in cutoffs.items() if 0 < value < 1}
    ends = private.end_tokens(config)
    return asked | {"eos_token_id": [end for end in ends if end >= 0]}  # transformers ignores negative ids


def criterion_of(criterion: Any) -> tuple[str, Callable[[int], Any]]:
    """Return a stopping criterion's cache key, and a function that makes it for a prompt's length in tokens."""
    if type(criterion).__name__ == "MultiTokenEOSCriteria" and type(criterion).__module__.startswith("lm_eval."):
        # lm-eval's depends on a batch's rows and the width of its prompts; here each row is a batch of its own
        kind, sequence, own = type(criterion), criterion.sequence, criterion.tokenizer
        by = _digest_of(own)
        return f"lm-eval until {sequence!r} by tokenizer {by}", lambda length: kind(sequence, own, length, 1)
    if type(criterion) is StopStringCriteria:
        vocabulary = hashlib.sha256(private.stop_strings_table(criterion).cpu().numpy().tobytes()).hexdigest()
        return f"stop strings {criterion.stop_strings!r} in a vocabulary {vocabulary}", lambda _: criterion
    return _key_of(criterion, "stopping criterion"), lambda _: criterion


@lru_cache(maxsize=8)
def _digest_of(tokenizer: Any) -> str:
    return Tokenizer.from_object(tokenizer).digest


def _key_of(own: Any, what: str) -> str:
    key = getattr(own, "cache_key", None)
    if not isinstance(key, str) or not key:
        raise _refused(
            f"a custom {what}, {type(own).__name__}, without a cache_key",
            "If its results depend only on its arguments and its settings, give it an attribute cache_key, a string "
            "that names all of these settings",
        )
    return key


def _seeds(seed: Any, rows: int, copies: int, *, sampled: bool) -> tuple[list[Any], bool]:
    """Return the seed of each of ``rows * copies`` sequences, and whether the caller gave it."""
    if isinstance(seed, torch.Tensor):
        seed = seed.tolist()
    if seed is None:
        # as transformers' sampling does, this follows torch.manual_seed
        return torch.randint(0, 2**63 - 1, (rows * copies,)).tolist() if sampled else [], not sampled
    if isinstance(seed, Sequence):
        check_seeds(seed, rows)
        return [one for one in seed for _ in range(copies)], True
    return [seed] * rows * copies, True
