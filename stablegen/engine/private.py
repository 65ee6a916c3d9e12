"""Every name of transformers that is no part of its documented interface and that this project uses.

Another release may rename or drop any of them. ``missing_names`` says which are gone, and the functions here are the
only places to change. Transformers is imported inside functions: most of this concerns models that are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

_METHODS = (
    "_prepare_generation_config",
    "_validate_model_kwargs",
    "_prepare_special_tokens",
    "_prepare_attention_mask_for_generation",
    "_prepare_generated_length",
    "_validate_generated_length",
)
"""Methods of a model that can generate."""
_CONFIG = ("_attn_implementation", "_name_or_path")
"""Attributes of a model's configuration."""
_PREPARED = ("_pad_token_tensor", "_eos_token_tensor")
"""Attributes of a generation configuration whose special tokens were prepared."""
_STOP_STRINGS = ("embedding_vec", "max_valid_positions", "num_stop_strings")
"""Attributes of a ``StopStringCriteria``."""


def missing_names(model: Any, stop_strings: Any) -> list[str]:
    """Return which of these names a loaded model, and a ``StopStringCriteria``, of this transformers do not have."""
    import torch
    from transformers import cache_utils

    missing = [f"model.{name}" for name in _METHODS if not hasattr(model, name)]
    missing += [f"model.config.{name}" for name in _CONFIG if not hasattr(model.config, name)]
    prepared = deepcopy(model.generation_config)
    if hasattr(model, "_prepare_special_tokens"):
        prepare_special_tokens(model, prepared, torch.zeros(1, 1, dtype=torch.int64), masked=True)
    missing += [f"generation_config.{name}" for name in _PREPARED if not hasattr(prepared, name)]
    missing += [f"StopStringCriteria.{name}" for name in _STOP_STRINGS if not hasattr(stop_strings, name)]
    if not hasattr(cache_utils, "CacheLayerMixin"):
        missing.append("cache_utils.CacheLayerMixin")
    return missing


# --- a model's configuration ------------------------------------------------------------------------------------------


def attention_of(config: Any) -> str:
    """Return the attention implementation that a model's configuration asks for."""
    return str(config._attn_implementation)


def name_of(config: Any) -> str:
    """Return the name or path that a model was loaded from, '' where it was made."""
    return str(config._name_or_path)


# --- what ``generate`` does with its arguments ------------------------------------------------------------------------


def prepare_generation_config(
    model: Any, generation_config: Any, arguments: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the generation configuration of a call of ``generate``, and the arguments that are the model's.

    Raises ``ValueError`` or ``TypeError`` as ``generate`` does.
    """
    config, rest = model._prepare_generation_config(generation_config, **arguments)
    return config, rest


def validate_model_kwargs(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for arguments that the model does not take."""
    model._validate_model_kwargs(dict(arguments))


def prepare_special_tokens(model: Any, config: Any, ids: Any, *, masked: bool) -> None:
    """Keep the special tokens of a generation configuration in it as tensors, for prompts ``ids`` [B, S].

    ``masked``: whether the caller gave an attention mask.
    """
    model._prepare_special_tokens(config, masked, device=ids.device, batch_size=len(ids))


def pad_token(config: Any) -> Any:
    """Return the pad token of a prepared generation configuration, a tensor; None where there is none."""
    return config._pad_token_tensor


def end_tokens(config: Any) -> list[int]:
    """Return the end tokens of a prepared generation configuration."""
    return [] if config._eos_token_tensor is None else list(config._eos_token_tensor.tolist())


def infer_attention_mask(model: Any, ids: Any, config: Any) -> Any:
    """Return the attention mask [B, S] that ``generate`` makes for prompts without one."""
    return model._prepare_attention_mask_for_generation(ids, config, {})


def prepare_lengths(model: Any, config: Any, ids: Any, *, default_max: bool, default_min: bool) -> Any:
    """Return a generation configuration whose lengths count the prompts ``ids`` [B, S].

    ``default_max``, ``default_min``: whether ``max_length`` and ``min_length`` are left at their defaults. Raises
    ``ValueError`` or ``TypeError`` as ``generate`` does.
    """
    width = ids.shape[1]
    config = model._prepare_generated_length(config, default_max, default_min, "input_ids", width, ids)
    model._validate_generated_length(config, width, default_max)
    return config


# --- classes ----------------------------------------------------------------------------------------------------------


def cache_layer_class() -> type[Any]:
    """Return the class that layers of a KV cache are made from."""
    from transformers.cache_utils import CacheLayerMixin

    return CacheLayerMixin  # type: ignore[no-any-return]


def last_tokens(stop_strings: Any) -> frozenset[int]:
    """Return the tokens with which a stop string of a ``StopStringCriteria`` can end."""
    first = stop_strings.max_valid_positions * stop_strings.num_stop_strings
    ends = stop_strings.embedding_vec[:, first:-1] > 0
    return frozenset(ends.any(1).nonzero().flatten().tolist())


def stop_strings_table(stop_strings: Any) -> Any:
    """Return the tensor in which a ``StopStringCriteria`` keeps what it has derived from a vocabulary."""
    return stop_strings.embedding_vec
