"""stablegen: a cached LLM generation client with a determinism guard.

Names are imported when they are first used, so that ``import stablegen`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablegen.calibration import Calibration
    from stablegen.client import Client
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
    from stablegen.numerics import Numerics
    from stablegen.params import GenerationParams
    from stablegen.policy import ExecutionPolicy, Invariant, Native, Padded, Single, load_policy
    from stablegen.record import Completion, Composition, Record, Score, SelfCheck, Trace, Verdict, Verification
    from stablegen.request import ModelIdentity, Request
    from stablegen.store.base import FlaggedHit

__version__ = "0.1.0"

_HOMES = (
    *("client", "drop_in", "calibration", "guard", "numerics", "params"),
    *("policy", "record", "request", "store.base", "errors"),
)
"""Modules of the public names, searched in this order: whoever imports the client has loaded most of them."""

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
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"stablegen.{home}")
            if name in vars(module):
                value = globals()[name] = getattr(module, name)
                return value
    raise AttributeError(f"module 'stablegen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
