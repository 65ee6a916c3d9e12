"""Experiment 3: where in a transformer the difference arises, and how it grows from layer to layer.

One sequence runs alone, and as row 0 of larger batches whose other rows have the same length: nothing is padded, only
the batch size changes. After each half of each layer the residual stream of that sequence is compared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, control_policy
from stablegen.core.request import ModelIdentity, Request
from stablegen.engine.compute import computing, cpu_threads
from stablegen.engine.invariant.architectures import check_invariant, find_architecture
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.loading import kernels_for, torch_device
from stablegen.errors import DeviceMemoryError, ParameterError, PolicyError
from stablegen.kernels.base import Cache, KernelSet, Linear, Norm, Placed, Rows
from stablegen.lab.bits import same_bits
from stablegen.lab.compared import own_policy
from stablegen.lab.device import free_memory, machine_of
from stablegen.lab.progress import ticker
from stablegen.lab.reports.layers import (
    EMBEDDING,
    SCORES,
    Kernels,
    LayerDifference,
    LayersReport,
    LayersRun,
    Stage,
    attention_of,
    mlp_of,
)
from stablegen.lab.subject import DTYPES, RANDOM, Subject, load_subject
from stablegen.machine.plan import find_device, numerics_on
from stablegen.sources.checkpoint import CheckpointSource

if TYPE_CHECKING:
    from stablegen.session.call import Progress

BATCHES = (2, 4, 8, 16, 32, 64)
LENGTH = 32
"""Tokens of the sequence."""
MIDDLES = ("ln_2", "post_attention_layernorm")
"""Names of a block's second norm, which reads the residual stream between attention and MLP."""

_Stream = dict[str, torch.Tensor]
"""The residual stream of the sequence by place, and its last scores."""
_Run = Callable[[Sequence[Sequence[int]]], dict[Stage, _Stream]]
"""Runs sequences as one batch; returns the stream of the first."""


def measure(
    *,
    model: str | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    dtypes: Sequence[str] = (),
    batches: Sequence[int] = BATCHES,
    length: int = LENGTH,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> LayersReport:
    """Compare each layer of a model for one sequence, alone and in batches, by transformers and by stablegen's kernels.

    ``model``: the embedded ``tiny-gpt2`` if None; ``random_weights``: GPT-2 small's shape instead. ``dtypes``: those
    that suit the device if empty. Raises ``ParameterError`` for settings that cannot be measured, ``DeviceError`` or
    ``ModelError`` where device or model cannot be used.
    """
    started = time.perf_counter()
    if random_weights and model is not None:
        raise ParameterError(f"model={model!r} together with random weights", accepted="one of the two")
    if not batches or any(batch < 2 for batch in batches):
        raise ParameterError(f"batch={','.join(map(str, batches))}", accepted="whole numbers from 2 on")
    place = find_device(device, "float32")
    torch_device(place.name)
    source = None if random_weights else CheckpointSource.open(model, revision)
    chosen = tuple(dict.fromkeys(dtypes)) or DTYPES["cuda" if place.is_cuda else "cpu"]
    for dtype in chosen:
        find_device(device, dtype)
    tick = ticker(progress, 2 * len(chosen) * (len(batches) + 1))
    runs: list[LayersRun] = []
    unavailable: dict[str, str] = {}
    for dtype in chosen:
        subject = load_subject(source, place, dtype)
        if not 1 <= length < subject.context:
            raise ParameterError(f"length={length}", accepted=f"1 to {subject.context - 1} tokens")
        lanes: dict[Kernels, _Run] = {"vendor": _Vendor(subject).run}
        try:
            check_invariant(subject.config)
        except PolicyError as error:
            unavailable["stablegen"] = error.problem
        else:
            lanes["stablegen"] = _Own(subject, max(batches), length).run
        sequences = _sequences(subject, length, max(batches), seed)
        for kernels, run in lanes.items():
            alone = _within_memory(run, sequences[:1])
            tick()
            for batch in batches:
                together = _within_memory(run, sequences[:batch])
                runs += [
                    LayersRun(
                        kernels=kernels,
                        dtype=dtype,
                        stage=stage,
                        batch=batch,
                        layers=tuple(_differences(alone[stage], together[stage])),
                    )
                    for stage in alone
                ]
                tick()
        del subject, lanes
        free_memory(place.name)
    return LayersReport(
        model=RANDOM if source is None else source.identity.name,
        machine=machine_of(place),
        seed=seed,
        length=length,
        batches=tuple(batches),
        runs=tuple(runs),
        unavailable=unavailable,
        seconds=time.perf_counter() - started,
    )


def _within_memory(run: _Run, sequences: Sequence[Sequence[int]]) -> dict[Stage, _Stream]:
    """Run sequences; raise ``DeviceMemoryError`` where they do not fit."""
    try:
        return run(sequences)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"a batch of {len(sequences)} rows did not fit into the device's memory", hint="Use fewer rows with --batch"
        ) from error


def _sequences(subject: Subject, length: int, count: int, seed: int) -> list[list[int]]:
    """Return random sequences with different first tokens: an engine may compute a shared prefix once."""
    generator = random.Random(seed)
    firsts = generator.sample(range(subject.vocabulary), count)
    return [[first, *(generator.randrange(subject.vocabulary) for _ in range(length - 1))] for first in firsts]


def _differences(alone: Mapping[str, torch.Tensor], together: Mapping[str, torch.Tensor]) -> Iterator[LayerDifference]:
    for layer, mine in alone.items():
        apart = mine.double() - together[layer].double()
        yield LayerDifference(
            layer=layer,
            max_abs=apart.abs().max().item(),
            l2=apart.norm().item(),
            equal=same_bits(mine, together[layer]),
            largest=mine.abs().max().item(),
        )


