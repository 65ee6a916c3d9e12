"""Make the engine that a policy asks for, from a checkpoint's files or around a model already loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stablegen.core.numerics import Numerics
from stablegen.core.policy import BATCH_INVARIANT, TRANSFORMERS, control_policy, load_policy
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures import check_invariant, find_architecture
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.invariant.model import Model
from stablegen.engine.private import attention_of
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.engine.weights import align, alignment_of, check_finite
from stablegen.errors import CheckpointError, DeviceError, DeviceMemoryError, PolicyError
from stablegen.kernels.base import KernelSet
from stablegen.kernels.vendor import VendorKernels
from stablegen.machine.device import Device
from stablegen.machine.plan import allows_static_cache, find_device, numerics_on
from stablegen.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What an engine is made for: the numerics planned for it, and what the caller has set."""

    planned: Numerics
    context: int
    kv_cache_size: int | None
    tokenizer: Tokenizer | None


@dataclass(frozen=True, slots=True)
class _Files:
    """A checkpoint's directory, its weight files and its configuration, to be loaded on a device."""

    directory: Path
    weights: Iterable[Path]
    config: Mapping[str, Any]
    device: torch.device


def make_engine_from_files(
    directory: Path,
    files: Iterable[Path],
    config: Mapping[str, Any],
    planned: Numerics,
    device_name: str,
    *,
    context: int,
    kv_cache_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
) -> Engine:
    """Return the engine for ``planned`` over a checkpoint's weights, on torch's device ``device_name``.

    ``files``: its weights in safetensors. ``name``: what errors call the model; its directory by default. The engine's
    ``numerics`` are what torch reports. Raises ``CheckpointError`` for weights that are damaged, incomplete or not
    finite, ``DeviceError`` where torch cannot use the device, ``DeviceMemoryError`` where they do not fit there.
    """
    family = _family(planned)
    target = torch_device(device_name)
    try:
        return family.from_files(
            _Files(directory, files, config, target), _Wanted(planned, context, kv_cache_size, tokenizer)
        )
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the model {name or directory} did not fit into the memory of {device_name}",
            hint="Use a 16-bit dtype, a smaller model or another device",
        ) from error


def make_engine_around(
    model: Any,
    planned: Numerics,
    *,
    context: int,
    kv_cache_size: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Engine:
    """Return the engine for ``planned`` around a transformers model that is loaded already, where it is."""
    return _family(planned).around(model, _Wanted(planned, context, kv_cache_size, tokenizer))


def make_vendor_engine(model: Any, dtype: str, *, reach: int, **settings: Any) -> InvariantEngine:
    """Return the batch-invariant engine over a transformers model, with cuBLAS and SDPA in place of its kernels.

    It promises nothing, and serves to be measured against. ``reach``: positions that a row may have.
    """
    own = _own_model(model.config.to_dict(), model.state_dict(), VendorKernels(reach), dtype, model.device)
    numerics = numerics_on(find_device(str(model.device), dtype), control_policy(), dtype)
    return InvariantEngine(own, numerics, **settings)


# --- transformers models as they are ----------------------------------------------------------------------------------


def _transformers_from_files(files: _Files, wanted: _Wanted) -> Engine:
    model = load_model(files.directory, getattr(torch, wanted.planned.dtype), files.device)
    numerics = observed(
        wanted.planned,
        files.device,
        attention=attention_of(model.config),
        static_cache=allows_static_cache(files.config),
    )
    return TransformersEngine(model, numerics, context=wanted.context, tokenizer=wanted.tokenizer)


def _transformers_around(model: Any, wanted: _Wanted) -> Engine:
    numerics = observed(
        wanted.planned,
        model.device,
        attention=attention_of(model.config),
        alignment=alignment_of(model),
        static_cache=allows_static_cache(model.config.to_dict()),
    )
    return TransformersEngine(model, numerics, context=wanted.context, tokenizer=wanted.tokenizer)


# --- forward passes through batch-invariant kernels -------------------------------------------------------------------


def _invariant_from_files(files: _Files, wanted: _Wanted) -> Engine:
    check_invariant(files.config)
    return _invariant(files.config, load_weights(files.weights), wanted, files.device)


def _invariant_around(model: Any, wanted: _Wanted) -> Engine:
    return _invariant(model.config.to_dict(), model.state_dict(), wanted, model.device)


def _invariant(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], wanted: _Wanted, device: torch.device
) -> Engine:
    model = _own_model(config, tensors, kernels_for(device), wanted.planned.dtype, device)
    numerics = observed(wanted.planned, device)
    return InvariantEngine(model, numerics, kv_cache_size=wanted.kv_cache_size, tokenizer=wanted.tokenizer)


def _own_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    kernels: KernelSet,
    dtype: str,
    device: torch.device,
) -> Model:
    check_invariant(config)
    return find_architecture(config).build(config, tensors, kernels, dtype=getattr(torch, dtype), device=device)


@dataclass(frozen=True, slots=True)
class _Family:
    """How engines of one family are made."""

    from_files: Callable[[_Files, _Wanted], Engine]
    around: Callable[[Any, _Wanted], Engine]


_FAMILIES = {
    TRANSFORMERS: _Family(_transformers_from_files, _transformers_around),
    BATCH_INVARIANT: _Family(_invariant_from_files, _invariant_around),
}


def _family(planned: Numerics) -> _Family:
    policy = load_policy(planned.policy)
    family = _FAMILIES.get(policy.engines)
    if family is None:
        raise PolicyError(
            f"policy {policy.spec!r} runs on engines of the family {policy.engines!r}, which is not known here",
            accepted=f"policies for {', '.join(map(repr, _FAMILIES))}",
            hint="Use a source that starts engines of that family",
        )
    return family


# --- what they are made of --------------------------------------------------------------------------------------------


def load_weights(files: Iterable[Path]) -> Mapping[str, torch.Tensor]:
    """Return the tensors of safetensors files by name; raise ``CheckpointError`` where one cannot be read."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}", hint="Download or save it again") from error
    return tensors


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the transformers model of a checkpoint; raise ``CheckpointError`` for weights that are not whole."""
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, local_files_only=True
            )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        # transformers would go on with random numbers in their place
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{directory} has no weights for {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} others" if len(missing) > 4 else "")
        )
    check_finite(model.state_dict().items())
    model = model.eval().to(device)
    align(model)
    return model


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
