"""stablegen: a cached LLM generation client with a determinism guard.

Names are imported when they are first used, so that ``import stablegen`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablegen.client import Client
    from stablegen.core.answer import Completion, Score, SelfCheck, Verdict, Verification
    from stablegen.core.calibration import Calibration
    from stablegen.core.flagged import FlaggedHit
    from stablegen.core.numerics import Numerics
    from stablegen.core.params import GenerationParams
    from stablegen.core.policy import ExecutionPolicy, Invariant, Native, Padded, Single, load_policy
    from stablegen.core.record import Composition, Record
    from stablegen.core.request import ModelIdentity, Request
    from stablegen.core.trace import Trace
    from stablegen.drop_in import restore, stabilize
    from stablegen.errors import (
        AttentionMaskError,
        CacheDirectoryError,
        CacheEntryWarning,
        CacheError,
        CacheSchemaError,
        CacheWriteError,
        CalibrationError,
        CheckpointError,
        ConfigError,
        ContextLengthError,
        CorruptEntryError,
        DeviceError,
        DeviceMemoryError,
        DivergenceRiskError,
        DtypeError,
        EngineError,
        HubError,
        InputFileError,
        InvalidRequestError,
        MarginWarning,
        MissingPackageError,
        ModelError,
        NonFiniteScoresError,
        NumericsChangedError,
        ParameterError,
        PolicyError,
        PromiseWarning,
        PromptError,
        RecordNotFoundError,
        StablegenError,
        UncachedWarning,
        UnsupportedParameterError,
    )

__version__ = "0.1.0"

_MODULES = {
    "AttentionMaskError": "errors",
    "CacheDirectoryError": "errors",
    "CacheEntryWarning": "errors",
    "CacheError": "errors",
    "CacheSchemaError": "errors",
    "CacheWriteError": "errors",
    "Calibration": "core.calibration",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "Client": "client",
    "Completion": "core.answer",
    "Composition": "core.record",
    "ConfigError": "errors",
    "ContextLengthError": "errors",
    "CorruptEntryError": "errors",
    "DeviceError": "errors",
    "DeviceMemoryError": "errors",
    "DivergenceRiskError": "errors",
    "DtypeError": "errors",
    "EngineError": "errors",
    "ExecutionPolicy": "core.policy",
    "FlaggedHit": "core.flagged",
    "GenerationParams": "core.params",
    "HubError": "errors",
    "InputFileError": "errors",
    "InvalidRequestError": "errors",
    "Invariant": "core.policy",
    "MarginWarning": "errors",
    "MissingPackageError": "errors",
    "ModelError": "errors",
    "ModelIdentity": "core.request",
    "Native": "core.policy",
    "NonFiniteScoresError": "errors",
    "Numerics": "core.numerics",
    "NumericsChangedError": "errors",
    "Padded": "core.policy",
    "ParameterError": "errors",
    "PolicyError": "errors",
    "PromiseWarning": "errors",
    "PromptError": "errors",
    "Record": "core.record",
    "RecordNotFoundError": "errors",
    "Request": "core.request",
    "Score": "core.answer",
    "SelfCheck": "core.answer",
    "Single": "core.policy",
    "StablegenError": "errors",
    "Trace": "core.trace",
    "UncachedWarning": "errors",
    "UnsupportedParameterError": "errors",
    "Verdict": "core.answer",
    "Verification": "core.answer",
    "load_policy": "core.policy",
    "restore": "drop_in",
    "stabilize": "drop_in",
}
"""Each public name, and the module under ``stablegen`` that defines it."""

__all__ = [
    "AttentionMaskError",
    "CacheDirectoryError",
    "CacheEntryWarning",
    "CacheError",
    "CacheSchemaError",
    "CacheWriteError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Client",
    "Completion",
    "Composition",
    "ConfigError",
    "ContextLengthError",
    "CorruptEntryError",
    "DeviceError",
    "DeviceMemoryError",
    "DivergenceRiskError",
    "DtypeError",
    "EngineError",
    "ExecutionPolicy",
    "FlaggedHit",
    "GenerationParams",
    "HubError",
    "InputFileError",
    "InvalidRequestError",
    "Invariant",
    "MarginWarning",
    "MissingPackageError",
    "ModelError",
    "ModelIdentity",
    "Native",
    "NonFiniteScoresError",
    "Numerics",
    "NumericsChangedError",
    "Padded",
    "ParameterError",
    "PolicyError",
    "PromiseWarning",
    "PromptError",
    "Record",
    "RecordNotFoundError",
    "Request",
    "Score",
    "SelfCheck",
    "Single",
    "StablegenError",
    "Trace",
    "UncachedWarning",
    "UnsupportedParameterError",
    "Verdict",
    "Verification",
    "load_policy",
    "restore",
    "stabilize",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'stablegen' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"stablegen.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
