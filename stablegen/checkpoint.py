"""Where a model's files are and which model they hold, found without torch.

A name is a local directory, a hub repository, or None for ``tiny-gpt2``, which ships inside this package.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablegen.errors import CheckpointError, HubError, PolicyError
from stablegen.request import ModelIdentity

EMBEDDED = "tiny-gpt2"
_PATTERNS = ["*.json", "*.safetensors"]
_ATTEMPTS = 4
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2")
_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk: its directory, what ``config.json`` says, and the model's identity."""

    directory: Path
    config: dict[str, Any]
    identity: ModelIdentity
    eos_token_ids: tuple[int, ...]

    @property
    def tokenizer_file(self) -> Path:
        """Return the path of ``tokenizer.json``."""
        return self.directory / "tokenizer.json"

    @property
    def context(self) -> int:
        """Return the longest sequence in tokens."""
        return context_of(self.config)

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids."""
        return int(self.config["vocab_size"])


class DigestMemory:
    """SHA-256 of files, remembered by path, size and modification time in one JSON file.

    A memory that cannot be read or written costs time, not correctness.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                loaded = json.loads(path.read_text(encoding="utf-8"))
                self._known = {str(k): str(v) for k, v in loaded.items()}
            except (OSError, ValueError, AttributeError):
                self._known = {}

    def digest(self, file: Path) -> str:
        """Return a file's SHA-256 in hexadecimal."""
        stat = file.stat()
        name = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if name not in self._known:
            with file.open("rb") as stream:
                self._known[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            self._save()
        return self._known[name]

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            draft.write_text(json.dumps(self._known), encoding="utf-8")
            draft.replace(self._path)
        except OSError:
            return


def open_checkpoint(model: str | Path | None, revision: str | None, memory: DigestMemory) -> Checkpoint:
    """Return the checkpoint that ``model`` names: a directory, a hub repository, or None for the embedded model.

    Raises ``CheckpointError`` where a file is missing or damaged, ``HubError`` where a download fails.
    """
    if model is None or model == EMBEDDED:
        return _read(Path(__file__).parent / "models" / EMBEDDED, None, EMBEDDED, memory)
    text = str(model).encode("utf-8", "replace").decode()  # a file name need not be text; the record's JSON is
    path = Path(model).expanduser()
    if isinstance(model, Path) or path.is_dir() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        if not path.is_dir():
            raise CheckpointError(
                f"there is no model directory {text}",
                accepted="a directory with config.json, tokenizer.json and *.safetensors, or a hub name such as 'gpt2'",
            )
        return _read(path, None, text, memory)
    directory = _from_hub(text, revision)
    return _read(directory, directory.name, text, memory)


def _read(directory: Path, commit: str | None, name: str, memory: DigestMemory) -> Checkpoint:
    weights = weight_files(directory)
    missing = [file for file in ("config.json", "tokenizer.json") if not (directory / file).is_file()]
    if missing or not weights:
        raise CheckpointError(
            f"the model directory {directory} misses {', '.join(missing + ([] if weights else ['*.safetensors']))}",
            accepted="config.json, tokenizer.json and weights as *.safetensors",
            hint="Save the model with save_pretrained() and its fast tokenizer beside it",
        )
    config = read_json(directory / "config.json")
    if not is_count(config.get("vocab_size")) or "model_type" not in config:
        raise CheckpointError(
            f"{directory / 'config.json'} is not a causal language model's",
            accepted="a model_type, and a vocab_size of at least 1",
        )
    context_of(config)
    if commit is not None:
        identity = ModelIdentity(source="hub", repo=name, commit=commit, name=name)
    else:
        parts = [(file.name, memory.digest(file)) for file in [directory / "config.json", *weights]]
        digest = hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()
        identity = ModelIdentity(source="digest", digest=digest, name=name)
    generation = directory / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    return Checkpoint(directory, config, identity, token_ids(config.get("eos_token_id") if eos is None else eos))


def weight_files(directory: Path) -> list[Path]:
    """Return the checkpoint's safetensors files, in order; raise ``CheckpointError`` where a shard is missing."""
    if (directory / "model.safetensors").is_file():  # transformers too prefers it to shards
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map", hint="Save or download the model again")
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not (directory / shard).is_file()]
        if absent:
            raise CheckpointError(f"the model directory {directory} misses {', '.join(absent)}")
        return [directory / shard for shard in shards]
    return []


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object; raise ``CheckpointError`` where the file does not hold one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def context_of(config: Mapping[str, Any]) -> int:
    """Return the longest sequence in tokens that a configuration allows."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx", "max_sequence_length"):
        if is_count(config.get(name)):
            return int(config[name])
    raise CheckpointError("the model's configuration does not say how long its context is", accepted="n_positions, ...")


def check_invariant(config: Mapping[str, Any]) -> None:
    """Raise ``PolicyError`` for a model that the ``invariant`` engine does not compute."""
    problem = None
    if config.get("model_type") != "gpt2":
        problem = f"the model is {config.get('model_type')!r}, not GPT-2"
    elif config.get("activation_function", "gelu_new") not in _ACTIVATIONS:
        problem = f"the model's activation is {config['activation_function']!r}, not one of {', '.join(_ACTIVATIONS)}"
    elif config.get("add_cross_attention"):
        problem = "the model has cross-attention"
    elif odd := [name for name in ("n_embd", "n_head", "n_layer", "n_positions") if not is_count(config.get(name))]:
        raise CheckpointError(
            f"the model's config.json has no usable {', '.join(odd)}", accepted="whole numbers from 1"
        )
    if problem is not None:
        raise PolicyError(
            f"policy 'invariant' cannot run this model: {problem}",
            accepted="'single', 'padded:N' or 'native' for this model",
        )


def token_ids(value: object) -> tuple[int, ...]:
    """Return one id, several or none as a sorted tuple; raise ``CheckpointError`` for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and index >= 0 for index in ids):
        raise CheckpointError(f"the model's eos_token_id is {value!r}", accepted="a token id, or a list of token ids")
    return tuple(sorted(set(ids)))


