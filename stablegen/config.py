"""Settings per app: ``stablegen.toml`` (or ``[tool.stablegen]`` in pyproject.toml), environment and arguments.

Arguments beat the environment, it beats ``[apps.NAME]``, that beats ``[defaults]``, these beat the built-in values.
Every value is validated in its place, even where a higher layer overrides it, and in the tables of other apps.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypedDict, get_args

from pydantic import ByteSize, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from stablegen.core.policy import ExecutionPolicy, load_policy, policy_forms
from stablegen.core.verdict import DEFAULT_ACCEPTED_RISK, OnRisk
from stablegen.errors import ConfigError, PolicyError
from stablegen.machine.device import Dtype

_FILE, _PYPROJECT = "stablegen.toml", "pyproject.toml"
_APP, _CONFIG = "STABLEGEN_APP", "STABLEGEN_CONFIG"
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": get_args(Dtype),
    "device": ("auto", "cpu", "cuda", "cuda:N"),
    "on_risk": get_args(OnRisk),
}
_ACCEPTED: Mapping[str, str] = {key: ", ".join(words) for key, words in _CHOICES.items()} | {
    "policy": "the name of a policy",
    "model": "a hub id such as 'gpt2', or a local folder such as './models/mine'",
    "revision": "a branch, tag or commit of the hub",
    "cache_dir": "a folder such as '~/answers'",
    "accepted_risk": "a probability from 0 to 1",
    "size_limit": "a positive number of bytes, or a string such as '500MB' or '2GiB'",
    "kv_cache_size": "a positive number of bytes, or a string such as '500MB' or '2GiB'",
}


class ClientSettings(TypedDict, total=False):
    """What every way to make a client takes.

    What is None or not given comes from the environment (``STABLEGEN_POLICY`` ...), from the app's settings, from the
    ``[defaults]`` of the configuration file, and last from the built-in value, in brackets below.
    """

    policy: str | ExecutionPolicy | None
    """How misses run [``invariant`` where the model can run under it, ``single`` where not]."""
    dtype: str | None
    """A checkpoint's: ``float32``, ``float16`` or ``bfloat16`` [``float32``]; a live model has its own."""
    device: str | None
    """A checkpoint's: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` [``auto``]; a live model has its own."""
    on_risk: OnRisk | None
    """What happens to a flagged hit: ``serve``, ``warn``, ``verify``, ``recompute`` or ``raise`` [``warn``]."""
    accepted_risk: float | None
    """The probability of divergence up to which a hit is stable [0.005]."""
    cache_dir: str | Path | None
    """The folder of the cache [the user's cache folder]."""
    size_limit: int | None
    """Bytes that the cache may take [None: nothing is ever evicted]."""
    kv_cache_size: int | None
    """Bytes that keys and values may take in a batch-invariant engine [None: 2 GiB on a GPU, 1 GiB on a CPU]."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Hold the values of one place, and how an error or an origin names that place."""

    origin: str
    values: Mapping[str, object]


class LayerSource(PydanticBaseSettingsSource):
    """Pass one layer (a table, a variable, the arguments) to pydantic-settings."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self.layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[object, str, bool]:
        """Return the layer's value of one field, unchanged."""
        return self.layer.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the layer's values, for pydantic-settings to merge."""
        return dict(self.layer.values)


