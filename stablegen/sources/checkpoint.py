"""Where a model's files are and which model they hold, found without torch.

A name is a local directory, a hub repository, or None for ``tiny-gpt2``, which ships inside this package.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stablegen.core.config import context_of, is_count, token_ids
from stablegen.core.numerics import Numerics
from stablegen.core.policy import ExecutionPolicy
from stablegen.core.request import ModelIdentity
from stablegen.engine.base import Engine
from stablegen.errors import CheckpointError
from stablegen.machine.digests import DigestMemory
from stablegen.machine.plan import allows_static_cache, find_device, numerics_on
from stablegen.sources.base import Source
from stablegen.sources.files import read_json, weight_files
from stablegen.sources.hub import download
from stablegen.tokenizer import Tokenizer

EMBEDDED = "tiny-gpt2"


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


def open_checkpoint(model: str | Path | None, revision: str | None, memory: DigestMemory) -> Checkpoint:
    """Return the checkpoint that ``model`` names: a directory, a hub repository, or None for the embedded model.

    Raises ``CheckpointError`` where a file is missing or damaged, ``HubError`` where a download fails.
    """
    if model is None or model == EMBEDDED:
        return _read(Path(__file__).parent.parent / "models" / EMBEDDED, None, EMBEDDED, memory)
    text = str(model).encode("utf-8", "replace").decode()  # the record's JSON must be valid Unicode
    path = Path(model).expanduser()
    if isinstance(model, Path) or path.is_dir() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        if not path.is_dir():
            raise CheckpointError(
                f"there is no model directory {text}",
                accepted="a directory with config.json, tokenizer.json and *.safetensors, or a hub name such as 'gpt2'",
            )
        return _read(path, None, text, memory)
    directory = download(text, revision)
    return _read(directory, directory.name, text, memory)


def _read(directory: Path, commit: str | None, name: str, memory: DigestMemory) -> Checkpoint:
    weights = weight_files(directory)
    missing = [file for file in ("config.json", "tokenizer.json") if not (directory / file).is_file()]
    if missing or not weights:
        raise CheckpointError(
            f"the model directory {directory} lacks {', '.join(missing + ([] if weights else ['*.safetensors']))}",
            accepted="config.json, tokenizer.json and weights as *.safetensors",
            hint="Save the model with save_pretrained() and its fast tokenizer beside it",
        )
    config = read_json(directory / "config.json")
    if not is_count(config.get("vocab_size")) or "model_type" not in config:
        raise CheckpointError(
            f"{directory / 'config.json'} does not describe a causal language model",
            accepted="a configuration with a model_type, and a vocab_size of at least 1",
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


class CheckpointSource(Source):
    """A checkpoint on disk; nothing of it is loaded until its engine starts.

    ``kv_cache_size``: the bytes that keys and values may take under batch-invariant engines (None: their default).
    """

    def __init__(
        self, checkpoint: Checkpoint, digests: DigestMemory | None = None, *, kv_cache_size: int | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self._digests = digests or DigestMemory(None)
        self.tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file, self._digests.digest(checkpoint.tokenizer_file))
        self._kv_cache_size = kv_cache_size
        # by policy, dtype and device setting: the numerics, and torch's name of the device
        self._plans: dict[tuple[ExecutionPolicy, str, str], tuple[Numerics, str]] = {}
        self._passthrough: Any = None

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        revision: str | None = None,
        *,
        digests: DigestMemory | None = None,
        kv_cache_size: int | None = None,
    ) -> CheckpointSource:
        """Return the source that ``model`` names: a directory, a hub repository, or None for the embedded model.

        ``digests`` remembers the digests of files. Raises ``CheckpointError`` or ``HubError``.
        """
        digests = digests or DigestMemory(None)
        return cls(open_checkpoint(model, revision, digests), digests, kv_cache_size=kv_cache_size)

    @property
    def directory(self) -> Path:
        """Return where its files are."""
        return self.checkpoint.directory

    @property
    def identity(self) -> ModelIdentity:
        """Return the identity of the weights at the time it was opened."""
        return self.checkpoint.identity

    @property
    def context(self) -> int:
        """Return the longest sequence in tokens."""
        return self.checkpoint.context

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids."""
        return self.checkpoint.vocabulary

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer unless the caller names others."""
        return self.checkpoint.eos_token_ids

    def plan(self, policy: ExecutionPolicy, dtype: str, device: str) -> Numerics:
        """Return the numerics of a policy and dtype on a device, planned once and without importing torch."""
        known = self._plans.get((policy, dtype, device))
        if known is None:
            self.check(policy)
            found = find_device(device, dtype)
            numerics = numerics_on(found, policy, dtype, static_cache=allows_static_cache(self.config))
            known = self._plans.setdefault((policy, dtype, device), (numerics, found.name))
        return known[0]

    def start(self, numerics: Numerics) -> Engine:
        """Load the weights on the device that was planned for; raise ``CheckpointError`` where files have changed."""
        from stablegen.engine.loading import make_engine_from_files

        engine = make_engine_from_files(
            self.directory,
            weight_files(self.directory),
            self.config,
            numerics,
            self._device_of(numerics),
            context=self.context,
            kv_cache_size=self._kv_cache_size,
            tokenizer=self.tokenizer,
            name=self.identity.name,
        )
        if self.identity.source == "digest":
            now = open_checkpoint(self.directory, None, self._digests).identity
            if now.identity != self.identity.identity:
                engine.close()
                raise CheckpointError(
                    f"the model in {self.directory} was changed since this client was made", hint="Make a new client"
                )
        return engine

    def resolver(self) -> Any:
        """Return the checkpoint's model without its weights."""
        from stablegen.engine.transformers.skeleton import skeleton_of

        return skeleton_of(self.directory)

    def passthrough(self, numerics: Numerics) -> Any:
        """Return the checkpoint's transformers model, loaded at the first call."""
        if self._passthrough is None:
            import torch

            from stablegen.engine.loading import load_model, torch_device

            device = torch_device(self._device_of(numerics))
            self._passthrough = load_model(self.directory, getattr(torch, numerics.dtype), device)
        return self._passthrough

    def _device_of(self, numerics: Numerics) -> str:
        """Return the device that numerics were planned for; two devices of one model have equal ones."""
        for known, name in list(self._plans.values()):
            if known is numerics:
                return name
        return numerics.device

    def close(self) -> None:
        """Release the model that calls were passed through to."""
        self._passthrough = None
