"""The files of a checkpoint's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stablegen.errors import CheckpointError


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
            raise CheckpointError(
                f"the model directory {directory} lacks {', '.join(absent)}", hint="Save or download the model again"
            )
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
