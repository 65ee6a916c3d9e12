"""What was asked: parameters, request, and the key under which its answer is stored.

The key holds what was asked and nothing of how it is computed: dtype, policy and device live in the record's
``Numerics``, so that a change of any of them is a hit to be judged, not a miss.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import ConfigDict

from stablegen.errors import ContextLengthError, ParameterError, PromptError, UnsupportedParameterError
from stablegen.frozen import Frozen

SCHEMA = 1
"""Version of the key and of the record; a cache holding a newer one is refused."""

SUPPORTED = ("max_new_tokens", "eos_token_id")
DEFAULT_MAX_NEW_TOKENS = 64


class GenerationParams(Frozen):
    """What the caller asked for besides the prompt; decoding is greedy.

    ``max_new_tokens``: tokens, at least 1. ``eos_token_ids``: ids that end an answer; the end token is its last.
    """

    model_config = ConfigDict(strict=True)

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()

    @cached_property
    def canonical(self) -> str:
        """Return the JSON that goes into the key.

        Optional parameters at their default are left out, so that a new one does not change every old key.
        """
        return _canonical_json(self.model_dump(mode="json", exclude_defaults=True))

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any], *, eos_token_ids: tuple[int, ...]) -> GenerationParams:
        """Return parameters from a caller's keyword arguments.

        ``eos_token_ids`` are the model's own, used where the caller names none. Raises
        ``UnsupportedParameterError`` for what this version does not take, ``ParameterError`` for bad values.
        """
        for name, value in arguments.items():
            if name not in SUPPORTED:
                raise UnsupportedParameterError(
                    f"parameter {name}={value!r:.60} is not supported by this version",
                    accepted=", ".join(SUPPORTED),
                    hint="Decoding is greedy; leave the parameter out",
                )
        budget = arguments.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        if not isinstance(budget, int) or isinstance(budget, bool) or budget <= 0:
            raise ParameterError(f"max_new_tokens={budget!r}", accepted="a whole number of tokens, at least 1")
        eos = arguments.get("eos_token_id")
        if eos is not None:
            ids = list(eos) if isinstance(eos, list | tuple | set | frozenset) else [eos]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                raise ParameterError(f"eos_token_id={eos!r}", accepted="a token id, or a list of token ids")
            eos_token_ids = tuple(sorted(set(ids)))
        return cls(max_new_tokens=budget, eos_token_ids=eos_token_ids)


class ModelIdentity(Frozen):
    """Which weights: a hub commit, or the digest of weights and config.

    ``name`` is what the caller wrote; it informs and is no part of the identity.
    """

    source: Literal["hub", "digest"]
    repo: str | None = None
    commit: str | None = None
    digest: str | None = None
    name: str = ""

    @property
    def identity(self) -> dict[str, str]:
        """Return the parts that identify the weights."""
        if self.source == "hub":
            return {"repo": self.repo or "", "commit": self.commit or ""}
        return {"digest": self.digest or ""}

    @cached_property
    def canonical(self) -> str:
        """Return the JSON that goes into the key."""
        return _canonical_json(self.identity)


@dataclass(frozen=True, slots=True)
class Request:
    """Prompt token ids, parameters, and the identity of model and tokenizer.

    ``prompt`` is the text where the request was made as text. ``tokenizer`` is the tokenizer's digest.
    """

    prompt_ids: tuple[int, ...]
    params: GenerationParams
    model: ModelIdentity
    tokenizer: str
    prompt: str | None = field(default=None, compare=False)

    def limited_to(self, steps: int) -> Request:
        """Return this request with so many new tokens at most."""
        return replace(self, params=self.params.model_copy(update={"max_new_tokens": steps}))

    @property
    def key(self) -> str:
        """Return the ``RequestKey``: SHA-256, in hexadecimal, of the canonical bytes."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """Return the canonical bytes: one line of JSON, then the prompt ids as little-endian 32-bit words."""
        parts = f'"model":{self.model.canonical},"params":{self.params.canonical},"schema":{SCHEMA}'
        return f'{{{parts},"tokenizer":"{self.tokenizer}"}}\n'.encode() + words(self.prompt_ids)


def _canonical_json(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def words(ids: tuple[int, ...]) -> bytes:
    """Return token ids as little-endian unsigned 32-bit words."""
    column = array("I", ids)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return column.tobytes()


def check_prompt(prompt: object) -> str:
    """Return a text prompt; raise ``PromptError`` for anything but a string that is not empty."""
    if not isinstance(prompt, str):
        raise PromptError(
            f"a prompt is {prompt!r:.80} ({type(prompt).__name__})",
            accepted="a string, or a list of strings",
            hint="For token ids call generate(input_ids)",
        )
    if not prompt:
        raise PromptError("a prompt is empty", accepted="text of at least one token")
    if not prompt.isascii():
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt {prompt!r:.60} holds half a surrogate pair", accepted="valid Unicode"
            ) from error
    return prompt


def check_fits(request: Request, context: int, vocabulary: int) -> Request:
    """Return the request; raise a named error where prompt and answer do not fit ``context`` tokens."""
    length, budget = len(request.prompt_ids), request.params.max_new_tokens
    if length == 0:
        raise PromptError("a prompt has no tokens", accepted="at least one token")
    if length >= context:
        raise ContextLengthError(
            f"the prompt has {length} tokens and the model's context is {context}",
            accepted=f"prompts of at most {context - 1} tokens",
            hint="Shorten the prompt",
        )
    if length + budget > context:
        raise ContextLengthError(
            f"a prompt of {length} tokens with max_new_tokens={budget} needs {length + budget} positions; "
            f"the model's context is {context}",
            accepted=f"max_new_tokens up to {context - length} for this prompt",
            hint="Shorten the prompt or ask for fewer tokens",
        )
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocabulary:
        raise PromptError("a prompt holds token ids outside the vocabulary", accepted=f"ids from 0 to {vocabulary - 1}")
    return request
