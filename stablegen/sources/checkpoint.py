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
from stablegen.core.request import ModelIdentity
from stablegen.errors import CheckpointError
from stablegen.machine.digests import DigestMemory
from stablegen.sources.files import read_json, weight_files
from stablegen.sources.hub import download

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
    text = str(model).encode("utf-8", "replace").decode()  # a file name need not be text; the record's JSON is
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
