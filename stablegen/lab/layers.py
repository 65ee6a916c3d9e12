"""Experiment 3: where in a transformer the difference arises, and how it grows from layer to layer.

One sequence runs alone, and as row 0 of larger batches whose other rows have the same length: nothing is padded, the
batch size alone changes. After each half of each layer the residual stream of that sequence is compared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, Native, load_policy
from stablegen.core.request import ModelIdentity, Request
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import GPT2Engine
from stablegen.engine.loading import kernels_for, torch_device
from stablegen.engine.transformers.decode import computing, cpu_threads
from stablegen.errors import DeviceMemoryError, ParameterError
from stablegen.kernels.base import Cache, KernelSet, Linear, Norm, Placed, Rows
from stablegen.lab.bits import same_bits
from stablegen.lab.machine import Machine, free_memory, machine_of
from stablegen.lab.progress import ticker
from stablegen.lab.subject import DTYPES, RANDOM, Subject, load_subject
from stablegen.lab.tables import grouped, say, sheet
from stablegen.machine.digests import DigestMemory
from stablegen.machine.plan import find_device, numerics_on
from stablegen.sources.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress

Stage = Literal["prefill", "decode"]
BATCHES = (2, 4, 8, 16, 32, 64)
LENGTH = 32
"""Tokens of the sequence."""
MIDDLES = ("ln_2", "post_attention_layernorm")
"""What a block's second norm is called: it reads the residual stream between attention and MLP."""
MEANING = (
    "A difference enters at the first layer whose kernel takes another order of sums for another batch size; each "
    "layer after it passes it on and adds its own."
)

_Stream = dict[str, torch.Tensor]
"""The residual stream of the sequence by where it was looked at, and its last scores."""


class LayerDifference(Frozen):
    """How far one place of the residual stream moved; ``largest``: the largest number there, in size."""

    layer: str
    max_abs: float
    l2: float
    equal: bool
    largest: float


class LayersInCompany(Frozen):
    """The sequence as row 0 of a batch against the sequence alone, in the order of the layers.

    ``prefill`` computes the whole sequence, ``decode`` the token that follows it.
    """

    kernels: Literal["vendor", "stablegen"]
    dtype: str
    stage: Stage
    batch: int
    layers: tuple[LayerDifference, ...]

    @property
    def first(self) -> str | None:
        """Return the first layer that differs; None where none does."""
        return next((one.layer for one in self.layers if not one.equal), None)

    @property
    def worst(self) -> LayerDifference | None:
        """Return the layer of the largest difference, its scores aside; None where none differs."""
        moved = [one for one in self.layers if not one.equal and one.layer != "scores"]
        return max(moved, key=lambda one: one.max_abs, default=None)


