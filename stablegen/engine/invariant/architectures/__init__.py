"""Which models the batch-invariant engine computes, known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablegen.core.config import is_count
from stablegen.errors import CheckpointError, PolicyError

_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")


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
