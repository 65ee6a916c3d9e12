"""Between transformers and stablegen: a loaded model as a source, ``generate``'s arguments as requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from stablegen.checkpoint import context_of, token_ids
from stablegen.engine.base import Engine
from stablegen.engine.loading import wrap_model
from stablegen.engine.weights import alignment_of
from stablegen.errors import AttentionMaskError, ModelError, PromptError, UnsupportedParameterError
from stablegen.numerics import Numerics
from stablegen.record import Completion
from stablegen.request import ModelIdentity

if TYPE_CHECKING:
    from stablegen.client import Client

DEFAULT_NEW_TOKENS = 20
"""What transformers' ``generate`` makes where the caller and the model name no length."""
_ID_DTYPES = (torch.int64, torch.int32)
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

    def start(self, numerics: Numerics, kv_cache_size: int | None = None) -> Engine:
        """Return the engine around the model."""
        return wrap_model(self.model, numerics, self.context, kv_cache_size)


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


@dataclass
class StableGenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers is untyped here
    """Transformers' output, with the completions (records, verdicts) of its rows."""

    completions: Sequence[Completion] | None = None


def generate(
    client: Client,
    inputs: torch.Tensor | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    pad_token_id: int | None = None,
    do_sample: bool | None = None,
    return_dict_in_generate: bool = False,
    **arguments: Any,
) -> torch.Tensor | StableGenerateOutput:
    """Return ids [B, prompt + new], or an output with ``sequences`` and ``completions``, as transformers would.

    Rows may be padded on either side, as their mask says; padding is kept in the result and never seen by the model.
    Shorter answers are filled with ``pad_token_id``, or the model's end token.
    """
    if inputs is not None and input_ids is not None:
        raise PromptError("generate was given both inputs and input_ids", accepted="one of them")
    ids, mask = _check_inputs(inputs if inputs is not None else input_ids, attention_mask)
    if do_sample:
        raise UnsupportedParameterError(
            "do_sample=True is not supported by this version", accepted="do_sample=False", hint="Decoding is greedy"
        )
    arguments.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    requests = [
        client.make_request(row[keep].tolist(), arguments) for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)
    ]
    completions = client.run(requests)
    if pad_token_id is None:
        ends = requests[0].params.eos_token_ids
        pad_token_id = ends[0] if ends else 0
    longest = max(len(completion.token_ids) for completion in completions)
    answers = torch.full((len(ids), longest), pad_token_id, dtype=torch.int64)
    for row, completion in enumerate(completions):
        answers[row, : len(completion.token_ids)] = torch.tensor(completion.token_ids)
    sequences = torch.cat([ids, answers.to(ids.device)], dim=1)
    if not return_dict_in_generate:
        return sequences
    return StableGenerateOutput(sequences=sequences, completions=completions)


def _check_inputs(ids: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in _ID_DTYPES or ids.numel() == 0:
        is_tensor = isinstance(ids, torch.Tensor)
        given = f"a tensor of shape {tuple(ids.shape)} and {ids.dtype}" if is_tensor else type(ids).__name__
        raise PromptError(f"generate was given {given}", accepted="input_ids [B, S], a LongTensor with at least one id")
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise AttentionMaskError(f"the attention mask has {given}, the ids {tuple(ids.shape)}", accepted="equal shapes")
    keep = mask != 0
    for row in range(len(ids)):
        places = keep[row].nonzero().flatten()
        if len(places) == 0:
            raise AttentionMaskError(f"row {row} of the attention mask is empty", accepted="at least one token a row")
        if int(places[-1] - places[0]) + 1 != len(places):
            raise AttentionMaskError(
                f"row {row} of the attention mask has holes",
                accepted="one run of ones a row, padded on either side",
                hint="Remove the masked tokens from inside the prompt",
            )
    return ids, keep