class LayersReport(Frozen):
    """What the experiment found; ``length`` in tokens."""

    model: str
    machine: Machine
    seed: int
    length: int
    batches: tuple[int, ...]
    runs: tuple[LayersInCompany, ...]
    unavailable: dict[str, str]
    seconds: float

    @property
    def meaning(self) -> str:
        """Return in words what was seen."""
        seen = []
        for kernels in dict.fromkeys(run.kernels for run in self.runs):
            mine = [run for run in self.runs if run.kernels == kernels]
            seen.append(f"{kernels} moved in {sum(run.first is not None for run in mine)} of {len(mine)} runs")
        return f"{MEANING} Here {', '.join(seen)}."

    @property
    def ordered(self) -> list[LayersInCompany]:
        """Return the runs by kernels, dtype and stage, and then by batch."""
        groups = list(dict.fromkeys((run.kernels, run.dtype, run.stage) for run in self.runs))
        return sorted(self.runs, key=lambda run: (groups.index((run.kernels, run.dtype, run.stage)), run.batch))


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
    """Compare each layer of a model for one sequence, alone and in batches, under transformers and under stablegen.

    ``model``: the embedded ``tiny-gpt2`` if None; ``random_weights``: GPT-2 small's shape instead. ``dtypes``: those
    that suit the device if none. Raises ``ParameterError`` for what cannot be measured, ``DeviceError`` or
    ``ModelError`` where device or model cannot be had.
    """
    started = time.perf_counter()
    if random_weights and model is not None:
        raise ParameterError(f"model={model!r} together with random weights", accepted="one of the two")
    if not batches or any(batch < 2 for batch in batches):
        raise ParameterError(f"batch={','.join(map(str, batches))}", accepted="whole numbers from 2 on")
    place = find_device(device, "float32")
    torch_device(place.name)
    checkpoint = None if random_weights else open_checkpoint(model, revision, DigestMemory(None))
    chosen = tuple(dict.fromkeys(dtypes)) or DTYPES["cuda" if place.is_cuda else "cpu"]
    for dtype in chosen:
        find_device(device, dtype)
    tick = ticker(progress, 2 * len(chosen) * (len(batches) + 1))
    runs: list[LayersInCompany] = []
    unavailable: dict[str, str] = {}
    for dtype in chosen:
        subject = load_subject(checkpoint, place, dtype)
        if not 1 <= length < subject.context:
            raise ParameterError(f"length={length}", accepted=f"1 to {subject.context - 1} tokens")
        lanes: dict[Literal["vendor", "stablegen"], Callable[[Sequence[Sequence[int]]], dict[Stage, _Stream]]]
        lanes = {"vendor": _Native(subject).run}
        if subject.model.config.model_type == "gpt2":
            lanes["stablegen"] = _Own(subject, max(batches), length).run
        else:
            unavailable["stablegen"] = f"its kernels run GPT-2, and this is a {subject.model.config.model_type}"
        sequences = _sequences(subject, length, max(batches), seed)
        for kernels, run in lanes.items():
            alone = _fitting(run, sequences[:1])
            tick()
            for batch in batches:
                together = _fitting(run, sequences[:batch])
                runs += [
                    LayersInCompany(
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
        model=RANDOM if checkpoint is None else checkpoint.identity.name,
        machine=machine_of(place),
        seed=seed,
        length=length,
        batches=tuple(batches),
        runs=tuple(runs),
        unavailable=unavailable,
        seconds=time.perf_counter() - started,
    )


def _fitting(
    run: Callable[[Sequence[Sequence[int]]], dict[Stage, _Stream]], sequences: Sequence[Sequence[int]]
) -> dict[Stage, _Stream]:
    """Return what a run of sequences shows; raise ``DeviceMemoryError`` where they do not fit."""
    try:
        return run(sequences)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"a batch of {len(sequences)} rows did not fit into the device's memory", hint="Use fewer rows with --batch"
        ) from error


def _sequences(subject: Subject, length: int, count: int, seed: int) -> list[list[int]]:
    """Return random sequences, no two beginning alike: what begins alike is computed once."""
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


# --- transformers as it is --------------------------------------------------------------------------------------------


class _Native:
    """Transformers' own forward pass, looked at through hooks."""

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._threads = numerics_on(subject.device, Native(), subject.dtype).threads
        lists = [part for part in self._model.modules() if isinstance(part, torch.nn.ModuleList) and len(part)]
        self._blocks = lists[0]
        self._next: int | None = None

    def run(self, sequences: Sequence[Sequence[int]]) -> dict[Stage, _Stream]:
        """Return the stream of the first sequence: as it is computed, and one token on."""
        ids = torch.tensor(sequences, device=self._model.device)
        with computing(self._model.device), cpu_threads(self._threads):
            with self._watched() as prefill:
                out = self._model(input_ids=ids, use_cache=True)
            prefill["scores"] = out.logits[0, -1].clone()
            if self._next is None:  # the answer of the sequence alone is every batch's next token
                self._next = int(prefill["scores"].argmax())
            following = ids[:, :1].clone()
            following[0] = self._next
            with self._watched() as decode:
                out = self._model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
            decode["scores"] = out.logits[0, -1].clone()
        return {"prefill": prefill, "decode": decode}

    @contextmanager
    def _watched(self) -> Iterator[_Stream]:
        """Collect row 0 of the residual stream before the layers, and after each half of each."""
        seen: _Stream = {}
        hooks = []

        def before(name: str, module: torch.nn.Module) -> None:
            def look(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                seen[name] = (given[0] if given else named["hidden_states"])[0].clone()

            hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))

        def after(name: str, module: torch.nn.Module) -> None:
            def look(_: torch.nn.Module, __: Any, out: Any) -> None:
                seen[name] = (out if isinstance(out, torch.Tensor) else out[0])[0].clone()

            hooks.append(module.register_forward_hook(look))

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


