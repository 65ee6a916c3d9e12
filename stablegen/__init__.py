"""stablegen: a cached LLM generation client with a determinism guard.

Names are imported when they are first used, so that ``import stablegen`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stablegen.client import Client
    from stablegen.config import ClientSettings
    from stablegen.core.answer import Completion, Score, Verification
    from stablegen.core.calibration import Calibration
    from stablegen.core.numerics import Numerics
    from stablegen.core.params import GenerationParams
    from stablegen.core.policy import (
        Batch,
        ExecutionPolicy,
        Invariant,
        Limits,
        Native,
        Padded,
        Shape,
        Single,
        load_policy,
        register_policy,
    )
    from stablegen.core.record import Composition, Record
    from stablegen.core.request import ModelIdentity, Request
    from stablegen.core.trace import Trace
    from stablegen.core.verdict import FlaggedHit, OnRisk, SelfCheck, Verdict
    from stablegen.drop_in import restore, stabilize
    from stablegen.engine.base import Engine, Generated
    from stablegen.engine.invariant.architectures import register_architecture
    from stablegen.errors import (
        AttentionMaskError,
        CacheDirectoryError,
        CacheEntryWarning,
        CacheError,
        CacheSchemaError,
        CacheWriteError,
        CalibrationError,
        CheckpointError,
        ClientClosedError,
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
        TeacherForcingError,
        UncachedWarning,
        UnsupportedParameterError,
    )
    from stablegen.session.call import Progress
    from stablegen.sources.base import Source
    from stablegen.store.base import Store
    from stablegen.store.cache import Cache
    from stablegen.store.disk import DiskStore
    from stablegen.store.memory import MemoryStore

__version__ = "0.1.0"

_MODULES = {
    "AttentionMaskError": "errors",
    "Batch": "core.policy",
    "Cache": "store.cache",
    "CacheDirectoryError": "errors",
    "CacheEntryWarning": "errors",
    "CacheError": "errors",
    "CacheSchemaError": "errors",
    "CacheWriteError": "errors",
    "Calibration": "core.calibration",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "Client": "client",
    "ClientClosedError": "errors",
    "ClientSettings": "config",
    "Completion": "core.answer",
    "Composition": "core.record",
    "ConfigError": "errors",
    "ContextLengthError": "errors",
    "CorruptEntryError": "errors",
    "DeviceError": "errors",
    "DeviceMemoryError": "errors",
    "DiskStore": "store.disk",
    "DivergenceRiskError": "errors",
    "DtypeError": "errors",
    "Engine": "engine.base",
    "EngineError": "errors",
    "ExecutionPolicy": "core.policy",
    "FlaggedHit": "core.verdict",
    "Generated": "engine.base",
    "GenerationParams": "core.params",
    "HubError": "errors",
    "InputFileError": "errors",
    "InvalidRequestError": "errors",
    "Invariant": "core.policy",
    "Limits": "core.policy",
    "MarginWarning": "errors",
    "MemoryStore": "store.memory",
    "MissingPackageError": "errors",
    "ModelError": "errors",
    "ModelIdentity": "core.request",
    "Native": "core.policy",
    "NonFiniteScoresError": "errors",
    "Numerics": "core.numerics",
    "NumericsChangedError": "errors",
    "OnRisk": "core.verdict",
    "Padded": "core.policy",
    "ParameterError": "errors",
    "PolicyError": "errors",
    "Progress": "session.call",
    "PromiseWarning": "errors",
    "PromptError": "errors",
    "Record": "core.record",
    "RecordNotFoundError": "errors",
    "Request": "core.request",
    "Score": "core.answer",
    "SelfCheck": "core.verdict",
    "Shape": "core.policy",
    "Single": "core.policy",
    "Source": "sources.base",
    "StablegenError": "errors",
    "Store": "store.base",
    "TeacherForcingError": "errors",
    "Trace": "core.trace",
    "UncachedWarning": "errors",
    "UnsupportedParameterError": "errors",
    "Verdict": "core.verdict",
    "Verification": "core.answer",
    "load_policy": "core.policy",
    "register_architecture": "engine.invariant.architectures",
    "register_policy": "core.policy",
    "restore": "drop_in",
    "stabilize": "drop_in",
}
"""Each public name, and the module under ``stablegen`` that defines it."""

__all__ = [
    "AttentionMaskError",
    "Batch",
    "Cache",
    "CacheDirectoryError",
    "CacheEntryWarning",
    "CacheError",
    "CacheSchemaError",
    "CacheWriteError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Client",
    "ClientClosedError",
    "ClientSettings",
    "Completion",
    "Composition",
    "ConfigError",
    "ContextLengthError",
    "CorruptEntryError",
    "DeviceError",
    "DeviceMemoryError",
    "DiskStore",
    "DivergenceRiskError",
    "DtypeError",
    "Engine",
    "EngineError",
    "ExecutionPolicy",
    "FlaggedHit",
    "Generated",
    "GenerationParams",
    "HubError",
    "InputFileError",
    "InvalidRequestError",
    "Invariant",
    "Limits",
    "MarginWarning",
    "MemoryStore",
    "MissingPackageError",
    "ModelError",
    "ModelIdentity",
    "Native",
    "NonFiniteScoresError",
    "Numerics",
    "NumericsChangedError",
    "OnRisk",
    "Padded",
    "ParameterError",
    "PolicyError",
    "Progress",
    "PromiseWarning",
    "PromptError",
    "Record",
    "RecordNotFoundError",
    "Request",
    "Score",
    "SelfCheck",
    "Shape",
    "Single",
    "Source",
    "StablegenError",
    "Store",
    "TeacherForcingError",
    "Trace",
    "UncachedWarning",
    "UnsupportedParameterError",
    "Verdict",
    "Verification",
    "load_policy",
    "register_architecture",
    "register_policy",
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
