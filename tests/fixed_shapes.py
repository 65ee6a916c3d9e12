"""Small models with random weights, and requests for them: what the tests of fixed shapes share on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
from engines import Answer, make_ids, make_request, run

from stablegen.core.policy import Batch, Shape, load_policy
from stablegen.core.request import Request
from stablegen.engine.base import Engine
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.machine.plan import STATIC_ENGINE_VERSION, allows_static_cache, find_device, numerics_on

VOCABULARY = 211
CONTEXT = 96
STATIC = {"engine": "transformers", "engine_version": STATIC_ENGINE_VERSION, "attention": "sdpa", "static": True}
"""What numerics say of a KV cache of fixed length."""


def small_model(kind: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """Return a model of an architecture with few random weights, large enough to make attention choose."""
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, initializer_range=0.3, **sizes, **ids
    )
    if kind in ("llama", "qwen2", "qwen3"):
        config.num_key_value_heads = 2
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval().to(device=device, dtype=getattr(torch, dtype))


def static_engine(model: Any, policy: str, context: int = CONTEXT, *, graphs: bool = True) -> TransformersEngine:
    """Return an engine over a KV cache of fixed length; a CPU's is told to have one."""
    dtype = str(model.dtype).removeprefix("torch.")
    device = find_device(str(model.device), dtype)
    allowed = allows_static_cache(model.config.to_dict())
    planned = numerics_on(device, load_policy(policy), dtype, static_cache=allowed)
    if not device.is_cuda:
        planned = planned.model_copy(update=STATIC)
    assert {name: getattr(planned, name) for name in STATIC} == STATIC
    return TransformersEngine(model, planned, context=context, graphs=graphs)


def asked(seed: int, length: int, steps: int, *, vocabulary: int = VOCABULARY, **params: Any) -> Request:
    """Return a request with a random prompt."""
    made = make_request(make_ids(seed, length, vocabulary), steps)
    return Request(made.prompt_ids, made.params.model_copy(update=params), made.model, made.tokenizer)


def alone(engine: Engine, one: Request, capacity: int | None = None) -> Answer:
    """Return the answer of a request in a batch of its own."""
    return run(engine, Batch((one,), Shape(None, capacity)))[0]
