"""The hardware of this machine, found without torch: NVML for GPUs, the processor's own flags for CPUs."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from stablegen.errors import DeviceError, DtypeError

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES = get_args(Dtype)
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16"),
    *("asimd", "sve", "sve2", "bf16", "i8mm"),
)
"""Instruction sets from which CPU libraries choose their kernels."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device; ``name`` is torch's (``cpu``, ``cuda:0``).

    ``capability`` and ``sm_count`` are a GPU's, ``instruction_set`` and ``threads`` a CPU's.
    """

    name: str
    model: str
    capability: tuple[int, int] | None = None
    sm_count: int | None = None
    instruction_set: str | None = None
    threads: int | None = None

    @property
    def is_cuda(self) -> bool:
        """Return whether this is an NVIDIA GPU."""
        return self.name.startswith("cuda")


def resolve_device(name: str, dtype: str, *, torch_has_cuda: bool, threads: int) -> Device:
    """Return the device that ``name`` (``auto``, ``cpu``, ``cuda``, ``cuda:N``) means on this machine.

    ``threads``: how many a CPU run will use. Raises ``DeviceError`` where the device is unknown or missing,
    ``DtypeError`` where it does not support ``dtype``.
    """
    if dtype not in DTYPES:
        raise DtypeError(f"dtype {dtype!r} is unknown", accepted=", ".join(DTYPES))
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name) if isinstance(name, str) else None
    if match is None:
        raise DeviceError(f"device {name!r} is unknown", accepted="'auto', 'cpu', 'cuda', 'cuda:N'")
    gpus = visible_gpus() if name != "cpu" and torch_has_cuda else []
    if name == "cpu" or (name == "auto" and not gpus):
        return Device("cpu", cpu_model(), instruction_set=instruction_set(), threads=threads)
    index = int(match[1] or 0)
    if not torch_has_cuda:
        raise DeviceError(
            f"device {name!r} was requested, and the installed torch is built without CUDA",
            accepted="'cpu' or 'auto' with this torch",
            hint="Install a CUDA build of torch",
        )
    if index >= len(gpus):
        raise DeviceError(
            f"device {name!r} was not found: {len(gpus)} NVIDIA GPU(s) are visible",
            accepted=", ".join(repr(gpu.name) for gpu in gpus) or "'cpu' or 'auto' on this machine",
            hint="Check CUDA_VISIBLE_DEVICES and nvidia-smi",
        )
    gpu = gpus[index]
    if dtype == "bfloat16" and gpu.capability is not None and gpu.capability < (8, 0):
        raise DtypeError(
            f"{gpu.model} (compute capability {gpu.capability[0]}.{gpu.capability[1]}) does not support bfloat16",
            accepted="float32, float16 on this GPU",
        )
    return gpu


@lru_cache(maxsize=1)
def visible_gpus() -> list[Device]:
    """Return the NVIDIA GPUs in CUDA's order, from NVML; none where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: NVML has an exception class for each, all meaning "no GPU"
        return []
    try:
        handles = _visible(pynvml, [_handle(pynvml, i) for i in range(pynvml.nvmlDeviceGetCount())])
        return [_gpu(pynvml, index, handle) for index, handle in enumerate(handles)]
    except pynvml.NVMLError as error:
        raise DeviceError(f"NVML cannot describe this machine's GPUs: {error}", accepted="device='cpu'") from error
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, index: int) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(index)


def _visible(nvml: Any, handles: list[Any]) -> list[Any]:
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    chosen = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isdigit() and int(entry) < len(handles):
            chosen.append(handles[int(entry)])
        elif entry.startswith("GPU-") and any(uuid.startswith(entry) for uuid in uuids):
            chosen.append(handles[next(i for i, uuid in enumerate(uuids) if uuid.startswith(entry))])
        else:  # CUDA stops at the first entry it cannot resolve
            break
    return chosen


def _gpu(nvml: Any, index: int, handle: Any) -> Device:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    # NVML counts CUDA cores; 64 of them make a multiprocessor on 7.x and 8.0, 128 on every later one
    cores_per_sm = 64 if (major, minor) < (8, 6) and (major, minor) >= (7, 0) else 128
    return Device(
        name=f"cuda:{index}",
        model=_text(nvml.nvmlDeviceGetName(handle)),
        capability=(int(major), int(minor)),
        sm_count=int(nvml.nvmlDeviceGetNumGpuCores(handle)) // cores_per_sm,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """Return vendor, family, model and name of the processor."""
    info = _cpuinfo()
    if "vendor_id" in info:
        family = f"family {info.get('cpu family')} model {info.get('model')} stepping {info.get('stepping')}"
        return f"{info.get('model name', '')} ({info['vendor_id']} {family})"
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """Return the instruction sets of ``FLAGS`` that this processor has, separated by spaces."""
    info = _cpuinfo()
    have = set(info.get("flags", info.get("Features", "")).split())
    return " ".join(flag for flag in FLAGS if flag in have) or platform.machine()


def usable_cpus() -> int:
    """Return how many threads a CPU run uses where torch is not loaded: OMP_NUM_THREADS, else the usable cores.

    Counts cores and not hardware threads, as torch with MKL does.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_core(cpu) for cpu in allowed}
    return len(allowed) if None in cores else len(cores)


def _core(cpu: int) -> str | None:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return None