class Settings(BaseSettings):
    """Hold what one app runs with; built directly, it reads neither a file nor the environment.

    Raises ConfigError for an unknown key or a bad value.
    """

    # the built-in values need no check
    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=False)

    model: str | None = Field(None, min_length=1, description="Hub id or local folder; None is the embedded tiny-gpt2.")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit; None is the hub's newest.")
    policy: str | None = Field(
        None,
        description=f"Execution policy: {', '.join(policy_forms())}; None is the best that the model can run under.",
    )
    dtype: Dtype = Field("float32", description="Number format of the weights and the computation.")
    device: str = Field("auto", pattern="^(auto|cpu|cuda(:(0|[1-9][0-9]*))?)$", description="Where to compute.")
    cache_dir: Path | None = Field(None, description="Folder of the cache; None is the user's platform cache folder.")
    on_risk: OnRisk = Field("warn", description="What to do with a hit that a fresh run may not repeat.")
    accepted_risk: float = Field(
        DEFAULT_ACCEPTED_RISK, ge=0, le=1, description="Probability of divergence up to which a hit is stable."
    )
    size_limit: Annotated[ByteSize, Field(ge=1)] | None = Field(
        None, description="Bytes the cache may take; None: nothing is ever evicted."
    )
    kv_cache_size: Annotated[ByteSize, Field(ge=1)] | None = Field(
        None, description="Bytes that keys and values may take under invariant; None: 2 GiB on a GPU, 1 GiB on a CPU."
    )

    def __init__(self, *, layers: Sequence[Layer] = (), **values: Any) -> None:
        try:
            super().__init__(layers=layers, **values)
        except ValidationError as error:
            raise _explain(error, [Layer("argument", values), *layers]) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the arguments, then the layers in their order, and nothing else."""
        assert isinstance(init_settings, InitSettingsSource)
        layers: Sequence[Layer] = init_settings.init_kwargs.pop("layers")
        return (init_settings, *(LayerSource(settings_cls, layer) for layer in layers))

    @field_validator("model", "cache_dir", mode="before")
    @classmethod
    def _locate(cls, value: object, info: ValidationInfo) -> object:
        located = _located(info.field_name, value, Path.cwd())
        if info.field_name == "cache_dir" and isinstance(located, str):
            raise ValueError("is not a path that can be located")
        return located

    @field_validator("policy", mode="before")
    @classmethod
    def _load_policy(cls, value: Any) -> str:
        return load_policy(value).spec

    @field_validator("accepted_risk", "size_limit", "kv_cache_size", mode="before")
    @classmethod
    def _check_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool):
            raise ValueError("is not a number")
        # ByteSize drops what follows the part it understands: "1,5GB" would be one byte.
        size = r"\s*(\d+\.?\d*|\.\d+)\s*[A-Za-z]*\s*"
        if info.field_name != "accepted_risk" and isinstance(value, str) and not re.fullmatch(size, value):
            raise ValueError("is not a size")
        return value


@dataclass(frozen=True, slots=True)
class Effective:
    """Hold the settings in force, the app and file they come from, and where each key was set."""

    settings: Settings
    app: str | None
    file: Path | None
    origins: Mapping[str, str]  # key -> "argument", "environment STABLEGEN_POLICY", "[defaults] in FILE", "built-in"


def load_settings(
    app: str | None = None,
    *,
    start: Path | None = None,
    environ: Mapping[str, str] | None = None,
    **arguments: object,
) -> Effective:
    """Merge arguments, environment and file into the settings in force.

    ``start`` is the folder where the search for a file begins (None: the current one), ``environ`` replaces
    ``os.environ``. An argument that is ``None`` counts as not given. A revision belongs to the model named beside it:
    where a higher place names another model, a lower place's revision is dropped. Raises ConfigError, which names the
    place and what is accepted there.
    """
    environ = os.environ if environ is None else environ
    given = {key: value for key, value in arguments.items() if value is not None}
    outer = [Layer("argument", given), *_environment(environ)]
    folder = Path.cwd() / (start or "")
    file, defaults, apps = _tables(folder, environ)
    source = "argument" if app is not None else f"environment {_APP}"
    app = environ.get(_APP) or None if app is None else app
    if app is not None and app not in apps:
        place = f"{file} has no such table" if file else f"no {_FILE} in {folder} or above it"
        known = ", ".join(sorted(apps)) or "none; a table [apps.NAME] makes one"
        raise ConfigError(f"unknown app {app!r} ({source}): {place}", accepted=known, hint=_near(app, apps))
    for layer in [*outer, defaults, *apps.values()]:
        Settings(layers=[layer])
    levels = [outer[:1], outer[1:], [apps[app]] if app is not None else [], [defaults]]
    layers = [layer for level in _with_own_revision(levels) for layer in level]
    origins = {key: _origin(key, layers) for key in Settings.model_fields}
    return Effective(Settings(layers=layers), app, file, MappingProxyType(origins))


def _with_own_revision(levels: list[list[Layer]]) -> list[list[Layer]]:
    """Drop the revisions of levels below the one that names the model."""
    names = [any("model" in layer.values for layer in level) for level in levels]
    top = names.index(True) + 1 if any(names) else len(levels)
    return [*levels[:top], *([_without(layer, "revision") for layer in level] for level in levels[top:])]


def _without(layer: Layer, key: str) -> Layer:
    return Layer(layer.origin, {name: value for name, value in layer.values.items() if name != key})


def _environment(environ: Mapping[str, str]) -> list[Layer]:
    """Return a layer per variable; an empty one counts as not set, because CI systems pass absent values so."""
    keys = {f"STABLEGEN_{key.upper()}": key for key in Settings.model_fields}
    known = [*keys, _APP, _CONFIG]
    for name in sorted(environ):
        if name.startswith("STABLEGEN_") and name not in known and not name.startswith("STABLEGEN_TEST_"):
            raise ConfigError(
                f"unknown environment variable {name}", accepted=", ".join(known), hint=_near(name, known)
            )
    return [Layer(f"environment {name}", {key: environ[name]}) for name, key in keys.items() if environ.get(name)]


def _tables(folder: Path, environ: Mapping[str, str]) -> tuple[Path | None, Layer, dict[str, Layer]]:
    """Return the file in force, its ``[defaults]`` and its apps by name."""
    file, content = _find(folder, environ)
    if file is None:
        return None, Layer("built-in", {}), {}
    prefix = "tool.stablegen." if file.name == _PYPROJECT else ""
    root = _table(content, f"[tool.stablegen] in {file}")
    for key, value in root.items():
        if key not in ("defaults", "apps"):
            hint = f"Write it into [{prefix}defaults]" if key in Settings.model_fields else None
            if hint is None and isinstance(value, dict):
                hint = _near(key, ("defaults", "apps")) or f"An app is written [{prefix}apps.{key}]"
            raise ConfigError(
                f"unknown {'table' if isinstance(value, dict) else 'key'} {key!r} in {file}",
                accepted=f"[{prefix}defaults], [{prefix}apps.NAME]",
                hint=hint,
            )

    def layer(name: str, value: object) -> Layer:
        origin = f"[{prefix}{name}] in {file}"
        values = {key: _located(key, given, file.parent) for key, given in _table(value, origin).items()}
        return Layer(origin, values)

    apps = _table(root.get("apps", {}), f"[{prefix}apps] in {file}")
    return file, layer("defaults", root.get("defaults", {})), {app: layer(f"apps.{app}", apps[app]) for app in apps}


def _find(folder: Path, environ: Mapping[str, str]) -> tuple[Path | None, object]:
    """Return the file and its stablegen part: the one the environment names, or the nearest from ``folder`` up."""
    if environ.get(_CONFIG):
        file = Path(str(_located("cache_dir", environ[_CONFIG], Path.cwd())))
        content = _parse(file, f" (environment {_CONFIG})")
        if content is None:
            raise ConfigError(f"{file} (environment {_CONFIG}) has no [tool.stablegen]", accepted=f"a {_FILE}")
        return file, content
    for file in (parent / name for parent in (folder, *folder.parents) for name in (_FILE, _PYPROJECT)):
        if file.is_file() and (content := _parse(file)) is not None:
            return file, content
    return None, None


def _parse(file: Path, source: str = "") -> object:
    """Return what the file sets, or None for a pyproject.toml without stablegen; one not naming it is not parsed."""
    try:
        data = file.read_bytes()
        if file.name == _PYPROJECT and b"stablegen" not in data:
            return None
        content = tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{file}{source} cannot be read: {error.strerror}", accepted=f"a {_FILE}") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise ConfigError(f"{file}{source} is not valid TOML: {error}", accepted="TOML 1.0 in UTF-8") from error
    if file.name != _PYPROJECT:
        return content
    tool = content.get("tool")
    return tool.get("stablegen") if isinstance(tool, dict) else None


def _table(value: object, origin: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"{origin} is {value!r}", accepted="a table", hint="Write a setting into [defaults]")
    return value


def _located(key: str | None, value: object, folder: Path) -> object:
    """Return a local path with ``~`` expanded and absolute from ``folder``, and anything else as it is."""
    if key not in ("model", "cache_dir") or not isinstance(value, (str, os.PathLike)) or not value:
        return value
    if key == "model" and isinstance(value, str) and value.split("/")[0] not in (".", "..", "~"):
        return value  # a hub id, or an absolute path
    try:
        path = Path(value).expanduser()
        path = path if path.is_absolute() else (folder / path).resolve()
    except (RuntimeError, ValueError):  # no such home, or a null byte
        return value
    return path if key == "cache_dir" else str(path)


def _origin(key: str, layers: Iterable[Layer]) -> str:
    return next((layer.origin for layer in layers if key in layer.values), "built-in")


def _explain(error: ValidationError, layers: Iterable[Layer]) -> ConfigError:
    """Turn pydantic's first error into one that names the key, its place and what is accepted."""
    first = error.errors(include_url=False)[0]
    key, value = str(first["loc"][0]), first["input"]
    origin = _origin(key, layers)
    if first["type"] == "extra_forbidden":
        fields = list(Settings.model_fields)
        return ConfigError(f"unknown key {key!r} ({origin})", accepted=", ".join(fields), hint=_near(key, fields))
    cause = first.get("ctx", {}).get("error")
    policy = cause if isinstance(cause, PolicyError) else None
    reason = f": {policy.problem}" if policy else f" {cause or 'is not accepted'}"
    return ConfigError(
        f"{key} = {value!r:.80} ({origin}){reason}",
        accepted=policy.accepted if policy and policy.accepted else _ACCEPTED[key],
        hint=_near(str(value), policy_forms() if key == "policy" else _CHOICES.get(key, ())),
    )


def _near(word: str, known: Iterable[str]) -> str | None:
    """Suggest the known word nearest to a mistyped one."""
    words = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.5)
    return f"Perhaps {words[close[0]]!r} was meant" if close else None
