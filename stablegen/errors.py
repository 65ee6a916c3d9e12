"""Every error stablegen raises, each saying what was given, what is accepted and what to do next.

::

    StablegenError
    ├── InvalidRequestError (ValueError)
    │   ├── PromptError              empty, or not a string or list of token ids
    │   ├── ContextLengthError       prompt, or prompt + max_new_tokens, does not fit the model
    │   ├── ParameterError           a generation parameter out of range
    │   ├── UnsupportedParameterError  a parameter that no policy can make stable
    │   ├── AttentionMaskError       wrong shape, holes, or an empty row
    │   └── InputFileError           a line of an input file that cannot be read
    ├── PolicyError (ValueError)     unknown execution policy, or one the model cannot run under
    ├── ConfigError (ValueError)     unknown key or bad value in a file or the environment
    ├── ModelError
    │   ├── CheckpointError          a file is missing or damaged, weights hold NaN
    │   └── HubError                 the model could not be downloaded
    ├── DeviceError
    │   ├── DtypeError (ValueError)  the device does not support that dtype
    │   └── DeviceMemoryError        the batch did not fit
    ├── EngineError
    │   ├── NonFiniteScoresError     scores became NaN or infinite; never cached
    │   ├── TeacherForcingError      the engine cannot score given tokens
    │   └── NumericsChangedError     the device is not the one the client planned for
    ├── CacheError
    │   ├── CacheDirectoryError      unwritable, or not a directory
    │   ├── CacheWriteError          disk full or I/O error; carries the completions computed
    │   ├── CacheSchemaError         written by a newer stablegen
    │   ├── CorruptEntryError        an entry that fails its checks
    │   └── RecordNotFoundError (KeyError)  no record under that key
    ├── CalibrationError             too little data to calibrate by
    ├── ClientClosedError            the client was closed
    ├── DivergenceRiskError          a flagged hit under ``on_risk="raise"``
    └── MissingPackageError          an optional package that is not installed

Warnings: ``MarginWarning`` (a flagged hit), ``CacheEntryWarning`` (an entry was ignored, and why),
``PromiseWarning`` (the self-check of a policy failed on this machine), ``UncachedWarning`` (an answer was not cached,
and why).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StablegenError(Exception):
    """Say what is wrong, what is accepted and what to do.

    ``problem`` states what was given; ``accepted`` what would have been; ``hint`` the next step. ``completions``
    holds what was computed before the error, each a ``Completion``, so that nothing is lost.
    """

    completions: Sequence[Any] = ()  # not typed more closely, because core imports this module

    def __init__(self, problem: str, *, accepted: str | None = None, hint: str | None = None) -> None:
        self.problem = problem
        self.accepted = accepted
        self.hint = hint
        parts = [problem.rstrip(".")]
        if accepted is not None:
            parts.append(f"Accepted: {accepted.rstrip('.')}")
        if hint is not None:
            parts.append(hint.rstrip("."))
        self.message = ". ".join(parts) + "."
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class InvalidRequestError(StablegenError, ValueError):
    """A request that cannot be run as it was given."""


class PromptError(InvalidRequestError):
    """A prompt that is empty or of the wrong type."""


class ContextLengthError(InvalidRequestError):
    """A prompt, or prompt + max_new_tokens, that does not fit the model's context (tokens)."""


class ParameterError(InvalidRequestError):
    """A generation parameter whose value is out of range or of the wrong type."""


class UnsupportedParameterError(InvalidRequestError):
    """A generation parameter that is not supported, because no policy could make its answers stable."""


class AttentionMaskError(InvalidRequestError):
    """An attention mask whose shape differs from the ids', or that has holes or a row without a token."""


class InputFileError(InvalidRequestError):
    """A line of an input file that cannot be read as a prompt."""


class PolicyError(StablegenError, ValueError):
    """An execution policy that does not exist, or under which this model cannot run."""


class ConfigError(StablegenError, ValueError):
    """A configuration file or environment variable with an unknown key or a bad value."""


class ModelError(StablegenError):
    """A model that cannot be used."""


class CheckpointError(ModelError):
    """A checkpoint that lacks a file, is damaged, or whose weights are not finite."""


class HubError(ModelError):
    """A model that could not be downloaded from the hub."""


class DeviceError(StablegenError):
    """A device that is missing or cannot be used."""


class DtypeError(DeviceError, ValueError):
    """A dtype that does not exist, or in which the device cannot compute."""


class DeviceMemoryError(DeviceError):
    """A batch that did not fit into the device's memory."""


class EngineError(StablegenError):
    """A run that failed inside the engine."""


class NonFiniteScoresError(EngineError):
    """Scores that became NaN or infinite at some step; nothing of such a run is cached."""


class TeacherForcingError(EngineError):
    """An engine that cannot score given tokens, which verifying and calibrating need."""


class NumericsChangedError(EngineError):
    """An engine that computes under other numerics than the client planned for."""


class CacheError(StablegenError):
    """A cache that cannot be used."""


class CacheDirectoryError(CacheError):
    """A cache directory that cannot be created, read or written."""


class CacheWriteError(CacheError):
    """A record that could not be written; ``completions`` holds what was computed."""


class CacheSchemaError(CacheError):
    """A cache written by a newer stablegen than this one."""


class CorruptEntryError(CacheError):
    """A cache entry that fails its checks: foreign, damaged, misplaced or pickled."""


class RecordNotFoundError(CacheError, KeyError):
    """A key under which the cache holds no record."""


class DivergenceRiskError(StablegenError):
    """A flagged hit under ``on_risk="raise"``; ``key`` and ``verdict``, a ``Verdict``, say which and why."""

    def __init__(self, problem: str, *, key: str, verdict: Any, hint: str | None = None) -> None:
        super().__init__(problem, hint=hint)
        self.key = key
        self.verdict = verdict


class ClientClosedError(StablegenError):
    """A client that was used after it was closed."""


class CalibrationError(StablegenError):
    """Too little data to say how far margins move."""


class MissingPackageError(StablegenError):
    """An optional package that is needed and not installed."""


class MarginWarning(UserWarning):
    """A cached answer whose recomputation may differ because its two best tokens nearly tie."""


class CacheEntryWarning(UserWarning):
    """A cache entry was ignored; the message says which and why."""


class PromiseWarning(UserWarning):
    """The self-check of a policy failed on this machine, so no hit is judged ``exact`` under it."""


class UncachedWarning(UserWarning):
    """An answer was not cached: sampled without a seed, or passed through to transformers."""
