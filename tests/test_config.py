"""Settings per app: which layer wins, where files are found, and what each mistake is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stablegen.config import Effective, Settings, load_settings
from stablegen.errors import ConfigError

FILE = """
[defaults]
policy = "single"
dtype = "float16"
on_risk = "verify"
size_limit = "500MB"

[apps.golden-eval]
policy = "padded:8"
dtype = "bfloat16"

[apps.chat]
accepted_risk = 0.1
"""
BUILT_IN = {
    "model": None,
    "revision": None,
    "policy": None,
    "dtype": "float32",
    "device": "auto",
    "cache_dir": None,
    "on_risk": "warn",
    "accepted_risk": 0.005,
    "size_limit": None,
    "kv_cache_size": None,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "stablegen.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def load(app: str | None = None, environ: Mapping[str, str] | None = None, **arguments: Any) -> Effective:
    return load_settings(app, environ=environ or {}, **arguments)


def message(app: str | None = None, environ: Mapping[str, str] | None = None, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(app, environ, **arguments)
    return str(caught.value)


def test_without_any_layer_the_built_in_values_hold(folder: Path) -> None:
    effective = load()
    assert effective.settings.model_dump() == BUILT_IN
    assert (effective.app, effective.file) == (None, None)
    assert set(effective.origins) == set(BUILT_IN)
    assert set(effective.origins.values()) == {"built-in"}


def test_each_layer_beats_the_one_below_and_is_named(folder: Path) -> None:
    file = write(folder, FILE)
    environ = {
        "STABLEGEN_POLICY": "native",
        "STABLEGEN_ACCEPTED_RISK": "0.5",
        "STABLEGEN_TEST_DEVICE": "x",
        "HOME": "/",
    }
    effective = load("golden-eval", environ, accepted_risk=0)
    assert effective.settings.model_dump() == BUILT_IN | {
        "policy": "native",
        "dtype": "bfloat16",
        "on_risk": "verify",
        "accepted_risk": 0.0,
        "size_limit": 500_000_000,
    }
    assert effective.origins == dict.fromkeys(BUILT_IN, "built-in") | {
        "policy": "environment STABLEGEN_POLICY",
        "dtype": f"[apps.golden-eval] in {file}",
        "on_risk": f"[defaults] in {file}",
        "accepted_risk": "argument",
        "size_limit": f"[defaults] in {file}",
    }
    assert (effective.app, effective.file) == ("golden-eval", file)


def test_the_app_comes_from_the_argument_or_else_the_environment(folder: Path) -> None:
    write(folder, FILE)
    environ = {"STABLEGEN_APP": "chat"}
    assert load(None, environ).settings.accepted_risk == 0.1
    assert load("golden-eval", environ).app == "golden-eval"
    assert load(None, {"STABLEGEN_APP": "", "STABLEGEN_DTYPE": ""}).app is None


def test_os_environ_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABLEGEN_DEVICE", "cuda:1")
    assert load_settings().settings.device == "cuda:1"
    assert Settings().device == "auto"


def test_an_argument_that_is_none_is_not_given(folder: Path) -> None:
    file = write(folder, FILE)
    effective = load(size_limit=None, policy=None)
    assert effective.origins["size_limit"] == f"[defaults] in {file}"
    assert effective.origins["policy"] == f"[defaults] in {file}"


def test_a_revision_belongs_to_the_model_beside_it(folder: Path) -> None:
    write(folder, '[defaults]\nmodel = "gpt2"\nrevision = "r1"\n[apps.other]\nmodel = "gpt2-medium"\n')
    assert load().settings.revision == "r1"
    assert load("other").settings.revision is None
    assert load(model="distilgpt2").settings.revision is None
    assert load(model="distilgpt2", revision="r2").settings.revision == "r2"
    assert load(None, {"STABLEGEN_MODEL": "distilgpt2"}).settings.revision is None
    assert load(revision="r3").settings.model == "gpt2"


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("policy", "padded:4096", "padded:4096"),
        ("policy", "padded:08", "padded:8"),
        ("device", "cuda", "cuda"),
        ("accepted_risk", "1", 1.0),
        ("accepted_risk", 0, 0.0),
        ("size_limit", 1, 1),
        ("size_limit", "2GiB", 2 * 2**30),
        ("kv_cache_size", "2GiB", 2 * 2**30),
        ("size_limit", "1.5 kB", 1500),
    ],
)
def test_values_accepted(folder: Path, key: str, given: object, value: object) -> None:
    arguments: dict[str, Any] = {key: given}
    assert getattr(load(**arguments).settings, key) == value


@pytest.mark.parametrize(
    ("key", "given", "accepted"),
    [
        ("policy", "padded:0", "N from 1 to 4096"),
        ("policy", "padded:4097", "N from 1 to 4096"),
        ("policy", 8, "'invariant'"),
        ("dtype", "bf16", "float32, float16, bfloat16. Perhaps 'bfloat16' was meant"),
        ("device", "cuda:-1", "auto, cpu, cuda, cuda:N"),
        ("device", "tpu", "auto, cpu, cuda, cuda:N"),
        ("on_risk", "ignore", "serve, warn, verify, recompute, raise"),
        ("accepted_risk", 1.5, "from 0 to 1"),
        ("accepted_risk", float("nan"), "from 0 to 1"),
        ("accepted_risk", True, "from 0 to 1"),
        ("size_limit", 0, "a positive number of bytes"),
        ("size_limit", -1, "a positive number of bytes"),
        ("size_limit", True, "a positive number of bytes"),
        ("size_limit", "1,5GB", "'2GiB'"),
        ("kv_cache_size", "1,5GB", "'2GiB'"),
        ("size_limit", "2 GiB or so", "'2GiB'"),
        ("size_limit", "many", "'2GiB'"),
        ("model", "", "a hub id"),
        ("model", {"name": "gpt2"}, "a hub id"),
        ("revision", 7, "a branch, tag or commit"),
        ("cache_dir", "", "a folder"),
        ("cache_dir", "~nobody-of-that-name/x", "a folder"),
        ("cache_dir", 7, "a folder"),
    ],
)
def test_bad_values_name_key_place_and_what_is_accepted(folder: Path, key: str, given: object, accepted: str) -> None:
    arguments: dict[str, Any] = {key: given}
    said = message(**arguments)
    assert said.startswith(f"{key} = {given!r} (argument)")
    assert accepted in said.partition("Accepted: ")[2]
    assert "pydantic" not in said


def test_a_bad_value_names_file_and_table_or_variable(folder: Path) -> None:
    file = write(folder, '[apps.chat]\npolicy = "invarient"\n')
    place = f"policy = 'invarient' ([apps.chat] in {file}): "
    assert message("chat").startswith(place)
    assert "Perhaps 'invariant' was meant" in message("chat")
    assert message(policy="single").startswith(place), "also where no one asked for the app, or another layer wins"
    said = message(None, {"STABLEGEN_DTYPE": "float8"}, dtype="float32")
    assert said.startswith("dtype = 'float8' (environment STABLEGEN_DTYPE) is not accepted. Accepted: float32, ")


def test_unknown_keys_are_refused_in_every_layer(folder: Path) -> None:
    accepted = f"Accepted: {', '.join(BUILT_IN)}. "
    assert message(polcy="x") == f"unknown key 'polcy' (argument). {accepted}Perhaps 'policy' was meant."
    said = message(None, {"STABLEGEN_CACHEDIR": "x"})
    assert said.startswith("unknown environment variable STABLEGEN_CACHEDIR. Accepted: STABLEGEN_MODEL, ")
    assert said.endswith("STABLEGEN_APP, STABLEGEN_CONFIG. Perhaps 'STABLEGEN_CACHE_DIR' was meant.")
    for table in ("defaults", "apps.chat"):
        file = write(folder, f"[{table}]\nDtype = 'float32'\n")
        assert message() == f"unknown key 'Dtype' ([{table}] in {file}). {accepted}Perhaps 'dtype' was meant."


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("policy = 'single'", "unknown key 'policy' in FILE", "Write it into [defaults]"),
        ("[default]", "unknown table 'default' in FILE", "Perhaps 'defaults' was meant"),
        ("[golden-eval]", "unknown table 'golden-eval' in FILE", "An app is written [apps.golden-eval]"),
        ("version = 1", "unknown key 'version' in FILE", "[defaults], [apps.NAME]"),
        ("defaults = 3", "[defaults] in FILE is 3", "Accepted: a table"),
        ("[apps]\npolicy = 'single'", "[apps.policy] in FILE is 'single'", "Accepted: a table"),
        ("apps = []", "[apps] in FILE is []", "Accepted: a table"),
        ("[defaults\n", "FILE is not valid TOML: ", "(at line 1, column 10)"),
    ],
)
def test_a_file_of_the_wrong_shape_is_refused(folder: Path, text: str, problem: str, hint: str) -> None:
    file = write(folder, text)
    said = message()
    assert said.startswith(problem.replace("FILE", str(file)))
    assert hint in said


def test_a_file_that_is_not_utf8_is_refused_and_a_byte_order_mark_is_not(folder: Path) -> None:
    file = folder / "stablegen.toml"
    file.write_bytes("[defaults]\nmodel = 'é'".encode("latin-1"))
    assert message().startswith(f"{file} is not valid TOML: ")
    file.write_bytes("[defaults]\nmodel = 'é'".encode("utf-8-sig"))
    assert load().settings.model == "é"


def test_an_unknown_app_is_told_the_known_ones(folder: Path) -> None:
    assert message("chat") == (
        f"unknown app 'chat' (argument): no stablegen.toml in {folder} or above it. "
        "Accepted: none; a table [apps.NAME] makes one."
    )
    file = write(folder, FILE)
    assert message(None, {"STABLEGEN_APP": "golden"}) == (
        f"unknown app 'golden' (environment STABLEGEN_APP): {file} has no such table. "
        "Accepted: chat, golden-eval. Perhaps 'golden-eval' was meant."
    )


def test_the_nearest_file_is_read_alone(folder: Path) -> None:
    outer = write(folder, FILE)
    inner = write(folder / "a", "[tool.stablegen.apps.chat]\ndtype = 'float16'", "pyproject.toml")
    below = folder / "a" / "b"
    write(below, "[project]\nname = 'stablegen-user'", "pyproject.toml")
    write(below / "c", "this names nothing of ours and is [not TOML", "pyproject.toml")
    effective = load("chat", start=below / "c")
    assert effective.file == inner
    assert effective.origins["dtype"] == f"[tool.stablegen.apps.chat] in {inner}"
    assert effective.settings.policy is None, "nothing of the outer file"
    beside = write(folder / "a", "[apps.chat]")
    assert load("chat", start=below).file == beside
    assert load().file == outer


def test_mistakes_in_pyproject_name_its_own_tables(folder: Path) -> None:
    file = write(folder, "[tool.stablegen]\npolicy = 'single'", "pyproject.toml")
    assert message() == (
        f"unknown key 'policy' in {file}. Accepted: [tool.stablegen.defaults], [tool.stablegen.apps.NAME]. "
        "Write it into [tool.stablegen.defaults]."
    )
    write(folder, "[tool]\nstablegen = 3", "pyproject.toml")
    assert message().startswith(f"[tool.stablegen] in {file} is 3. Accepted: a table")


def test_the_environment_may_name_the_file(folder: Path) -> None:
    write(folder, FILE)
    other = write(folder / "etc", "[defaults]\ndtype = 'bfloat16'", "ci.toml")
    effective = load(None, {"STABLEGEN_CONFIG": "etc/ci.toml"})
    assert (effective.file, effective.settings.dtype) == (other, "bfloat16")
    missing = folder / "none.toml"
    assert message(None, {"STABLEGEN_CONFIG": str(missing)}) == (
        f"{missing} (environment STABLEGEN_CONFIG) cannot be read: No such file or directory. "
        "Accepted: a stablegen.toml."
    )
    empty = write(folder, "[project]", "pyproject.toml")
    said = message(None, {"STABLEGEN_CONFIG": str(empty)})
    assert said.startswith(f"{empty} (environment STABLEGEN_CONFIG) has no [tool.stablegen]")


def test_local_paths_start_from_where_they_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    write(
        folder / "app",
        "[defaults]\ncache_dir = '../cache'\nmodel = './m'\n[apps.home]\ncache_dir = '~/c'\nmodel = 'a/b'",
    )
    start = folder / "app"
    settings = load(start=start).settings
    assert (settings.cache_dir, settings.model) == (folder / "cache", str(start / "m"))
    settings = load("home", start=start).settings
    assert (settings.cache_dir, settings.model) == (folder / "home" / "c", "a/b")
    assert load(None, {"STABLEGEN_CACHE_DIR": "c"}, start=start).settings.cache_dir == folder / "c"
    settings = load(start=start, cache_dir=Path("d"), model=Path("./m")).settings
    assert (settings.cache_dir, settings.model) == (folder / "d", str(folder / "m")), "a Path is never a hub id"


def test_settings_are_frozen_and_refuse_mistakes_by_name(folder: Path) -> None:
    write(folder, "[defaults]\ndtype = 'float16'")
    assert Settings(policy="single", size_limit="1KB").model_dump() == BUILT_IN | {
        "policy": "single",
        "size_limit": 1000,
    }
    assert Settings(dtype="float16") == load().settings
    with pytest.raises(ValidationError, match="frozen"):
        Settings().policy = "native"
    with pytest.raises(ConfigError, match=r"dtype = 'int8' \(argument\)"):
        Settings(dtype="int8")
    with pytest.raises(TypeError):
        load().origins["policy"] = "argument"  # type: ignore[index]


def test_settings_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from stablegen.config import Settings; Settings(policy='single');"
        "sys.exit(', '.join({'torch', 'transformers'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
