"""The ways to generate that are measured against each other: stablegen's policies, and what they replace."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from stablegen.core.params import GenerationParams
from stablegen.core.policy import BATCH_INVARIANT, Batch, ExecutionPolicy, registered_policies
from stablegen.core.request import ModelIdentity, Request
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures import find_architecture
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.invariant.model import Model
from stablegen.engine.loading import kernels_for, make_engine_around, make_vendor_engine
from stablegen.errors import EngineError
from stablegen.kernels.base import PAGE
from stablegen.lab.compared import (
    BATCH_INVARIANT_OPS,
    EAGER,
    STATIC,
    VENDOR,
    arm_names,
    has_rows,
    of_rows,
    runs_one_by_one,
)
from stablegen.lab.device import synchronise
from stablegen.lab.subject import Subject
from stablegen.machine.device import Device
from stablegen.machine.plan import allows_static_cache, numerics_on

GROUP = 32
"""Prompts that transformers runs at once where a set has more."""
_IDENTITY = ModelIdentity(source="digest", digest="bench")

Prompts = Sequence[Sequence[int]]


class Arm(ABC):
    """One way to generate: prepared for a batch size, run many times, closed.

    ``label`` and ``about`` name it in a word or two, and in a sentence. ``shares_model``: whether it runs the subject's
    model itself rather than weights of its own. ``once``: whether it is measured at batch 1 alone unless it is named.
    ``prefills``: whether its prefill is measured. ``golden_runs``: how often it runs the golden set.
    """

    name: str
    label: str
    about: str
    shares_model: bool = True
    once: bool = False
    prefills: bool = False
    golden_runs: int = 0

    def note(self, batch: int) -> str:
        """Return what a reader must know about its figures at a batch size."""
        return ""

    def missing(self, device: Device) -> str | None:
        """Return why it cannot run here; None where it can."""
        return None

    @abstractmethod
    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Prepare to run ``batch`` prompts at once, each with its answer at most ``reach`` tokens.

        None: as many at once as suits it.
        """

    @abstractmethod
    def run(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate this many tokens for each prompt; return when the device has finished."""

    def run_set(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate for a whole set of prompts of many lengths, in the way that suits it."""
        self.run(prompts, new_tokens)

    def memory(self) -> dict[str, int] | None:
        """Return the bytes it holds by purpose; None where it does not know."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release everything that ``prepare`` and ``run`` have made."""


class EngineArm(Arm):
    """One of stablegen's engines."""

    _engine: Engine | None = None
    _device = "cpu"

    @abstractmethod
    def plan(self, requests: Sequence[Request], engine: Engine) -> list[Batch]:
        """Return the batches in which requests run."""

    def run(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate in the planned batches."""
        engine = self._engine
        assert engine is not None
        params = GenerationParams(max_new_tokens=new_tokens)
        requests = [Request(tuple(prompt), params, _IDENTITY, "") for prompt in prompts]
        made = 0
        for batch in self.plan(requests, engine):
            made += sum(len(generated.trace.tokens) for generated in engine.generate(batch))
        synchronise(self._device)
        _check_length(made, len(prompts) * new_tokens)

    def close(self) -> None:
        """Release the engine."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None


class PolicyArm(EngineArm):
    """One kind of policy; where it has a fixed number of rows, they are as many as the batch."""

    def __init__(self, kind: type[ExecutionPolicy]) -> None:
        self.name, self.label = kind.name, kind.form
        self.about = f"stablegen's {kind.form} policy"
        if has_rows(kind):
            self.about += ", N being the batch size"
        self.once = runs_one_by_one(kind)
        if self.once:
            self.about += ": one request after another"
        self.policy = kind.typical()

    def note(self, batch: int) -> str:
        """Return whether its requests run one after another."""
        return f"{batch} requests one after another" if self.once and batch > 1 else ""

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make an engine around the subject's model."""
        self._device = subject.device.name
        self.policy = of_rows(type(self.policy), batch or GROUP)
        static = allows_static_cache(subject.config)
        planned = numerics_on(subject.device, self.policy, subject.dtype, static_cache=static)
        self._engine = make_engine_around(subject.model, planned, context=subject.context)

    def plan(self, requests: Sequence[Request], engine: Engine) -> list[Batch]:
        """Return the batches that the policy plans."""
        return self.policy.plan(requests, engine.limits)


class OwnArm(PolicyArm):
    """A kind of policy that stablegen's own forward pass runs, everything in one call."""

    shares_model = False
    prefills = True
    golden_runs = 3
    _own: InvariantEngine | None = None

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make an engine whose KV cache holds the whole batch at once."""
        self._device = subject.device.name
        weights = deepcopy(subject.model)  # the engine may keep some of them: its memory shall be its own
        model = find_architecture(subject.config).build(
            subject.config,
            weights.state_dict(),
            kernels_for(weights.device),
            dtype=getattr(torch, subject.dtype),
            device=weights.device,
        )
        numerics = numerics_on(subject.device, self.policy, subject.dtype)
        engine = InvariantEngine(model, numerics)
        if batch is not None:
            rows = max(engine.max_rows, batch)
            size = max(engine.kv_cache_size, _cache_bytes(model, batch, reach))
            engine = InvariantEngine(model, numerics, max_rows=rows, kv_cache_size=size)
        self._engine = self._own = engine

    def memory(self) -> dict[str, int] | None:
        """Return the bytes of the engine's weights and KV cache."""
        return None if self._own is None else self._own.memory()

    def close(self) -> None:
        """Release the engine."""
        super().close()
        self._own = None


class VendorArm(EngineArm):
    """The same engine with the vendor's kernels: what invariance itself costs."""

    name = label = VENDOR
    about = "the batch-invariant engine with cuBLAS and torch's attention in place of its kernels; promises nothing"
    shares_model = False
    prefills = True
    _own: InvariantEngine | None = None

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make the engine around a copy of the model, as large as the batch."""
        self._device = subject.device.name
        rows = batch or GROUP
        engine = make_vendor_engine(deepcopy(subject.model), subject.dtype, reach=reach, max_rows=rows)
        size = _cache_bytes(engine.model, rows, reach)
        self._engine = self._own = InvariantEngine(engine.model, engine.numerics, max_rows=rows, kv_cache_size=size)

    def plan(self, requests: Sequence[Request], engine: Engine) -> list[Batch]:
        """Return one batch."""
        return [Batch(tuple(requests))]

    def memory(self) -> dict[str, int] | None:
        """Return the bytes of the engine's weights and KV cache."""
        return None if self._own is None else self._own.memory()

    def close(self) -> None:
        """Release the engine."""
        super().close()
        self._own = None


class EagerArm(Arm):
    """``model.generate`` as it is."""

    name = EAGER
    label = "transformers eager"
    about = "transformers' model.generate, greedy"
    prefills = True
    golden_runs = 1  # the slowest
    _model: Any = None
    _device = "cpu"

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Take the subject's model."""
        self._device = subject.device.name
        self._model = subject.model

    def run(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate for one batch, padded on the left where lengths differ."""
        ids, mask = _left_padded(prompts, self._model.device)
        with self.mode():
            made = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **self.options(),
            )
        synchronise(self._device)
        _check_length(made.shape[1] - ids.shape[1], new_tokens)

    def run_set(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate in groups of ``GROUP``."""
        ordered = sorted(prompts, key=len)  # similar lengths need the least padding
        for start in range(0, len(ordered), GROUP):
            self.run(ordered[start : start + GROUP], new_tokens)

    def options(self) -> dict[str, Any]:
        """Return further arguments of ``generate``."""
        return {}

    def mode(self) -> AbstractContextManager[Any]:
        """Return the context in which ``generate`` runs."""
        return nullcontext()

    def close(self) -> None:
        """Release the model."""
        self._model = None


class StaticArm(EagerArm):
    """``model.generate`` with a static cache, which transformers compiles."""

    name = STATIC
    label = "transformers static-compiled"
    about = "transformers' model.generate(cache_implementation='static'), which compiles itself"
    shares_model = False
    once = True
    prefills = False
    golden_runs = 0

    def missing(self, device: Device) -> str | None:
        """Return that it needs a GPU."""
        return None if device.is_cuda else "transformers compiles on a GPU only"

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Copy the subject's model."""
        self._device = subject.device.name
        self._model = deepcopy(subject.model)  # compiled code and the cache stay with the model

    def options(self) -> dict[str, Any]:
        """Return the argument that asks for a static cache."""
        return {"cache_implementation": "static"}

    def close(self) -> None:
        """Release the model and its compiled code."""
        super().close()
        torch.compiler.reset()


class BatchInvariantOpsArm(EagerArm):
    """``model.generate`` under Thinking Machines' batch-invariant operations."""

    name = label = BATCH_INVARIANT_OPS
    about = "batch_invariant_ops around transformers' model.generate"
    prefills = False
    golden_runs = 0

    def missing(self, device: Device) -> str | None:
        """Return why it cannot run here: no GPU, or no such package."""
        if not device.is_cuda:
            return "its kernels need a GPU"
        try:
            self._package()
        except Exception as error:  # an installed package may fail in its own way when it is imported
            return f"cannot be imported: {error}"
        return None

    def mode(self) -> AbstractContextManager[Any]:
        """Return the package's own context."""
        mode: AbstractContextManager[Any] = self._package().set_batch_invariant_mode(True)
        return mode

    def _package(self) -> Any:
        return importlib.import_module(BATCH_INVARIANT_OPS)


def known_arms() -> dict[str, Callable[[], Arm]]:
    """Return what makes each arm, by name: one for each kind of policy that promises equal bits, and the others."""
    makers: dict[str, Callable[[], Arm]] = {
        arm.name: arm for arm in (VendorArm, EagerArm, StaticArm, BatchInvariantOpsArm)
    }
    for kind in registered_policies():
        if kind.promises:
            makers[kind.name] = partial(OwnArm if kind.engines == BATCH_INVARIANT else PolicyArm, kind)
    return {name: makers[name] for name in arm_names()}


def _cache_bytes(model: Model, rows: int, reach: int) -> int:
    return rows * -(-reach // PAGE) * model.kv_cache_bytes_per_page()


def _left_padded(prompts: Prompts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def _check_length(made: int, asked: int) -> None:
    if made != asked:
        raise EngineError(
            f"{made} tokens were generated where {asked} were asked for", hint="Its time is not a measurement"
        )
