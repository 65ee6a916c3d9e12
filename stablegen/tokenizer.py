"""Text to token ids and back, through ``tokenizers`` or a transformers tokenizer already loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablegen.errors import CheckpointError, ModelError, ParameterError, PromptError


class Tokenizer:
    """A tokenizer, or the absence of one, which leaves only token ids; ``digest`` identifies it in the request key."""

    def __init__(self, backend: Any, digest: str, *, wrapped: Any = None) -> None:
        self._backend = backend
        self._wrapped = wrapped
        self._made: Any = None
        self.digest = digest

    @classmethod
    def absent(cls) -> Tokenizer:
        """Return the placeholder for a client without a tokenizer."""
        return cls(None, "")

    @classmethod
    def from_file(cls, file: Path, digest: str) -> Tokenizer:
        """Return the tokenizer of a ``tokenizer.json`` with that digest; raise ``CheckpointError`` if unreadable."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = _whole(Backend.from_file(str(file)))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
        return cls(backend, digest)

    @classmethod
    def from_object(cls, tokenizer: Any) -> Tokenizer:
        """Return a wrapper around a transformers (fast) tokenizer, a ``tokenizers.Tokenizer``, or None."""
        if tokenizer is None:
            return cls.absent()
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ModelError(
                f"a tokenizer of type {type(tokenizer).__name__} cannot be identified",
                accepted="a fast transformers tokenizer, or tokenizers.Tokenizer",
            )
        wrapped = tokenizer if backend is not tokenizer else None
        own = _whole(type(backend).from_str(backend.to_str()))
        return cls(own, hashlib.sha256(own.to_str().encode()).hexdigest(), wrapped=wrapped)

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Return the token ids of a text; with ``special``, including those that the tokenizer adds around it."""
        if self._backend is None:
            raise PromptError(
                f"the prompt {text!r:.60} is a text, and this client has no tokenizer",
                accepted="token ids, passed to generate()",
                hint="Give the client the model's tokenizer",
            )
        if self._wrapped is not None:
            return tuple(self._wrapped(text, add_special_tokens=special)["input_ids"])
        return tuple(self._backend.encode(text, add_special_tokens=special).ids)

    def split(self, prompt: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids of a prompt and of what continues it, tokenized together.

        White space at the prompt's end belongs to the continuation, as tokenizers and lm-eval have it.
        """
        begin = len(prompt.rstrip())
        head, whole = self.encode(prompt[:begin]), self.encode(prompt + continuation)
        if whole[: len(head)] != head:
            raise PromptError(
                f"the prompt {prompt!r:.40} has other tokens alone than before {continuation!r:.40}",
                accepted="a prompt that ends where a token ends",
                hint="Split the text between words, or give token ids",
            )
        return head, whole[len(head) :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids without special tokens; '' without a tokenizer."""
        if self._backend is None:
            return ""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token(self, index: int) -> str:
        """Return the readable text of one token, special tokens by name; without a tokenizer, its id."""
        if self._backend is None:
            return str(index)
        text = str(self._backend.decode([index], skip_special_tokens=False))
        return text if text and "\ufffd" not in text else str(self._backend.id_to_token(index))

    def is_of(self, tokenizer: Any) -> bool:
        """Return whether a transformers tokenizer, or one of ``tokenizers``, is this one."""
        return tokenizer is self._wrapped or Tokenizer.from_object(tokenizer).digest == self.digest

    def check_texts(self) -> None:
        """Raise ``ParameterError`` where there is no tokenizer, which stop strings need."""
        if self._backend is None:
            raise ParameterError(
                "stop_strings are texts, and this client has no tokenizer",
                accepted="stop_strings with a tokenizer",
                hint="Give the client the model's tokenizer",
            )

    def for_transformers(self) -> Any:
        """Return the tokenizer as a transformers object; raise ``ParameterError`` where there is none."""
        self.check_texts()
        if self._wrapped is not None:
            return self._wrapped
        if self._made is None:
            from transformers import PreTrainedTokenizerFast

            self._made = PreTrainedTokenizerFast(tokenizer_object=self._backend)
        return self._made


def _whole(backend: Any) -> Any:
    """Return a tokenizer that neither truncates nor pads, whatever its file or an earlier call has set."""
    backend.no_truncation()
    backend.no_padding()
    return backend
