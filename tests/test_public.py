"""The public names: fixed by the documentation, each one there, and the errors as their tree draws them."""

from __future__ import annotations

import inspect
import re
from importlib import metadata

import pytest
from support import python

import stablegen
from stablegen import errors

NAMES = sorted(
    [
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
)
ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}

ALIASES = ("OnRisk", "Progress")


def test_the_public_names() -> None:
    assert stablegen.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(stablegen, name)
    if name not in ALIASES:  # a type alias is documented where it is defined
        assert inspect.getdoc(found)
        assert found.__module__.startswith("stablegen.")
    assert name in dir(stablegen)


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="'stablegen' has no attribute 'nothing'"):
        _ = stablegen.nothing


def test_the_version_is_the_packages() -> None:
    assert stablegen.__version__ == metadata.version("stablegen")


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_and_warning_is_public(name: str) -> None:
    assert name in stablegen.__all__
    assert getattr(stablegen, name) is ERRORS[name]


def test_the_tree_of_errors_is_as_drawn() -> None:
    drawn: dict[str, tuple[str, ...]] = {}
    parents: list[str] = []
    for indent, name, also in re.findall(
        r"^    ([│├└─ ]*)(\w+Error)(?: \((\w+)\))?", errors.__doc__ or "", re.MULTILINE
    ):
        depth = len(indent) // 4
        parents[depth:] = [name]
        drawn[name] = tuple(filter(None, (parents[depth - 1] if depth else "Exception", also)))
    assert drawn == {
        name: tuple(base.__name__ for base in kind.__bases__)
        for name, kind in ERRORS.items()
        if not issubclass(kind, Warning)
    }


def test_the_warnings_are_as_told() -> None:
    told = set(re.findall(r"``(\w+Warning)``", errors.__doc__ or ""))
    assert told == {name for name, kind in ERRORS.items() if issubclass(kind, Warning)}
    assert all(issubclass(ERRORS[name], UserWarning) for name in told)


def test_errors_say_problem_accepted_and_hint() -> None:
    error = stablegen.StablegenError("this is wrong", accepted="that", hint="Do it.")
    assert str(error) == error.message == "this is wrong. Accepted: that. Do it."
    assert (error.problem, error.accepted, error.hint, error.completions) == ("this is wrong", "that", "Do it.", ())
    assert str(stablegen.RecordNotFoundError("none there")) == "none there."  # and not a KeyError's repr


def test_importing_loads_nothing() -> None:
    code = """
import json, sys
before = set(sys.modules)
import stablegen
print(json.dumps(sorted(name for name in set(sys.modules) - before if not name.startswith("stablegen"))))
"""
    assert not set(python(code)) & {"torch", "transformers", "numpy", "pydantic", "diskcache", "tokenizers", "tenacity"}


def test_every_public_name_loads_without_torch() -> None:
    code = """
import json, sys
import stablegen
for name in stablegen.__all__:
    getattr(stablegen, name)
print(json.dumps(sorted({"torch", "transformers", "numpy"} & set(sys.modules))))
"""
    assert python(code) == []
