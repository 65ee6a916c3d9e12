"""Where a model comes from: the package, a directory, the hub; and what each is told that is not whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import TINY, client, save, small_directory, small_gpt2

from stablegen.errors import CheckpointError, HubError, ModelError, NonFiniteScoresError, PolicyError
from stablegen.machine.digests import DigestMemory
from stablegen.sources.checkpoint import open_checkpoint
from stablegen.sources.files import weight_files
from stablegen.sources.hub import is_network_error, with_retries
from stablegen.tokenizer import Tokenizer

NONE = DigestMemory(None)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a whole checkpoint that a test may damage."""
    return Path(shutil.copytree(small_directory(), tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def edit_weights(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def run(directory: Path, cache: Path, policy: str = "single", **settings: Any) -> Any:
    with client(cache, model=directory, policy=policy, **settings) as asking:
        return asking.complete("Hello", max_new_tokens=2)


# -- whole ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "tiny-gpt2"])
def test_the_embedded_model(name: str | None) -> None:
    found = open_checkpoint(name, None, NONE)
    assert (found.directory, found.context, found.vocabulary, found.eos_token_ids) == (TINY, 1024, 4096, (0,))
    assert found.identity.source == "digest"
    assert found.tokenizer_file.is_file()


@pytest.mark.parametrize("spelling", [str, Path])
def test_a_directory(spelling: Callable[[Path], Any], directory: Path) -> None:
    found = open_checkpoint(spelling(directory), None, NONE)
    assert (found.directory, found.context) == (directory, 256)


def test_a_relative_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    assert open_checkpoint("model", None, NONE).context == open_checkpoint("./model", None, NONE).context == 256


def test_the_identity_is_of_weights_and_configuration_alone(directory: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str | None:
        return open_checkpoint(path, None, NONE).identity.digest

    first = digest(directory)
    copy = Path(shutil.copytree(directory, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("x")
    assert digest(copy) == first
    edit_weights(copy, lambda tensors: tensors["transformer.ln_f.bias"].add_(1))
    assert digest(copy) != first
    edit_config(directory, n_head=4)
    assert digest(directory) != first


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    sharded = save(small_gpt2(), tmp_path / "sharded", max_shard_size="200KB")
    assert len(weight_files(sharded)) > 1
    for policy in ("single", "invariant"):
        whole = run(small_directory(), tmp_path / "cache", policy)
        parts = run(sharded, tmp_path / "cache", policy)
        assert parts.key != whole.key
        assert parts.trace == whole.trace


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 5, 7]}, 3, (5, 7)),
        ({"eos_token_id": 5}, 3, (5,)),
        ({}, 3, (3,)),
        (None, 3, (3,)),
        (None, None, ()),
    ],
)
def test_end_tokens(generation: Any, config: Any, ends: tuple[int, ...], directory: Path) -> None:
    edit_config(directory, eos_token_id=config)
    (directory / "generation_config.json").unlink()
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    assert open_checkpoint(directory, None, NONE).eos_token_ids == ends


# -- damaged ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(file: str, directory: Path) -> None:
    (directory / file).unlink()
    with pytest.raises(CheckpointError, match=f"{directory} lacks .*{file.removeprefix('model')}.*save_pretrained"):
        open_checkpoint(directory, None, NONE)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = save(small_gpt2(), tmp_path / "sharded", max_shard_size="200KB")
    gone = weight_files(sharded)[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {gone.name}"):
        open_checkpoint(sharded, None, NONE)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("nowhere")])
def test_a_directory_that_is_not_there(name: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory .*a directory with config\.json.*hub name"):
        open_checkpoint(name, None, NONE)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "{", r"config\.json cannot be read"),
        ("config.json", "[]", "does not hold a JSON object"),
        ("config.json", "{}", "vocab_size"),
        ("generation_config.json", "{", r"generation_config\.json cannot be read"),
        ("model.safetensors.index.json", '{"weight_map": []}', r"index\.json"),
    ],
)
def test_damaged_json_is_named(file: str, content: str, told: str, directory: Path) -> None:
    if file == "model.safetensors.index.json":
        (directory / "model.safetensors").unlink()
    (directory / file).write_text(content)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(directory, None, NONE)


def test_one_file_of_weights_is_preferred_to_shards(directory: Path) -> None:
    # as transformers does: the key must be that of the weights that run
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    assert [file.name for file in weight_files(directory)] == ["model.safetensors"]


@pytest.mark.parametrize("policy", ["single", "invariant"])
def test_weights_replaced_before_they_are_loaded_are_noticed(policy: str, directory: Path, tmp_path: Path) -> None:
    with client(tmp_path / "cache", model=directory, policy=policy) as asking:
        save(small_gpt2(initializer_range=0.5), directory)
        with pytest.raises(CheckpointError, match="was changed since this client was made"):
            asking.complete("Hello", max_new_tokens=2)
        assert list(asking.cache.records()) == []


