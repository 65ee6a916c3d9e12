"""Use the device of an experiment: what machine it is on, waiting for it, and its memory."""

from __future__ import annotations

import gc
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from stablegen.lab.reports.machine import Machine
from stablegen.machine.device import Device, cpu_model
from stablegen.machine.plan import version_of

UNKNOWN_MEMORY = 4 * 2**30
"""Bytes assumed to be free where the system does not say."""


def machine_of(device: Device) -> Machine:
    """Return what this machine is and which versions it has installed."""
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
    except Exception:  # NVML has an exception class for each failure; the figures stand without the driver's version
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def synchronise(device: str) -> None:
    """Wait until the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def free_memory(device: str) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def available_memory(device: str) -> int:
    """Return the free bytes of a device; ``UNKNOWN_MEMORY`` on a CPU whose system does not say."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    return UNKNOWN_MEMORY