def is_count(value: object) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def download(*, offline: bool) -> Path:
        found = snapshot_download(repo, revision=revision, allow_patterns=_PATTERNS, local_files_only=offline)
        return Path(found)

    try:
        directory = download(offline=True)
        if weight_files(directory) and all((directory / f).is_file() for f in ("config.json", "tokenizer.json")):
            return directory
    except (LocalEntryNotFoundError, CheckpointError):
        pass
    except HFValidationError as error:
        raise HubError(f"{repo!r} is neither a directory nor a hub name", accepted="'gpt2', 'owner/name'") from error
    try:
        return with_retries(lambda: download(offline=False))
    except Exception as error:  # the hub client raises its HTTP library's exceptions as well as its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = "" if revision is None else f" at revision {revision}"
        raise HubError(
            f"the model {repo!r}{at} could not be had from the hub: {reason}",
            hint=f"Check name, revision and network. Offline: download it elsewhere (`hf download {repo}`) and pass "
            "its directory, or use the embedded model by naming none",
        ) from error


def with_retries(action: Callable[[], Path]) -> Path:
    """Run a download, up to four times where the network failed, with growing pauses."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    retrying = Retrying(
        retry=retry_if_exception(is_network_error),
        wait=wait_random_exponential(multiplier=0.5, max=8.0),
        stop=stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )
    return retrying(action)


def is_network_error(error: BaseException) -> bool:
    """Return whether trying again may help: connections, timeouts and server errors, not 401 or 404.

    The hub client wraps what its HTTP library raised, so the error's causes are asked too.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    transport = any(kind.__module__.split(".")[0] in _TRANSPORTS for kind in type(error).__mro__)
    if transport or isinstance(error, ConnectionError | TimeoutError):
        return True
    return error.__cause__ is not None and is_network_error(error.__cause__)
