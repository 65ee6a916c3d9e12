"""Text to token ids and back, through ``tokenizers`` or a transformers tokenizer already loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stablegen.checkpoint import DigestMemory
from stablegen.errors import CheckpointError, ModelError


class Tokenizer:
    """One tokenizer: ``digest`` identifies it in the request key."""

    def __init__(self, backend: Any, digest: str, *, wrapped: Any = None) -> None:
        self._backend = backend
        self._wrapped = wrapped
        self.digest = digest

    @classmethod
    def from_file(cls, file: Path, memory: DigestMemory) -> Tokenizer:
        """Return the tokenizer of a ``tokenizer.json``; raise ``CheckpointError`` where it is not one."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = _whole(Backend.from_file(str(file)))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
        return cls(backend, memory.digest(file))

    @classmethod
    def from_object(cls, tokenizer: Any) -> Tokenizer:
        """Return a wrapper around a transformers (fast) tokenizer or a ``tokenizers.Tokenizer``."""
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ModelError(
                f"a tokenizer of type {type(tokenizer).__name__} cannot be identified",
                accepted="a fast transformers tokenizer, or tokenizers.Tokenizer",
            )
        wrapped = tokenizer if backend is not tokenizer else None
        own = _whole(type(backend).from_str(backend.to_str()))
        return cls(own, hashlib.sha256(own.to_str().encode()).hexdigest(), wrapped=wrapped)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a prompt."""
        if self._wrapped is not None:
            return tuple(self._wrapped(text)["input_ids"])
        return tuple(self._backend.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token(self, index: int) -> str:
        """Return the text of one token as a person reads it, special tokens by name."""
        text = str(self._backend.decode([index], skip_special_tokens=False))
        return text if text and "\ufffd" not in text else str(self._backend.id_to_token(index))


def _whole(backend: Any) -> Any:
    """Return a tokenizer that neither cuts nor pads, whatever its file or an earlier call has set."""
    backend.no_truncation()
    backend.no_padding()
    return backend
