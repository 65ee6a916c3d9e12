"""The model that an experiment runs: a checkpoint's, or GPT-2 small with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stablegen.engine.loading import load_model, torch_device
from stablegen.errors import DeviceMemoryError
from stablegen.machine.device import Device
from stablegen.sources.checkpoint import CheckpointSource

RANDOM = "gpt2-small, random weights"
DTYPES = {"cuda": ("float32", "float16", "bfloat16"), "cpu": ("float32", "bfloat16")}
"""The dtypes of an experiment where the user names none, by device."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The transformers model that an experiment measures, on its device and in its dtype.

    ``context`` and ``vocabulary`` in tokens.
    """

    model: Any
    dtype: str
    device: Device
    context: int
    vocabulary: int

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the model's configuration."""
        found: dict[str, Any] = self.model.config.to_dict()
        return found


def load_subject(source: CheckpointSource | None, device: Device, dtype: str) -> Subject:
    """Return a checkpoint's model on the device, or GPT-2 small with random weights if ``source`` is None.

    Raises ``CheckpointError`` for weights that are not whole, ``DeviceMemoryError`` where they do not fit.
    """
    from transformers import GenerationConfig

    try:
        if source is None:
            model = _random_model().to(device=device.name, dtype=getattr(torch, dtype))
        else:
            model = load_model(source.directory, getattr(torch, dtype), torch_device(device.name))
    except torch.OutOfMemoryError as error:
        name = RANDOM if source is None else source.identity.name
        raise DeviceMemoryError(
            f"the model {name} did not fit into the memory of {device.name}",
            hint="Use a 16-bit dtype, a smaller model or another device",
        ) from error
    # without an end token every answer has the length that was asked for
    model.generation_config = GenerationConfig(pad_token_id=0)
    context = random_context() if source is None else source.context
    return Subject(model.eval(), dtype, device, context, int(model.config.vocab_size))


def random_context() -> int:
    """Return the longest sequence of GPT-2 small in tokens."""
    from transformers import GPT2Config

    return int(GPT2Config().n_positions)


def _random_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config())
