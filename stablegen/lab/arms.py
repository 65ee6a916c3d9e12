"""The ways to generate that are measured against each other: stablegen's policies, and what they replace."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, ClassVar

import torch

from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, ExecutionPolicy, Padded, load_policy
from stablegen.core.request import ModelIdentity, Request
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import GPT2Engine
from stablegen.engine.loading import make_vendor_engine, wrap_model
from stablegen.errors import EngineError
from stablegen.kernels.base import PAGE
from stablegen.lab.machine import synchronise
from stablegen.lab.subject import Subject
from stablegen.machine.device import Device
from stablegen.machine.plan import allows_static_cache, numerics_on

GROUP = 32
"""Prompts that transformers runs at once in a set of many."""
_IDENTITY = ModelIdentity(source="digest", digest="bench")

Prompts = Sequence[Sequence[int]]


class Arm(ABC):
    """One way to generate: prepared for a batch size, run many times, closed."""

    name: ClassVar[str]
    label: ClassVar[str]
    about: ClassVar[str]
    shares_model: ClassVar[bool] = True
    """Whether it runs the subject's model itself, and not weights of its own."""

    def note(self, batch: int) -> str:
        """Return what a reader must know of its figures at a batch size."""
        return ""

    def missing(self, device: Device) -> str | None:
        """Return why it cannot run here; None where it can."""
        return None

    @abstractmethod
    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make ready to run ``batch`` prompts at once, none longer than ``reach`` tokens with its answer.

        None: as many at once as suits it.
        """

    @abstractmethod
    def run(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate this many tokens for each prompt; return when the device is done."""

    def run_set(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate for a whole set of prompts of many lengths, in the way that suits it."""
        self.run(prompts, new_tokens)

    def memory(self) -> dict[str, int] | None:
        """Return the bytes it holds by purpose; None where it does not know."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of everything that ``prepare`` and ``run`` have made."""


class _EngineArm(Arm):
    """One of stablegen's engines."""

    _engine: Engine | None = None
    _device = "cpu"

    @property
    def policy(self) -> ExecutionPolicy:
        """Return the policy under which it runs."""
        return load_policy(self.name)

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make an engine around the subject's model."""
        self._device = subject.device.name
        config = subject.model.config.to_dict()
        planned = numerics_on(subject.device, self.policy, subject.dtype, static_cache=allows_static_cache(config))
        # an engine with weights of its own may keep some of the model's: it gets a copy, so that its memory is its own
        model = subject.model if self.shares_model else deepcopy(subject.model)
        self._engine = wrap_model(model, planned, subject.context)

    def plan(self, requests: Sequence[Request], engine: Engine) -> list[Batch]:
        """Return the batches in which requests run."""
        return self.policy.plan(requests, engine.limits)

    def run(self, prompts: Prompts, new_tokens: int) -> None:
        """Generate in the batches that the policy plans."""
        engine = self._engine
        assert engine is not None
        params = GenerationParams(max_new_tokens=new_tokens)
        requests = [Request(tuple(prompt), params, _IDENTITY, "") for prompt in prompts]
        made = 0
        for batch in self.plan(requests, engine):
            made += sum(len(generated.trace.tokens) for generated in engine.generate(batch))
        synchronise(self._device)
        _check_length(made, len(prompts) * new_tokens)

    def memory(self) -> dict[str, int] | None:
        """Return what the engine says it holds."""
        read = getattr(self._engine, "memory", None)
        return None if read is None else {name: int(size) for name, size in read().items()}

    def close(self) -> None:
        """Let go of the engine."""
        self._engine = None


class InvariantArm(_EngineArm):
    """Stablegen's own forward pass, everything in one call."""

    name = label = "invariant"
    about = "stablegen's invariant policy"
    shares_model = False

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make an engine whose KV cache holds the whole batch at once."""
        super().prepare(subject, batch, reach)
        engine = self._engine
        assert isinstance(engine, GPT2Engine)
        if batch is not None:
            self._engine = GPT2Engine(
                engine.model,
                engine.numerics,
                max_rows=max(engine.max_rows, batch),
                kv_cache_size=max(engine.kv_cache_size, _cache_bytes(engine.model, batch, reach)),
            )

    def plan(self, requests: Sequence[Request], engine: Engine) -> list[Batch]:
        """Return one batch: the engine itself decides what runs together."""
        return [Batch(tuple(requests))]


class VendorArm(InvariantArm):
    """The same engine with the vendor's kernels: what invariance itself costs."""

    name = label = "vendor"
    about = "the invariant engine with cuBLAS and torch's attention in place of its kernels; promises nothing"

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make the engine around a copy of the model, as large as the batch."""
        assert batch is not None
        self._device = subject.device.name
        engine = make_vendor_engine(deepcopy(subject.model), subject.dtype, reach=reach, max_rows=batch)
        size = _cache_bytes(engine.model, batch, reach)
        self._engine = GPT2Engine(engine.model, engine.numerics, max_rows=batch, kv_cache_size=size)


class SingleArm(_EngineArm):
    """One request a time."""

    name = label = "single"
    about = "stablegen's single policy: one request after another"

    def note(self, batch: int) -> str:
        """Return that it does not batch."""
        return f"{batch} requests one after another" if batch > 1 else ""


class PaddedArm(_EngineArm):
    """Batches of fixed shape."""

    name = "padded"
    label = "padded:N"
    about = "stablegen's padded:N policy, N being the batch size"
    _rows = 1

    @property
    def policy(self) -> ExecutionPolicy:
        """Return the policy whose N is the batch size it was prepared for."""
        return Padded(self._rows)

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Make an engine whose batches have this many rows."""
        assert batch is not None
        self._rows = batch
        super().prepare(subject, batch, reach)


class EagerArm(Arm):
    """``model.generate`` as it stands."""

    name = "eager"
    label = "transformers eager"
    about = "transformers' model.generate, greedy"
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
        ordered = sorted(prompts, key=len)  # neighbours of like length waste the least padding
        for start in range(0, len(ordered), GROUP):
            self.run(ordered[start : start + GROUP], new_tokens)

    def options(self) -> dict[str, Any]:
        """Return further arguments of ``generate``."""
        return {}

    def mode(self) -> AbstractContextManager[Any]:
        """Return the context in which ``generate`` runs."""
        return nullcontext()

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


class StaticArm(EagerArm):
    """``model.generate`` with a static cache, which transformers compiles."""

    name = "static"
    label = "transformers static-compiled"
    about = "transformers' model.generate(cache_implementation='static'), which compiles itself"
    shares_model = False

    def missing(self, device: Device) -> str | None:
        """Return that a CPU is not enough."""
        return None if device.is_cuda else "transformers compiles on a GPU only"

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        """Copy the subject's model."""
        self._device = subject.device.name
        self._model = deepcopy(subject.model)  # what is compiled and the cache stay with the model

    def options(self) -> dict[str, Any]:
        """Return what asks for a static cache."""
        return {"cache_implementation": "static"}

    def close(self) -> None:
        """Let go of the model and of what was compiled."""
        super().close()
        torch.compiler.reset()


class BatchInvariantOpsArm(EagerArm):
    """``model.generate`` under Thinking Machines' batch-invariant operations."""

    name = label = "batch_invariant_ops"
    about = "batch_invariant_ops around transformers' model.generate"

    def missing(self, device: Device) -> str | None:
        """Return why it cannot run here: no GPU, or no such package."""
        if not device.is_cuda:
            return "its kernels are a GPU's"
        try:
            self._package()
        except Exception as error:  # a package that is there can fail in its own way when it is imported
            return f"cannot be imported: {error}"
        return None

    def mode(self) -> AbstractContextManager[Any]:
        """Return the package's own context."""
        mode: AbstractContextManager[Any] = self._package().set_batch_invariant_mode(True)
        return mode

    def _package(self) -> Any:
        return importlib.import_module("batch_invariant_ops")


ARMS: dict[str, type[Arm]] = {
    arm.name: arm for arm in (InvariantArm, VendorArm, SingleArm, PaddedArm, EagerArm, StaticArm, BatchInvariantOpsArm)
}


def _cache_bytes(model: GPT2, rows: int, reach: int) -> int:
    return rows * -(-reach // PAGE) * model.kv_cache_bytes_per_page()


def _left_padded(prompts: Prompts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def _check_length(made: int, asked: int) -> None:
    if made != asked:
        raise EngineError(f"{made} tokens were generated where {asked} were asked for", hint="Its time says nothing")
