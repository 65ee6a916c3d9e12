"""The machine on which an experiment ran."""

from __future__ import annotations

from stablegen.core.frozen import Frozen


class Machine(Frozen):
    """The machine on which an experiment ran; ``memory`` in bytes, ``threads`` are torch's on the CPU."""

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