@pytest.mark.parametrize("changes", [{"n_head": None}, {"n_head": 0}, {"n_head": "x"}, {"n_layer": 1.5}])
def test_a_configuration_that_makes_no_sense_is_named(changes: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    edit_config(directory, **changes)
    with pytest.raises(CheckpointError, match=f"no usable {next(iter(changes))}"):
        run(directory, tmp_path / "cache", "invariant")


@pytest.mark.parametrize("ends", [[[1]], "x", -1])
def test_end_tokens_that_are_none_are_named(ends: Any, directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"eos_token_id is .*Accepted: a token id"):
        open_checkpoint(directory, None, NONE)


def test_a_tokenizer_that_cuts_and_pads_does_neither(directory: Path) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))
    assert len(Tokenizer.from_file(file, "").encode("one two three four five six seven")) > 4


@pytest.mark.parametrize("content", ["{", "{}", "\0"])
def test_a_damaged_tokenizer_is_named(content: str, directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        run(directory, tmp_path / "cache")


@pytest.mark.parametrize("policy", ["single", "invariant"])
class TestWeights:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value: float, policy: str, directory: Path, tmp_path: Path) -> None:
        edit_weights(directory, lambda tensors: tensors["transformer.h.1.ln_1.bias"][3:4].fill_(value))
        with pytest.raises(CheckpointError, match=r"NaN or infinity: .*h\.1\.ln_1\.bias"):
            run(directory, tmp_path / "cache", policy)

    @pytest.mark.parametrize("size", [0, 7, 5000])
    def test_cut_short(self, size: int, policy: str, directory: Path, tmp_path: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"cannot be (read|loaded)"):
            run(directory, tmp_path / "cache", policy)

    def test_a_missing_tensor(self, policy: str, directory: Path, tmp_path: Path) -> None:
        edit_weights(directory, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
        with pytest.raises(CheckpointError, match=r"no (tensor|weights for) .*h\.1\.mlp\.c_fc\.weight"):
            run(directory, tmp_path / "cache", policy)

    @pytest.mark.parametrize("changes", [{"n_embd": 64}, {"n_head": 3}, {"n_layer": 3}, {"vocab_size": 5000}], ids=str)
    def test_a_configuration_of_other_weights(
        self, changes: dict[str, int], policy: str, directory: Path, tmp_path: Path
    ) -> None:
        edit_config(directory, **changes)
        with pytest.raises(ModelError):
            run(directory, tmp_path / "cache", policy)

    def test_weights_the_dtype_cannot_hold(self, policy: str, directory: Path, tmp_path: Path) -> None:
        edit_weights(directory, lambda tensors: tensors["transformer.ln_f.weight"].fill_(1e6))
        with pytest.raises((CheckpointError, NonFiniteScoresError), match="dtype"):
            run(directory, tmp_path / "cache", policy, dtype="float16")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"activation_function": "relu"}, "'relu', not one of gelu_new"),
        ({"model_type": "gpt_neo"}, "'gpt_neo', not GPT-2"),
        ({"add_cross_attention": True}, "cross-attention"),
    ],
    ids=["relu", "gpt_neo", "cross"],
)
def test_what_invariant_does_not_compute(changes: dict[str, Any], told: str, directory: Path, tmp_path: Path) -> None:
    edit_config(directory, **changes)
    with pytest.raises(PolicyError, match=f"policy 'invariant' cannot run this model.*{told}.*'single', 'padded:N'"):
        client(tmp_path / "cache", model=directory, policy="invariant")


def test_a_configuration_without_a_context(directory: Path, tmp_path: Path) -> None:
    edit_config(directory, n_positions="gone")
    with pytest.raises(CheckpointError, match="how long its context is"):
        run(directory, tmp_path / "cache", "invariant")


# -- digests, remembered -----------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    real, count = hashlib.file_digest, [0]

    def counting(*arguments: Any) -> Any:
        count[0] += 1
        return real(*arguments)

    monkeypatch.setattr("stablegen.sources.checkpoint.hashlib.file_digest", counting)
    return count  # type: ignore[return-value]


