"""Values read from a model's configuration, with named errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablegen.errors import CheckpointError


def context_of(config: Mapping[str, Any]) -> int:
    """Return the longest sequence in tokens that a configuration allows."""
    names = ("n_positions", "max_position_embeddings", "n_ctx", "max_sequence_length")
    for name in names:
        if is_count(config.get(name)):
            return int(config[name])
    raise CheckpointError(
        "the model's configuration does not say how long its context is", accepted=f"one of {', '.join(names)}"
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
