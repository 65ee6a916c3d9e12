"""Everything the bits of a result depend on besides the request."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from stablegen.core.frozen import Frozen


class Numerics(Frozen):
    """How a result is computed: under a policy that promises it, equal ``Numerics`` mean equal bits.

    ``engine`` names what computes (a kernel set of the batch-invariant engines, or ``transformers``), and
    ``engine_version`` is raised when it would give other bits. ``attention`` is a transformers model's attention
    implementation, ``static`` whether the KV cache has a fixed length, ``choosing`` the version of score processing
    and sampling, for requests that use them.

    Fields that do not apply are None and are not part of the digest: ``float32_matmul_precision`` (TF32),
    ``reduced_precision`` and ``attention_backends`` are flags of vendor libraries, ``transformers`` matters only where
    its forward pass runs, ``threads`` only on a CPU, ``overrides`` are environment variables that are set.
    ``alignment`` identifies the memory addresses of a loaded model's weights that are not 64-byte aligned, because a
    CPU's GEMM reads those in another order.
    """

    policy: str
    dtype: str
    engine: str
    engine_version: int
    attention: str | None = None
    static: bool = False
    choosing: int | None = None
    device: str
    device_model: str
    compute_capability: str | None = None
    sm_count: int | None = None
    instruction_set: str | None = None
    threads: int | None = None
    alignment: str | None = None
    torch: str
    cuda: str | None = None
    triton: str | None = None
    transformers: str | None = None
    float32_matmul_precision: str | None = None
    reduced_precision: str | None = None
    attention_backends: str | None = None
    overrides: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Return SHA-256, in hexadecimal, of the fields that apply."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def differences(self, other: Numerics) -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two numerics differ: name -> (self's value, other's value)."""
        mine, theirs = self.model_dump(), other.model_dump()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    def summary(self) -> str:
        """Return policy, dtype and device in a few words."""
        return f"{self.policy} {self.dtype} on {self.device_model}"
