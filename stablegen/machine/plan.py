"""Everything the bits of a result depend on besides the request, known without importing torch.

Versions come from package metadata, the device from NVML or the processor's flags, torch's flags from torch if the
program has loaded it, else they are torch's defaults. An engine compares what it finds with what was planned.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from stablegen.core.numerics import Numerics
from stablegen.core.policy import BATCH_INVARIANT, ExecutionPolicy
from stablegen.machine.device import Device, resolve_device, usable_cpus

ENGINE_VERSION = 2
"""Raised whenever the transformers engine with a growing KV cache would give other bits for the same request."""
STATIC_ENGINE_VERSION = 2
"""Raised whenever the transformers engine with a KV cache of fixed length would give other bits."""
STATIC_MODELS = frozenset({"gpt2", "gpt_neox", "llama", "olmo2", "phi", "qwen2", "qwen3"})
"""``model_type`` of the architectures whose decode step can be captured: tests run each of them."""
_FIXED_ROPE = frozenset({None, "default", "linear", "llama3", "yarn"})
"""Rotary embeddings that do not depend on the sequence's current length."""
_SDP = ("flash", "mem_efficient", "math", "cudnn")
CHOOSING_VERSION = 1
"""Raised whenever the same processed scores would give other tokens, or sampling would draw other noise."""
KERNEL_VERSIONS = {"triton": 2, "reference": 1}
"""Raised whenever a kernel set would give other bits; equals each kernel set's own ``version``."""
OVERRIDES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DISABLE_ADDMM_CUDA_LT",
    "DISABLE_PTXAS_OPT",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "PTXAS_OPTIONS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "TRANSFORMERS_SDPA_FORCE_GQA",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_FORCE_DISABLE_FP_FUSION",
    "TRITON_KERNEL_OVERRIDE",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_PTXAS_PATH",
)
"""Environment variables that change which kernels run."""


def find_device(name: str, dtype: str) -> Device:
    """Return the device that ``name`` means here, without importing torch.

    Raises ``DeviceError`` where it is unknown or missing, ``DtypeError`` where it does not support ``dtype``.
    """
    return resolve_device(name, dtype, torch_has_cuda=torch_cuda_version() is not None, threads=cpu_threads())


def allows_static_cache(config: Mapping[str, Any]) -> bool:
    """Return whether a model's decode step can run over a KV cache of fixed length, by its configuration alone."""
    ropes = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := config.get(name), Mapping)]
    windowed = config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}
    return (
        config.get("model_type") in STATIC_MODELS
        and not windowed
        and not config.get("add_cross_attention")
        and all(rope.get("rope_type", rope.get("type")) in _FIXED_ROPE for rope in ropes)
    )


def numerics_on(
    device: Device,
    policy: ExecutionPolicy,
    dtype: str,
    *,
    attention: str = "sdpa",
    alignment: str | None = None,
    static_cache: bool = False,
) -> Numerics:
    """Return the numerics of a policy and dtype on a device, known without importing torch.

    ``attention`` is the attention implementation of the transformers model, ``alignment`` identifies the unaligned
    ones of its weights, and ``static_cache`` says whether the model ``allows_static_cache``. Batch-invariant engines
    use none of them: they have their own attention and cache, and copy weights to aligned memory.
    """
    own = policy.engines == BATCH_INVARIANT
    static = not own and policy.promises and static_cache and device.is_cuda and attention == "sdpa"
    if own:
        engine = "triton" if device.is_cuda else "reference"
        version = KERNEL_VERSIONS[engine]
    else:
        engine = "transformers"
        version = STATIC_ENGINE_VERSION if static else ENGINE_VERSION
    return Numerics(
        policy=policy.spec,
        dtype=dtype,
        engine=engine,
        engine_version=version,
        attention=None if own else attention,
        static=static,
        device="cuda" if device.is_cuda else "cpu",
        device_model=device.model,
        compute_capability=None if device.capability is None else "{}.{}".format(*device.capability),
        sm_count=device.sm_count,
        instruction_set=device.instruction_set,
        threads=1 if own and not device.is_cuda else device.threads,  # its CPU kernels go row by row
        alignment=None if own else alignment,
        torch=version_of("torch") or "missing",
        cuda=torch_cuda_version() if device.is_cuda else None,
        triton=version_of("triton") if own and device.is_cuda else None,
        transformers=None if own else version_of("transformers"),
        float32_matmul_precision=None if own and device.is_cuda else torch_matmul_precision(),
        reduced_precision=reduced_precision() if device.is_cuda and not own else None,
        attention_backends=attention_backends() if device.is_cuda and not own else None,
        overrides=tuple(f"{name}={os.environ[name]}" for name in OVERRIDES if name in os.environ),
    )


@lru_cache(maxsize=64)
def processed(numerics: Numerics) -> Numerics:
    """Return the numerics of answers chosen from processed scores, which transformers' processors compute."""
    return numerics.model_copy(update={"choosing": CHOOSING_VERSION, "transformers": version_of("transformers")})


@lru_cache
def version_of(package: str) -> str | None:
    """Return the installed version of a package from its metadata; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def torch_cuda_version() -> str | None:
    """Return the CUDA version torch was built with, read from its files; None for a build without CUDA."""
    loaded = sys.modules.get("torch")
    if loaded is not None:
        return str(loaded.version.cuda) if loaded.version.cuda else None
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    source = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda(?::[^=]*)?\s*=\s*['\"]([\d.]+)['\"]", source, re.MULTILINE)
    return match[1] if match else None


def cpu_threads() -> int:
    """Return the threads a CPU run will use: torch's setting if it is loaded, else what it would be set to."""
    loaded = sys.modules.get("torch")
    return int(loaded.get_num_threads()) if loaded is not None else usable_cpus()


def torch_matmul_precision() -> str:
    """Return torch's float32 matmul precision; its default where torch is not loaded."""
    loaded = sys.modules.get("torch")
    if loaded is None:
        return "highest"
    try:
        return str(loaded.get_float32_matmul_precision())
    except RuntimeError:  # set through torch's newer interface, which the older one refuses to read
        backends = loaded.backends
        return f"cuda {backends.cuda.matmul.fp32_precision}, mkldnn {backends.mkldnn.matmul.fp32_precision}"


def reduced_precision() -> str:
    """Return how 16-bit GEMMs may add, and whether kernels must be deterministic; torch's defaults without it."""
    loaded = sys.modules.get("torch")
    if loaded is None:
        return "fp16=True bf16=True accumulate=False deterministic=False"
    matmul = loaded.backends.cuda.matmul
    flags = {
        "fp16": matmul.allow_fp16_reduced_precision_reduction,
        "bf16": matmul.allow_bf16_reduced_precision_reduction,
        "accumulate": getattr(matmul, "allow_fp16_accumulation", False),
        "deterministic": loaded.are_deterministic_algorithms_enabled(),
    }
    return " ".join(f"{name}={value}" for name, value in flags.items())


def attention_backends() -> str:
    """Return which kernels torch's attention may choose from on CUDA; its default where torch is not loaded."""
    loaded = sys.modules.get("torch")
    if loaded is None:
        return " ".join(f"{name}=True" for name in _SDP)
    return " ".join(f"{name}={getattr(loaded.backends.cuda, f'{name}_sdp_enabled')()}" for name in _SDP)
