"""Make the engine that a policy asks for, from a checkpoint's files or a model already loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Invariant, load_policy
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import GPT2Engine
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.engine.weights import align, alignment_of, check_finite
from stablegen.errors import CheckpointError, DeviceError, DeviceMemoryError
from stablegen.kernels.base import KernelSet
from stablegen.kernels.vendor import VendorKernels
from stablegen.machine.device import Device
from stablegen.machine.plan import allows_static_cache, find_device, numerics_on
from stablegen.sources.checkpoint import Checkpoint
from stablegen.sources.files import weight_files
from stablegen.tokenizer import Tokenizer


def load_engine(
    checkpoint: Checkpoint,
    planned: Numerics,
    device: str,
    kv_cache_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Engine:
    """Return the engine for ``planned`` over a checkpoint's weights, on torch's ``device``.

    Its ``numerics`` are what torch reports. Raises ``CheckpointError`` for weights that are damaged, incomplete or
    not finite, ``DeviceError`` where torch cannot use the device.
    """
    try:
        return _load(checkpoint, planned, torch_device(device), kv_cache_size, tokenizer)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the model {checkpoint.identity.name} did not fit into the memory of {device}",
            hint="Use a 16-bit dtype, a smaller model or another device",
        ) from error


def _load(
    checkpoint: Checkpoint,
    planned: Numerics,
    target: torch.device,
    kv_cache_size: int | None,
    tokenizer: Tokenizer | None,
) -> Engine:
    policy = load_policy(planned.policy)
    dtype = getattr(torch, planned.dtype)
    if isinstance(policy, Invariant):
        tensors = _read_weights(checkpoint)
        model = GPT2(checkpoint.config, tensors, kernels_for(target), dtype=dtype, device=target)
        return GPT2Engine(model, observed(planned, target), kv_cache_size=kv_cache_size, tokenizer=tokenizer)
    loaded = load_transformers(checkpoint, dtype, target)
    static = allows_static_cache(checkpoint.config)
    numerics = observed(planned, target, attention=loaded.config._attn_implementation, static_cache=static)
    return TransformersEngine(loaded, numerics, context=checkpoint.context, tokenizer=tokenizer)


def wrap_model(
    model: Any,
    planned: Numerics,
    context: int,
    kv_cache_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Engine:
    """Return the engine for ``planned`` around a transformers model that is loaded already, where it is."""
    if isinstance(load_policy(planned.policy), Invariant):
        config = model.config.to_dict()
        kernels = kernels_for(model.device)
        own = GPT2(config, model.state_dict(), kernels, dtype=getattr(torch, planned.dtype), device=model.device)
        return GPT2Engine(own, observed(planned, model.device), kv_cache_size=kv_cache_size, tokenizer=tokenizer)
    numerics = observed(
        planned,
        model.device,
        attention=model.config._attn_implementation,
        alignment=alignment_of(model),
        static_cache=allows_static_cache(model.config.to_dict()),
    )
    return TransformersEngine(model, numerics, context=context, tokenizer=tokenizer)


def make_vendor_engine(model: Any, dtype: str, *, reach: int, **settings: Any) -> GPT2Engine:
    """Return the engine of ``invariant`` over a transformers GPT-2, with cuBLAS and SDPA in place of its kernels.

    It promises nothing, and serves to be measured against. ``reach``: positions that a row may have.
    """
    config = model.config.to_dict()
    own = GPT2(config, model.state_dict(), VendorKernels(reach), dtype=getattr(torch, dtype), device=model.device)
    numerics = numerics_on(find_device(str(model.device), dtype), load_policy("native"), dtype)
    return GPT2Engine(own, numerics, **settings)


def kernels_for(device: torch.device) -> KernelSet:
    """Return the kernel set of a device: Triton's on CUDA, torch's on a CPU."""
    if device.type == "cuda":
        from stablegen.kernels.triton import TritonKernels

        return TritonKernels()
    from stablegen.kernels.reference import ReferenceKernels

    return ReferenceKernels()


def torch_device(name: str) -> torch.device:
    """Return torch's device; raise ``DeviceError`` where torch cannot use it."""
    device = torch.device(name)
    if device.type == "cuda":
        try:
            torch.cuda.get_device_properties(device)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(
                f"torch cannot use the device {name}: {error}", hint="Check the driver, or use device='cpu'"
            ) from error
    return device


def observed(
    planned: Numerics,
    device: torch.device,
    *,
    attention: str = "sdpa",
    alignment: str | None = None,
    static_cache: bool = False,
) -> Numerics:
    """Return the numerics as torch reports them; equal to ``planned`` unless metadata misled the plan."""
    if device.type != "cuda":
        found = Device("cpu", planned.device_model, instruction_set=planned.instruction_set, threads=planned.threads)
    else:
        properties = torch.cuda.get_device_properties(device)
        found = Device(
            str(device),
            properties.name,
            capability=(properties.major, properties.minor),
            sm_count=properties.multi_processor_count,
        )
    policy = load_policy(planned.policy)
    return numerics_on(
        found, policy, planned.dtype, attention=attention, alignment=alignment, static_cache=static_cache
    )


def _read_weights(checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(checkpoint.directory):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}", hint="Download or save it again") from error
    return tensors


def load_transformers(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the transformers model of a checkpoint; raise ``CheckpointError`` for weights that are not whole."""
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory, dtype=dtype, output_loading_info=True, local_files_only=True
            )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.directory} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        # transformers would go on with random numbers in their place
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.directory} has no weights for {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} others" if len(missing) > 4 else "")
        )
    check_finite(model.state_dict().items())
    model = model.eval().to(device)
    align(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
