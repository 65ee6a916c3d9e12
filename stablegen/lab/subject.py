"""The model that an experiment runs: a checkpoint's, or GPT-2 small with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stablegen.core.policy import Native
from stablegen.engine.loading import load_engine
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.machine.device import Device
from stablegen.machine.plan import numerics_on
from stablegen.sources.checkpoint import Checkpoint

RANDOM = "gpt2-small, random weights"
DTYPES = {"cuda": ("float32", "float16", "bfloat16"), "cpu": ("float32", "bfloat16")}
"""What an experiment runs in where the user names no dtype, by device."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that all arms run: transformers' own object, on its device and in its dtype.

    ``context`` and ``vocabulary`` in tokens.
    """

    model: Any
    dtype: str
    device: Device
    context: int
    vocabulary: int


def load_subject(checkpoint: Checkpoint | None, device: Device, dtype: str) -> Subject:
    """Return a checkpoint's model on the device, or GPT-2 small with random weights where there is none."""
    from transformers import GenerationConfig

    if checkpoint is None:
        model = _random_model().to(device=device.name, dtype=getattr(torch, dtype))
        context = random_context()
    else:
        engine = load_engine(checkpoint, numerics_on(device, Native(), dtype), device.name)
        assert isinstance(engine, TransformersEngine)
        model, context = engine.model, checkpoint.context
    # without an end token every answer has the length that was asked for
    model.generation_config = GenerationConfig(pad_token_id=0)
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
