"""Generation parameters: every one that decides an answer, validated before anything runs.

Names and meanings are those of transformers. A parameter at the value that has no effect (``temperature=1.0``) is the
same as one that was not given, so that most equal distributions have equal keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import ConfigDict

from stablegen.core.frozen import Frozen
from stablegen.errors import ParameterError, PromptError, UnsupportedParameterError

DEFAULT_MAX_NEW_TOKENS = 64
MAX_SEED = 2**63 - 1


class GenerationParams(Frozen):
    """A request's generation parameters in canonical form, named as in transformers' ``GenerationConfig``.

    ``max_new_tokens``: tokens, at least 1. ``eos_token_ids``: ids that end an answer; the end token is its last.
    ``processed_eos_token_ids``: the ids that processors treat as end tokens, where they differ. ``stop_strings``:
    texts that end an answer as soon as its last token completes one of them. ``seed`` and ``sample_index`` select one
    sample. ``sequence_bias``: pairs of token ids and the bias added to the score of the last id where the others
    precede it. ``logits_processors`` and ``stopping_criteria``: the cache keys of the caller's own.
    """

    model_config = ConfigDict(strict=True, ser_json_inf_nan="constants")

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    processed_eos_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    stopping_criteria: tuple[str, ...] = ()
    do_sample: bool = False
    seed: int | None = None
    sample_index: int = 0
    temperature: float = 1.0
    top_h: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    renormalize_logits: bool = False
    logits_processors: tuple[str, ...] = ()

    @cached_property
    def canonical(self) -> str:
        """Return the JSON that goes into the key.

        Optional parameters at their default are left out, so that adding one to this class changes no existing key.
        """
        content = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @cached_property
    def changed(self) -> frozenset[str]:
        """Return the parameters that are not at their default."""
        fields = type(self).model_fields.items()
        return frozenset(name for name, field in fields if getattr(self, name) != field.default)

    @cached_property
    def processed(self) -> bool:
        """Return whether tokens are chosen from scores that were processed, or had sampling noise added."""
        return not self.changed <= _UNPROCESSED

    def for_display(self) -> dict[str, Any]:
        """Return the parameters as JSON values; an infinite bias becomes text."""
        content = self.model_dump(mode="json")
        content["sequence_bias"] = [
            [ids, bias if math.isfinite(bias) else str(bias)] for ids, bias in content["sequence_bias"]
        ]
        return content

    @property
    def named_token_ids(self) -> set[int]:
        """Return every token id that a parameter other than ``eos_token_ids`` names."""
        ids = {*self.suppress_tokens, *self.begin_suppress_tokens, *self.forced_eos_token_ids}
        ids.update(*self.bad_words_ids, *(ids for ids, _ in self.sequence_bias))
        return ids if self.forced_bos_token_id is None else ids | {self.forced_bos_token_id}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], *, eos_token_ids: tuple[int, ...]) -> GenerationParams:
        """Return parameters from a caller's keyword arguments; one that is None counts as not given.

        ``eos_token_ids`` are the model's own, used where the caller names none. Raises
        ``UnsupportedParameterError`` for an unknown parameter, ``ParameterError`` for a bad value.
        """
        known: dict[str, Any] = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "eos_token_ids": eos_token_ids}
        for name, value in arguments.items():
            if name not in _RULES:
                raise UnsupportedParameterError(
                    f"parameter {name}={value!r:.60} is not supported", accepted=", ".join(SUPPORTED)
                )
            rule = _RULES[name]
            if value is None:
                continue
            try:
                known[rule.field or name] = rule.read(value)
            except (TypeError, ValueError) as error:
                raise ParameterError(f"{name}={value!r:.80} is not valid", accepted=rule.accepted) from error
        greedy = not known.get("do_sample", False)
        if greedy:
            known.pop("seed", None)  # a greedy answer is the same for every seed
            for name in SAMPLING:
                if known.pop(name, cls.model_fields[name].default) != cls.model_fields[name].default:
                    raise ParameterError(
                        f"{name}={arguments[name]!r} has no effect without sampling",
                        accepted=f"{name} together with do_sample=True",
                        hint=f"Add do_sample=True and a seed, or leave {name} out",
                    )
        if not known.get("processed_eos_token_ids", known["eos_token_ids"]):
            for name in ("min_new_tokens", "exponential_decay_length_penalty"):
                known.pop(name, None)  # both act on the end token, and there is none
        return cls(**known)


class _Rule(NamedTuple):
    """How a parameter's value is read, what is accepted, and the field it goes to where that has another name."""

    read: Callable[[Any], Any]
    accepted: str
    field: str | None = None


def _whole(least: int, most: float = math.inf) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError
        return value

    return read


def _number(inside: Callable[[float], bool]) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if not inside(float(value)):
            raise ValueError
        return float(value)

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


_id = _whole(0)


def _ids(value: Any) -> tuple[int, ...]:
    """Read one id or several; their order has no meaning."""
    several = value if isinstance(value, list | tuple | set | frozenset) else [value]
    return tuple(sorted({_id(index) for index in several}))