# --- transformers' own forward pass -----------------------------------------------------------------------------------


class _Vendor:
    """Transformers' own forward pass, observed by hooks."""

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._threads = numerics_on(subject.device, control_policy(), subject.dtype).threads
        lists = [part for part in self._model.modules() if isinstance(part, torch.nn.ModuleList) and len(part)]
        self._blocks = lists[0]
        self._next: int | None = None

    def run(self, sequences: Sequence[Sequence[int]]) -> dict[Stage, _Stream]:
        """Return the stream of the first sequence, in its prefill and in one decode step after it."""
        ids = torch.tensor(sequences, device=self._model.device)
        with computing(self._model.device), cpu_threads(self._threads):
            with self._recorded() as prefill:
                out = self._model(input_ids=ids, use_cache=True)
            prefill[SCORES] = out.logits[0, -1].clone()
            if self._next is None:  # the first run, of the sequence alone, decides the token that every batch decodes
                self._next = int(prefill[SCORES].argmax())
            following = ids[:, :1].clone()
            following[0] = self._next
            with self._recorded() as decode:
                out = self._model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
            decode[SCORES] = out.logits[0, -1].clone()
        return {"prefill": prefill, "decode": decode}

    @contextmanager
    def _recorded(self) -> Iterator[_Stream]:
        """Record row 0 of the residual stream before the layers, and after each half of each."""
        seen: _Stream = {}
        hooks = []

        def before(name: str, module: torch.nn.Module) -> None:
            def record(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                seen[name] = (given[0] if given else named["hidden_states"])[0].clone()

            hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))

        def after(name: str, module: torch.nn.Module) -> None:
            def record(_: torch.nn.Module, __: Any, out: Any) -> None:
                seen[name] = (out if isinstance(out, torch.Tensor) else out[0])[0].clone()

            hooks.append(module.register_forward_hook(record))

        before(EMBEDDING, self._blocks[0])
        for index, block in enumerate(self._blocks):
            middle = next((part for name in MIDDLES if (part := getattr(block, name, None)) is not None), None)
            if middle is not None:
                before(attention_of(index), middle)
            after(mlp_of(index), block)
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


# --- the invariant kernels --------------------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """One pass of the engine: its rows, and the stream of all its tokens by place."""

    rows: Rows
    slots: torch.Tensor
    stream: _Stream


class _Recording:
    """A kernel set that records the residual stream which another one returns."""

    def __init__(self, kernels: KernelSet) -> None:
        self._kernels = kernels
        self.passes: list[_Pass] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def embed(
        self, rows: Rows, cache: Cache, tokens: Linear, positions: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, Placed]:
        found = self._kernels.embed(rows, cache, tokens, positions, norm)
        self.passes.append(_Pass(rows, rows.slots.clone(), {EMBEDDING: found[0].clone()}))
        return found

    def add_norm(
        self, x: torch.Tensor, partial: torch.Tensor, layer: Linear, norm: Norm, select: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._kernels.add_norm(x, partial, layer, norm, select)
        stream = self.passes[-1].stream
        layers, half = divmod(len(stream) - 1, 2)
        stream[mlp_of(layers) if half else attention_of(layers)] = found[0].clone()
        return found


class _Own:
    """Stablegen's forward pass over the same weights, its kernels recorded."""

    def __init__(self, subject: Subject, rows: int, length: int) -> None:
        model, device = subject.model, subject.model.device
        self._recording = _Recording(kernels_for(device))
        own = find_architecture(subject.config).build(
            subject.config,
            model.state_dict(),
            cast("KernelSet", self._recording),
            dtype=getattr(torch, subject.dtype),
            device=device,
        )
        numerics = numerics_on(subject.device, own_policy(), subject.dtype)
        self._engine = InvariantEngine(own, numerics, chunk=rows * length, max_rows=rows, graphs=False)

    def run(self, sequences: Sequence[Sequence[int]]) -> dict[Stage, _Stream]:
        """Return the stream of the first sequence, in its prefill and in one decode step after it."""
        identity = ModelIdentity(source="digest", digest="lab")
        params = GenerationParams(max_new_tokens=2)
        requests = tuple(Request(tuple(ids), params, identity, "") for ids in sequences)
        self._engine.forget()
        self._recording.passes.clear()
        scores: list[torch.Tensor] = []

        def observe(request: Request, row: torch.Tensor) -> None:
            if request is requests[0]:
                scores.append(row.clone())

        for _ in self._engine.generate(Batch(requests), observe):
            pass
        ids = torch.tensor(sequences[0], dtype=torch.int32, device=self._engine.model.device)
        found: dict[Stage, _Stream] = {}
        slot: torch.Tensor | None = None
        for one in self._recording.passes:
            if slot is None:
                starts = (first for first, count, _ in one.rows.spans if count == len(ids))
                slot = next(
                    one.slots[first] for first in starts if torch.equal(one.rows.tokens[first : first + len(ids)], ids)
                )
                found["prefill"] = _of_slot(one, slot)
            elif bool((one.slots == slot).any()):
                found["decode"] = _of_slot(one, slot)
                break
        for stream, row in zip(found.values(), scores, strict=True):
            stream[SCORES] = row
        return found


def _of_slot(one: _Pass, slot: torch.Tensor) -> _Stream:
    """Return the stream of one slot's tokens; after the last layer only tokens whose scores are computed are left."""
    mine = one.slots == slot
    chosen = mine[one.rows.last.long()]
    return {name: value[mine] if len(value) == len(mine) else value[chosen] for name, value in one.stream.items()}
