"""The machine that an experiment runs on: what it is, what it has installed, and how to wait for its device."""

from __future__ import annotations

import gc
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from stablegen.core.frozen import Frozen
from stablegen.machine.device import Device, cpu_model
from stablegen.machine.plan import version_of

UNKNOWN_MEMORY = 4 * 2**30
"""Bytes that are reckoned with where the system does not say what it has."""


class Machine(Frozen):
    """Where it was measured; ``memory`` in bytes, ``threads`` torch's on the CPU."""

    device: str
    device_model: str
    compute_capability: str | None
    sm_count: int | None
    memory: int | None
    driver: str | None
    cpu: str
    threads: int
    stablegen: str
    python: str
    torch: str
    cuda: str | None
    triton: str | None
    transformers: str | None

    def summary(self) -> str:
        """Return device and versions in one line."""
        versions = {
            name: value
            for name in ("driver", "cuda", "torch", "triton", "transformers", "python", "stablegen")
            if (value := getattr(self, name)) is not None
        }
        where = self.device_model if self.device != "cpu" else f"{self.device_model}, threads {self.threads}"
        return ", ".join([where, *(f"{name} {value}" for name, value in versions.items())])


def machine_of(device: Device) -> Machine:
    """Return what this machine is and has installed."""
    import stablegen

    memory = torch.cuda.get_device_properties(device.name).total_memory if device.is_cuda else None
    return Machine(
        device=device.name,
        device_model=device.model,
        compute_capability=None if device.capability is None else "{}.{}".format(*device.capability),
        sm_count=device.sm_count,
        memory=memory,
        driver=_driver() if device.is_cuda else None,
        cpu=cpu_model(),
        threads=torch.get_num_threads(),
        stablegen=stablegen.__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda if device.is_cuda else None,
        triton=version_of("triton") if device.is_cuda else None,
        transformers=version_of("transformers"),
    )


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # NVML has an exception class for each thing that is amiss; the figures stand without it
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def free_memory(device: str) -> None:
    """Give back to the device what nobody holds any more."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def available_memory(device: str) -> int:
    """Return the bytes that a device has to give; of a CPU where the system does not say, ``UNKNOWN_MEMORY``."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    return UNKNOWN_MEMORY
