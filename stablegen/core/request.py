"""The request, and the key under which its answer is stored.

The key holds what was requested and nothing of how it is computed: dtype, policy and device belong to the record's
``Numerics``, so that a change of any of them is a hit to be judged, not a miss.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from stablegen.core.frozen import Frozen
from stablegen.core.params import GenerationParams, check_named_ids
from stablegen.errors import ContextLengthError, PromptError

SCHEMA = 2
"""Version of the key and of the record; a cache holding a newer one is refused."""


class ModelIdentity(Frozen):
    """Which weights: a hub commit, or the digest of weights and config.

    ``name`` is what the caller wrote; it is shown to users and is not part of the identity.
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

    ``prompt`` is the text where the request was made from text. ``tokenizer`` is the tokenizer's digest. With
    ``continuation`` (token ids) nothing is generated: it is scored after the prompt, and ``params.max_new_tokens`` is
    its length. ``logits_processors`` are the caller's own objects, ``stopping_criteria`` functions that make the
    caller's own from the prompt's length in tokens; in the key, both are represented by their cache keys in ``params``.
    """

    prompt_ids: tuple[int, ...]
    params: GenerationParams
    model: ModelIdentity
    tokenizer: str
    prompt: str | None = field(default=None, compare=False)
    continuation: tuple[int, ...] = ()
    logits_processors: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    stopping_criteria: tuple[Callable[[int], Any], ...] = field(default=(), compare=False, repr=False)

    def __hash__(self) -> int:
        return hash((self.prompt_ids, self.continuation))

    @property
    def complete(self) -> bool:
        """Return whether it holds every processor and criterion that its parameters name; a stored request does not."""
        named = len(self.params.logits_processors), len(self.params.stopping_criteria)
        return named == (len(self.logits_processors), len(self.stopping_criteria))

    @property
    def given(self) -> tuple[int, ...]:
        """Return the token ids that the model is fed at the start: the prompt, and a continuation but for its last."""
        return self.prompt_ids + self.continuation[:-1]

    def limited_to(self, steps: int) -> Request:
        """Return this request with at most ``steps`` new tokens."""
        return replace(self, params=self.params.model_copy(update={"max_new_tokens": steps}))

    @property
    def key(self) -> str:
        """Return the ``RequestKey``: SHA-256, in hexadecimal, of the canonical bytes."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """Return the canonical bytes: one line of JSON, then the token ids as little-endian 32-bit words."""
        scored = f'"continuation":{len(self.continuation)},' if self.continuation else ""
        parts = f'{scored}"model":{self.model.canonical},"params":{self.params.canonical},"schema":{SCHEMA}'
        return f'{{{parts},"tokenizer":"{self.tokenizer}"}}\n'.encode() + words(self.prompt_ids + self.continuation)


def _canonical_json(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def words(ids: tuple[int, ...]) -> bytes:
    """Return token ids as little-endian unsigned 32-bit words."""
    column = array("I", ids)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return column.tobytes()


def check_prompt(prompt: object) -> str:
    """Return a text prompt; raise ``PromptError`` for anything but a non-empty string."""
    if not isinstance(prompt, str):
        raise PromptError(
            f"a prompt is {prompt!r:.80} ({type(prompt).__name__})",
            accepted="a string, or a list of strings",
            hint="For token ids, call generate(input_ids)",
        )
    if not prompt:
        raise PromptError("a prompt is empty", accepted="text of at least one token")
    if not prompt.isascii():
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt {prompt!r:.60} holds an unpaired surrogate", accepted="valid Unicode"
            ) from error
    return prompt


def check_fits(request: Request, context: int, vocabulary: int) -> Request:
    """Return the request; raise a named error where prompt and answer do not fit ``context`` tokens."""
    length, budget = len(request.prompt_ids), request.params.max_new_tokens
    if length == 0:
        raise PromptError("a prompt has no tokens", accepted="at least one token")
    if length >= context + bool(request.continuation):
        raise ContextLengthError(
            f"the prompt has {length} tokens and the model's context is {context}",
            accepted=f"prompts of at most {context - 1} tokens",
            hint="Shorten the prompt",
        )
    if length + budget > context + bool(request.continuation):  # a continuation's last token is not fed to the model
        raise ContextLengthError(
            f"a prompt of {length} tokens with max_new_tokens={budget} needs {length + budget} positions; "
            f"the model's context is {context}",
            accepted=f"max_new_tokens up to {context - length} for this prompt",
            hint="Shorten the prompt, or lower max_new_tokens",
        )
    given = request.prompt_ids + request.continuation
    if min(given) < 0 or max(given) >= vocabulary:
        raise PromptError("a prompt holds token ids outside the vocabulary", accepted=f"ids from 0 to {vocabulary - 1}")
    check_named_ids(request.params, vocabulary)
    return request
