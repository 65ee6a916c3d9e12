"""A transformers model that the caller has loaded, as what a client asks about and computes with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from stablegen.core.config import context_of, token_ids
from stablegen.core.numerics import Numerics
from stablegen.core.request import ModelIdentity
from stablegen.engine.base import Engine
from stablegen.engine.loading import wrap_model
from stablegen.engine.weights import alignment_of
from stablegen.errors import ModelError
from stablegen.tokenizer import Tokenizer

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class LoadedModel:
    """A causal language model of transformers that the caller has loaded; identified by its weights' bits."""

    def __init__(self, model: Any) -> None:
        if not (hasattr(model, "config") and hasattr(model, "generate") and hasattr(model, "state_dict")):
            raise ModelError(
                f"a model of type {type(model).__name__} is not a transformers model",
                accepted="a causal language model such as AutoModelForCausalLM gives",
                hint="For a name or a directory use Client.from_pretrained",
            )
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"{type(model).__name__} is an encoder-decoder model", accepted="a causal language model, decoder only"
            )
        if model.training:
            raise ModelError("the model is in training mode, where dropout is random", hint="Call model.eval()")
        self.model = model
        self._fingerprint: tuple[object, ...] = ()
        self._identity: ModelIdentity | None = None

    @property
    def identity(self) -> ModelIdentity:
        """Return the digest of weights and configuration, taken again where a weight was changed in place.

        A change is seen by torch's count of changes to each tensor, and, for what that misses (``.data``), by an
        exact sum over its bits: a pass over the weights. Values that change places through ``.data`` are not seen.
        """
        state = self.model.state_dict(keep_vars=True)
        sums = torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in state.values()])
        versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in state.values())
        fingerprint = (versions, tuple(sums.tolist()), repr(self.config))
        if self._identity is None or fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._identity = ModelIdentity(
                source="digest", digest=_digest(state, self.config), name=str(self.model.config._name_or_path)
            )
        return self._identity

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the model's configuration as it is now."""
        return dict(self.model.config.to_dict())

    @property
    def context(self) -> int:
        """Return the longest sequence in tokens."""
        return context_of(self.config)

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids."""
        return int(self.model.config.vocab_size)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer, by the model's generation configuration."""
        return token_ids(self.model.generation_config.eos_token_id)

    @property
    def dtype(self) -> str:
        """Return the dtype the model computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """Return torch's name of the device the model is on."""
        return str(self.model.device)

    @property
    def alignment(self) -> str | None:
        """Return what stands in ``Numerics`` for weights that do not lie on 64-byte boundaries."""
        return alignment_of(self.model)

    @property
    def attention(self) -> str:
        """Return the model's attention implementation."""
        return str(self.model.config._attn_implementation)

    def start(self, numerics: Numerics, kv_cache_size: int | None = None, tokenizer: Tokenizer | None = None) -> Engine:
        """Return the engine around the model."""
        return wrap_model(self.model, numerics, self.context, kv_cache_size, tokenizer)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(-1).view(width)


def _digest(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    known = {name: value for name, value in config.items() if name not in _VOLATILE}
    total = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        if not torch.isfinite(tensor).all():
            raise ModelError(f"the model's weights hold NaN or infinity: {name}", hint="Load it again")
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_bits(tensor).numpy().data)
    return total.hexdigest()