def test_a_digest_is_taken_once(tmp_path: Path, hashed: list[int]) -> None:
    file, kept = tmp_path / "file", tmp_path / "new" / "digests.json"
    file.write_bytes(b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    assert [DigestMemory(kept).digest(file) for _ in range(3)] == [expected] * 3
    assert hashed == [1]


def test_a_digest_is_taken_again_where_size_or_time_changed(tmp_path: Path, hashed: list[int]) -> None:
    file, memory = tmp_path / "file", DigestMemory(tmp_path / "digests.json")
    file.write_bytes(b"content")
    memory.digest(file)
    stat = file.stat()
    file.write_bytes(b"changed")  # as long, but later
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert memory.digest(file) == hashlib.sha256(b"changed").hexdigest()
    file.write_bytes(b"longer content")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert memory.digest(file) == hashlib.sha256(b"longer content").hexdigest()
    assert hashed == [3]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff"])
def test_a_damaged_memory_only_costs_time(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_bytes(content)
    file = tmp_path / "file"
    file.write_bytes(b"content")
    assert DigestMemory(tmp_path / "digests.json").digest(file) == hashlib.sha256(b"content").hexdigest()


def test_a_memory_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    memory = DigestMemory(tmp_path / "file" / "digests.json")
    assert memory.digest(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Stand in for ``snapshot_download``: nothing is cached, and each call online does what ``hub`` holds next."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    online: list[Any] = []

    def download(repo: str, *, revision: str | None, allow_patterns: Any, local_files_only: bool) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        outcome = online.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return str(outcome)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    return online


def wrapped(cause: BaseException) -> BaseException:
    """Return a network error as ``snapshot_download`` raises it: as a missing local entry, with its cause."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    error = LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub")
    error.__cause__ = cause
    return error


def http(status: int) -> BaseException:
    class ServerError(Exception):
        response = type("Response", (), {"status_code": status})()

    return ServerError(f"{status} Server Error")


def transport() -> BaseException:
    name = "httpx2" if find_spec("httpx2") else "httpx"
    error: BaseException = import_module(name).ConnectError("no route")
    return error


FAILURES: dict[str, Callable[[], BaseException]] = {
    "connection": ConnectionError,
    "timeout": TimeoutError,
    "transport": transport,
    "503": lambda: http(503),
    "429": lambda: http(429),
    "wrapped transport": lambda: wrapped(transport()),
    "wrapped connection": lambda: wrapped(ConnectionError()),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_network_error_is_tried_again(failure: str, hub: list[Any], directory: Path) -> None:
    commit = Path(shutil.copytree(directory, directory.parent / ("c" * 40)))
    hub.extend([FAILURES[failure](), FAILURES[failure](), commit])
    found = open_checkpoint("owner/name", None, NONE)
    assert hub == []
    assert (found.identity.source, found.identity.repo, found.identity.commit) == ("hub", "owner/name", "c" * 40)


@pytest.mark.parametrize("failure", [lambda: http(404), lambda: http(401), lambda: ValueError("odd")])
def test_other_errors_are_not_tried_again(failure: Callable[[], BaseException], hub: list[Any]) -> None:
    hub.extend([failure(), "never asked for"])
    with pytest.raises(HubError, match="'owner/name' at revision r1 could not be downloaded from the hub"):
        open_checkpoint("owner/name", "r1", NONE)
    assert hub == ["never asked for"]


def test_a_network_that_stays_down(hub: list[Any]) -> None:
    hub.extend(ConnectionError("down") for _ in range(9))
    with pytest.raises(HubError, match=r"gpt2.*: down\..*Offline: .*hf download gpt2.*its directory.*embedded model"):
        open_checkpoint("gpt2", None, NONE)
    assert len(hub) == 5


def test_the_real_hub_client_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # the real client, with every name unknown: what it raises is what has to be retried
    import huggingface_hub

    real, online = huggingface_hub.snapshot_download, []

    def download(*arguments: Any, local_files_only: bool, **named: Any) -> Any:
        online.extend([] if local_files_only else [arguments])
        return real(*arguments, local_files_only=local_files_only, cache_dir=tmp_path, **named)

    def fail(*_arguments: Any, **_named: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HubError, match=r"'gpt2' could not be downloaded.*Offline: download it elsewhere"):
        open_checkpoint("gpt2", None, NONE)
    assert len(online) == 4


def test_a_name_that_is_none() -> None:
    with pytest.raises(HubError, match=r"'not a name!' is neither a directory nor a hub name.*'owner/name'"):
        open_checkpoint("not a name!", None, NONE)


def test_what_is_cached_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    import huggingface_hub

    def download(repo: str, *, local_files_only: bool, **_rest: Any) -> str:
        assert local_files_only
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("owner/name", "main", NONE).directory == directory


def test_retries_wait_longer_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)

    def fail() -> Path:
        raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        with_retries(fail)
    assert len(pauses) == 3
    assert all(0 < pause <= 10 for pause in pauses)


def test_which_errors_are_the_networks() -> None:
    assert is_network_error(http(500))
    assert not is_network_error(http(403))
    assert not is_network_error(KeyError())
