"""A transformers model that the caller has loaded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from typing import Any

import torch

from stablegen.core.config import context_of, token_ids
from stablegen.core.numerics import Numerics
from stablegen.core.policy import ExecutionPolicy
from stablegen.core.request import ModelIdentity
from stablegen.engine.base import Engine
from stablegen.engine.private import attention_of, name_of
from stablegen.engine.weights import alignment_of
from stablegen.errors import ModelError
from stablegen.machine.plan import allows_static_cache, find_device, numerics_on
from stablegen.sources.base import Source
from stablegen.tokenizer import Tokenizer

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class LiveSource(Source):
    """A causal language model of transformers that the caller has loaded; identified by its weights' bits.

    It computes in the dtype and on the device that the model has. ``kv_cache_size``: as for a checkpoint.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, kv_cache_size: int | None = None) -> None:
        if not (hasattr(model, "config") and hasattr(model, "generate") and hasattr(model, "state_dict")):
            raise ModelError(
                f"a model of type {type(model).__name__} is not a transformers model",
                accepted="a causal language model such as AutoModelForCausalLM returns",
                hint="For a name or a directory, use Client.from_pretrained",
            )
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"{type(model).__name__} is an encoder-decoder model", accepted="a causal language model, decoder only"
            )
        if model.training:
            raise ModelError("the model is in training mode, where dropout is random", hint="Call model.eval()")
        self.model = model
        self.tokenizer = Tokenizer.from_object(tokenizer)
        self.config: Mapping[str, Any] = dict(model.config.to_dict())
        self._kv_cache_size = kv_cache_size
        self._lock = threading.Lock()
        self._fingerprint: tuple[object, ...] = ()
        self._identity: ModelIdentity | None = None
        self._planned: Numerics | None = None

    @property
    def identity(self) -> ModelIdentity:
        """Return the digest of weights and configuration, taken again where a weight was changed in place.

        A change is detected by torch's version counter of each tensor and, for changes through ``.data``, which it
        misses, by an exact sum over the bits: a pass over the weights. Values swapped through ``.data`` go undetected.
        """
        with self._lock:  # nobody is told of the old identity while the new one is taken
            config = dict(self.model.config.to_dict())
            state = self.model.state_dict(keep_vars=True)
            sums = torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in state.values()])
            versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in state.values())
            fingerprint = (versions, tuple(sums.tolist()), repr(config))
            if self._identity is None or fingerprint != self._fingerprint:
                digest = _digest(state, config)  # raises for weights that cannot be used: then nothing is remembered
                self._identity = ModelIdentity(source="digest", digest=digest, name=name_of(self.model.config))
                self._fingerprint, self.config = fingerprint, config
            return self._identity

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

    def plan(self, policy: ExecutionPolicy, dtype: str, device: str) -> Numerics:
        """Return the numerics of a policy in the model's own dtype and on its own device."""
        self.check(policy)
        own = str(self.model.dtype).removeprefix("torch.")
        found = find_device(str(self.model.device), own)
        planned = numerics_on(
            found,
            policy,
            own,
            attention=attention_of(self.model.config),
            alignment=alignment_of(self.model),
            static_cache=found.is_cuda and allows_static_cache(self.config),
        )
        if planned != self._planned:
            self._planned = planned
        return self._planned

    def start(self, numerics: Numerics) -> Engine:
        """Return the engine around the model; batch-invariant ones copy its weights."""
        from stablegen.engine.loading import make_engine_around

        return make_engine_around(
            self.model, numerics, context=self.context, kv_cache_size=self._kv_cache_size, tokenizer=self.tokenizer
        )

    def resolver(self) -> Any:
        """Return the model itself."""
        return self.model

    def passthrough(self, numerics: Numerics) -> Any:
        """Return an object with the ``generate`` of the model's class, even where the model's own was replaced."""
        return _Unwrapped(self.model)


class _Unwrapped:
    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, *arguments: Any, **named: Any) -> Any:
        return type(self._model).generate(self._model, *arguments, **named)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(-1).view(width)


def _digest(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    known = {name: value for name, value in config.items() if name not in _VOLATILE}
    total = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        if not torch.isfinite(tensor).all():
            raise ModelError(f"the model's weights hold NaN or infinity: {name}", hint="Load the model again")
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_bits(tensor).numpy().data)
    return total.hexdigest()
