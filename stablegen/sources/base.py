"""Where a model comes from: what is known of it without loading it, how it would compute, and its engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from stablegen.core.numerics import Numerics
from stablegen.core.policy import BATCH_INVARIANT, ExecutionPolicy
from stablegen.core.request import ModelIdentity
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures import check_invariant
from stablegen.errors import PolicyError, UnsupportedParameterError
from stablegen.tokenizer import Tokenizer


class Source(ABC):
    """A model that a client serves.

    ``identity`` goes into every key, so it must change whenever the model's answers may. Where it or a plan changes
    between two calls, the client starts a new engine. ``config`` is the model's configuration where it has one.
    """

    tokenizer: Tokenizer
    config: Mapping[str, Any] = MappingProxyType({})

    @property
    @abstractmethod
    def identity(self) -> ModelIdentity:
        """Return which weights these are now; the same object as long as they are the same."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Return the longest sequence in tokens."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Return the number of token ids."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer unless the caller names others."""
        return ()

    @abstractmethod
    def plan(self, policy: ExecutionPolicy, dtype: str, device: str) -> Numerics:
        """Return the numerics of a policy here, known without loading the model; the same object while nothing changed.

        ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. A source whose model is loaded already plans for the
        dtype and the device it has. Raises ``PolicyError``, ``DeviceError`` or ``DtypeError`` where it cannot run.
        """

    @abstractmethod
    def start(self, numerics: Numerics) -> Engine:
        """Load the model and return its engine, whose ``numerics`` are those actually found."""

    def check(self, policy: ExecutionPolicy) -> None:
        """Raise ``PolicyError`` where this model cannot run under a policy."""
        if policy.engines == BATCH_INVARIANT:
            check_invariant(self.config)

    def can_run(self, policy: ExecutionPolicy) -> bool:
        """Return whether this model can run under a policy."""
        try:
            self.check(policy)
        except PolicyError:
            return False
        return True

    def resolver(self) -> Any:
        """Return the transformers model that resolves the arguments of ``generate``; it needs no weights."""
        raise self._refusal()

    def passthrough(self, numerics: Numerics) -> Any:
        """Return an object whose ``generate`` runs a call that stablegen passes through to transformers."""
        raise self._refusal()

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Release what the source holds besides its engines."""

    def _refusal(self) -> UnsupportedParameterError:
        return UnsupportedParameterError(
            f"generate() needs a transformers model, and a source of type {type(self).__name__} has none",
            accepted="complete(), score() and run() with this source",
        )