EMBEDDING = "embedding"


def attention_of(index: int) -> str:
    """Return the name of the stream after a layer's attention."""
    return f"{index} attention"


def mlp_of(index: int) -> str:
    """Return the name of the stream after a layer's MLP, which ends the layer."""
    return f"{index} MLP"


# --- the invariant kernels --------------------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """What one pass of the engine showed: its rows, and the stream of all tokens by place."""

    rows: Rows
    slots: torch.Tensor
    stream: _Stream


class _Watching:
    """A kernel set that keeps what another one returns of the residual stream."""

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
    """Stablegen's forward pass over the same weights, its kernels watched."""

    def __init__(self, subject: Subject, rows: int, length: int) -> None:
        model, device = subject.model, subject.model.device
        self._watching = _Watching(kernels_for(device))
        own = GPT2(
            model.config.to_dict(),
            model.state_dict(),
            cast("KernelSet", self._watching),
            dtype=getattr(torch, subject.dtype),
            device=device,
        )
        self._engine = GPT2Engine(own, _invariant(subject), chunk=rows * length, max_rows=rows, graphs=False)

    def run(self, sequences: Sequence[Sequence[int]]) -> dict[Stage, _Stream]:
        """Return the stream of the first sequence: as it is computed, and one token on."""
        identity = ModelIdentity(source="digest", digest="lab")
        params = GenerationParams(max_new_tokens=2)
        requests = tuple(Request(tuple(ids), params, identity, "") for ids in sequences)
        self._engine.forget()
        self._watching.passes.clear()
        scores: list[torch.Tensor] = []

        def observe(slot: int, row: torch.Tensor) -> None:
            if slot == 0:
                scores.append(row.clone())

        for _ in self._engine.generate(Batch(requests), observe):
            pass
        ids = torch.tensor(sequences[0], dtype=torch.int32, device=self._engine.model.device)
        found: dict[Stage, _Stream] = {}
        slot: torch.Tensor | None = None
        for one in self._watching.passes:
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
            stream["scores"] = row
        return found


def _of_slot(one: _Pass, slot: torch.Tensor) -> _Stream:
    """Return the stream of one slot's tokens; after the last layer only tokens that choose are left."""
    mine = one.slots == slot
    chosen = mine[one.rows.last.long()]
    return {name: value[mine] if len(value) == len(mine) else value[chosen] for name, value in one.stream.items()}


def _invariant(subject: Subject) -> Numerics:
    return numerics_on(subject.device, load_policy("invariant"), subject.dtype)


# --- showing ----------------------------------------------------------------------------------------------------------


def render(report: LayersReport, console: Console) -> None:
    """Print a report as tables."""
    say(console, f"layers: {report.model}, a sequence of {report.length} tokens, on {report.machine.summary()}")
    table = sheet("", "stage", "batch", "first that differs", "worst layer", "max abs there", "l2", "max abs of scores")
    for titles, counts, cells in grouped(
        ((f"{run.kernels} {run.dtype}", run.stage), run.batch, _cells(run)) for run in report.ordered
    ):
        table.add_row(*titles, counts, *cells)
    console.print(table)
    for name, reason in report.unavailable.items():
        say(console, f"not measured: {name}: {reason}")
    say(console, report.meaning)


def _cells(run: LayersInCompany) -> tuple[str, ...]:
    worst, scores = run.worst, run.layers[-1]
    return (
        run.first or "none",
        "none" if worst is None else worst.layer,
        "0, same bits" if worst is None else f"{worst.max_abs:.3g}",
        "" if worst is None else f"{worst.l2:.3g}",
        "0, same bits" if scores.equal else f"{scores.max_abs:.3g}",
    )