def _sequence(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError
    return tuple(_id(index) for index in value)


def _sequences(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError
    return tuple(sorted({_sequence(words) for words in value}))


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    biases = {_sequence(ids): float(bias) for ids, bias in pairs}
    if not biases or any(math.isnan(bias) for bias in biases.values()):
        raise ValueError
    return tuple(sorted(biases.items()))


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _whole(0)(start), _number(lambda x: x > 0)(factor)


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else list(value)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError
    for text in texts:
        text.encode()  # raises ValueError for an unpaired surrogate
    return tuple(sorted(set(texts)))


def _keys(value: Iterable[str]) -> tuple[str, ...]:
    return tuple(value)


_PENALTY = _Rule(_number(lambda x: x > 0), "a number above 0; 1 has no effect")
_SHARE = "a number from 0 to 1"
_SOME_IDS = "a token id, or a list of token ids"
_RULES: Mapping[str, _Rule] = {
    "max_new_tokens": _Rule(_whole(1), "a whole number of tokens, at least 1"),
    "min_new_tokens": _Rule(_whole(0), "a whole number of tokens, at least 0"),
    "eos_token_id": _Rule(_ids, _SOME_IDS, "eos_token_ids"),
    "stop_strings": _Rule(_texts, "a string that is not empty, or a list of such strings"),
    "do_sample": _Rule(_flag, "True or False"),
    "seed": _Rule(_whole(0, MAX_SEED), f"a whole number from 0 to {MAX_SEED}"),
    "sample_index": _Rule(_whole(0, MAX_SEED), "a whole number, at least 0"),
    "temperature": _Rule(_number(lambda x: x > 0), "a number above 0; for greedy decoding use do_sample=False"),
    "top_h": _Rule(_number(lambda x: 0 < x <= 1), "a number above 0, at most 1"),
    "top_k": _Rule(_whole(0), "a whole number of tokens; 0 keeps all of them"),
    "top_p": _Rule(_number(lambda x: 0 <= x <= 1), _SHARE),
    "min_p": _Rule(_number(lambda x: 0 <= x <= 1), _SHARE),
    "typical_p": _Rule(_number(lambda x: 0 < x <= 1), "a number above 0, at most 1"),
    "epsilon_cutoff": _Rule(_number(lambda x: 0 <= x < 1), "a number from 0, below 1"),
    "eta_cutoff": _Rule(_number(lambda x: 0 <= x < 1), "a number from 0, below 1"),
    "repetition_penalty": _PENALTY,
    "encoder_repetition_penalty": _PENALTY,
    "no_repeat_ngram_size": _Rule(_whole(0), "a whole number of tokens; 0 allows all repeats"),
    "encoder_no_repeat_ngram_size": _Rule(_whole(0), "a whole number of tokens; 0 allows all repeats"),
    "bad_words_ids": _Rule(_sequences, "a list of lists of token ids"),
    "sequence_bias": _Rule(_biases, "a dict from tuples of token ids to numbers, or a list of such pairs"),
    "suppress_tokens": _Rule(_ids, _SOME_IDS),
    "begin_suppress_tokens": _Rule(_ids, _SOME_IDS),
    "forced_bos_token_id": _Rule(_id, "a token id"),
    "forced_eos_token_id": _Rule(_ids, _SOME_IDS, "forced_eos_token_ids"),
    "exponential_decay_length_penalty": _Rule(_decay, "a pair: the step where it begins, and a factor above 0"),
    "remove_invalid_values": _Rule(_flag, "True or False"),
    "renormalize_logits": _Rule(_flag, "True or False"),
    "processed_eos_token_id": _Rule(_ids, _SOME_IDS, "processed_eos_token_ids"),
    "logits_processors": _Rule(_keys, "cache keys"),
    "stopping_criteria": _Rule(_keys, "cache keys"),
}
_INTERNAL = ("processed_eos_token_id", "logits_processors", "stopping_criteria")
SUPPORTED = tuple(name for name in _RULES if name not in _INTERNAL)
"""The parameters that ``complete`` takes."""
SAMPLING = (
    *("sample_index", "temperature", "top_h", "top_k", "top_p", "min_p"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)
"""The parameters that have no effect without sampling."""
ENDING = ("max_new_tokens", "eos_token_ids", "stop_strings", "stopping_criteria")
"""The parameters that decide only where an answer ends."""
_UNPROCESSED = frozenset({*ENDING, "seed"})


def check_named_ids(params: GenerationParams, vocabulary: int) -> None:
    """Raise ``PromptError`` where a parameter names a token id outside the vocabulary."""
    outside = sorted(index for index in params.named_token_ids if index >= vocabulary)
    if outside:
        raise PromptError(
            f"a parameter names the token id {outside[0]}, which is outside the vocabulary",
            accepted=f"ids from 0 to {vocabulary - 1}",
        )
