"""What each policy costs on this machine, against what it replaces, and the floor that its memory sets.

The time of one decode step is the difference of two whole calls, one of all tokens and one of a quarter of them,
divided by the tokens between them: the prefill and the fixed cost of a call cancel out. All arms of one batch size are
warmed up first and then take turns, so that drift of the machine affects all alike. Prompts are random tokens and new
in every call, since an engine may compute a shared prefix once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from stablegen.engine.loading import torch_device
from stablegen.errors import DeviceMemoryError, ParameterError, StablegenError
from stablegen.lab.arms import Arm, Prompts, known_arms
from stablegen.lab.bench_plan import Options, make_plan
from stablegen.lab.device import free_memory, machine_of
from stablegen.lab.gauges import Clock, Gauge, measure_bandwidth, step_bytes, weight_bytes
from stablegen.lab.progress import ticker
from stablegen.lab.reports.bench import OUT_OF_MEMORY, Cell, Floor, Plan, Report, Spread, compare
from stablegen.lab.subject import RANDOM, Subject, load_subject, random_context
from stablegen.machine.plan import find_device
from stablegen.sources.checkpoint import CheckpointSource

if TYPE_CHECKING:
    from stablegen.session.call import Progress

PREFILL_CALLS = 4
"""Calls of a prefill in each repeat: they are short, and vary."""

MakeArm = Callable[[], Arm]


def measure(
    options: Options,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    keep: Callable[[Report], None] | None = None,
) -> Report:
    """Return the measurements that ``options`` ask for, on this machine.

    ``keep`` receives an unfinished report after each table, so that an interruption loses at most one. Raises
    ``ParameterError`` for options that cannot be measured, ``DeviceError`` or ``ModelError`` where the device or the
    model cannot be used. An arm that fails or does not fit has the reason in its cell; the others go on.
    """
    started = clock()
    if options.random_weights and options.model is not None:
        raise ParameterError(f"model={options.model!r} together with random weights", accepted="one of the two")
    device = find_device(options.device, (*options.dtypes, "float32")[0])
    own = options.random_weights or (options.model is None and device.is_cuda)
    source = None if own else CheckpointSource.open(options.model, options.revision)
    makers = known_arms()
    kinds = {name: make() for name, make in makers.items()}
    context = random_context() if source is None else source.context
    plan = make_plan(options, device, context, {name: arm.once for name, arm in kinds.items()})
    for dtype in plan.dtypes:
        find_device(options.device, dtype)
    torch_device(device.name)

    unavailable = {name: reason for name in plan.arms if (reason := kinds[name].missing(device)) is not None}
    arms = [name for name in plan.arms if name not in unavailable]
    prefilled = [name for name, arm in kinds.items() if arm.prefills and name in arms]
    golden = [name for name, arm in kinds.items() if arm.golden_runs and name in arms]
    tick = ticker(progress, _ticks(plan, kinds, arms, prefilled, golden))
    bandwidth = measure_bandwidth(device.name, clock)
    tick()
    floors: list[Floor] = []
    cells: dict[str, list[Cell]] = {"decode": [], "prefill": [], "golden": []}
    machine = machine_of(device)

    def report(*, finished: bool) -> Report:
        return Report(
            model=RANDOM if source is None else source.identity.name,
            machine=machine,
            plan=plan,
            arms={name: kinds[name].about for name in plan.arms},
            labels={name: kinds[name].label for name in plan.arms},
            unavailable=unavailable,
            bandwidth=bandwidth,
            floors=floors,
            decode=compare(cells["decode"], floors),
            prefill=compare(cells["prefill"], floors),
            golden=compare(cells["golden"], floors),
            seconds=clock() - started,
            finished=finished,
        )

    def add(table: str, found: list[Cell]) -> None:
        cells[table] += found
        if keep is not None:
            keep(report(finished=False))

    add("decode", [])
    for dtype in plan.dtypes:
        subject = load_subject(source, device, dtype)
        size = step_bytes(subject.model)
        floors.append(Floor(dtype=dtype, weight_bytes=size, seconds=size / bandwidth.bytes_per_second))
        tick()
        bench = Bench(subject, plan, clock, tick, makers)
        for batch in plan.batches:
            add("decode", bench.decode([name for name in plan.at(batch) if name in arms], batch))
        add("prefill", bench.prefill(prefilled))
        add("golden", bench.golden(golden))
        del subject, bench
        free_memory(device.name)
    return report(finished=True)


def _ticks(
    plan: Plan, kinds: Mapping[str, Arm], arms: Sequence[str], prefilled: Sequence[str], golden: Sequence[str]
) -> int:
    decode = sum(1 for batch in plan.batches for arm in plan.at(batch) if arm in arms) * (plan.repeats + 1)
    prefill = len(prefilled) * (plan.repeats * PREFILL_CALLS + 1) if plan.prefill else 0
    sets = sum(kinds[arm].golden_runs + 1 for arm in golden) if plan.golden else 0
    return 1 + len(plan.dtypes) * (1 + decode + prefill + sets)


@dataclass(slots=True)
class Lane:
    """One arm of a comparison: its times in seconds, and the problem that stopped it."""

    arm: Arm
    gauge: Gauge
    calls: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    problem: str | None = None

    def attempt(self, action: Callable[..., None], *arguments: Any, counts: bool = True) -> None:
        """Run an action that may fail; a lane that has failed releases its memory and does nothing more."""
        if self.problem is not None:
            return
        try:
            with self.gauge.phase(counts=counts):
                action(*arguments)
        except (torch.OutOfMemoryError, DeviceMemoryError):
            self.problem = OUT_OF_MEMORY
        except StablegenError as error:
            self.problem = str(error)
        except Exception as error:  # any error of an arm is its result; the other arms go on
            self.problem = f"{type(error).__name__}: {error}"
        if self.problem is not None:
            self.close()

    def close(self) -> None:
        """Release the arm's memory."""
        self.arm.close()
        with suppress(RuntimeError):  # an arm may have left the device unusable; its cell says so
            free_memory(self.gauge.device)


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures arms on one subject; ``tick`` is called once for each arm's warm-up and once for each repeat."""

    subject: Subject
    plan: Plan
    clock: Clock
    tick: Callable[[], None]
    arms: Mapping[str, MakeArm]

    def decode(self, names: Sequence[str], batch: int) -> list[Cell]:
        """Return a cell for each arm: decode steps of ``batch`` prompts."""
        plan = self.plan
        lengths = [plan.prompt] * batch
        with self._lanes(names, batch, plan.prompt + plan.tokens) as lanes:
            for lane in lanes:
                # at full length: libraries prepare a kernel for each length they meet
                for tokens in (plan.tokens, plan.short):
                    prompts = self._prompts(lengths, f"decode {batch} warm {tokens}")
                    lane.attempt(lane.arm.run, prompts, tokens)
                self.tick()
            for repeat in range(plan.repeats):
                whole = self._prompts(lengths, f"decode {batch} {repeat} whole")
                part = self._prompts(lengths, f"decode {batch} {repeat} part")
                for lane in _rotated(lanes, repeat):
                    lane.attempt(self._time_step, lane, whole, part)
                    self.tick()
            return [self._cell(lane, batch, plan.tokens, batch * plan.tokens) for lane in lanes]

    def prefill(self, names: Sequence[str]) -> list[Cell]:
        """Return a cell for each arm: prompts of equal length, one new token each."""
        if self.plan.prefill is None:
            return []
        rows, length = self.plan.prefill
        lengths = [length] * rows
        with self._lanes(names, rows, length + 1) as lanes:
            for repeat in range(self.plan.repeats * PREFILL_CALLS + 1):
                prompts = self._prompts(lengths, f"prefill {repeat}")
                for lane in _rotated(lanes, repeat):
                    lane.attempt(self._time_prefill, lane, prompts, repeat > 0)
                    self.tick()
            return [self._cell(lane, rows, 1, rows * length) for lane in lanes]

    def golden(self, names: Sequence[str]) -> list[Cell]:
        """Return a cell for each arm: a set of prompts of many lengths, all of them answered."""
        count, tokens = self.plan.golden, self.plan.golden_tokens
        if not count:
            return []
        lengths = golden_lengths(count, *self.plan.golden_lengths)
        with self._lanes(names, None, max(lengths) + tokens) as lanes:
            for lane in lanes:
                lane.attempt(lane.arm.run_set, self._prompts(lengths, "golden warm"), tokens)
                self.tick()
            for repeat in range(max((lane.arm.golden_runs for lane in lanes), default=0)):
                prompts = self._prompts(lengths, f"golden {repeat}")
                for lane in lanes:
                    if repeat < lane.arm.golden_runs:
                        lane.attempt(self._time_set, lane, prompts)
                        self.tick()
            return [self._cell(lane, count, tokens, count * tokens) for lane in lanes]

    @contextmanager
    def _lanes(self, names: Sequence[str], batch: int | None, reach: int) -> Iterator[list[Lane]]:
        lanes = [Lane(self.arms[name](), Gauge(self.subject.device.name)) for name in names]
        try:
            for lane in lanes:
                lane.attempt(self._prepare, lane, batch, reach, counts=False)
            yield lanes
        finally:
            for lane in lanes:
                lane.close()

    def _prepare(self, lane: Lane, batch: int | None, reach: int) -> None:
        lane.arm.prepare(self.subject, batch, reach)
        free_memory(self.subject.device.name)

    def _prompts(self, lengths: Sequence[int], seed: str) -> list[list[int]]:
        return make_prompts(lengths, self.subject.vocabulary, seed)

    def _time_step(self, lane: Lane, whole: Prompts, part: Prompts) -> None:
        plan = self.plan
        long = self._seconds(lambda: lane.arm.run(whole, plan.tokens))
        short = self._seconds(lambda: lane.arm.run(part, plan.short))
        lane.calls.append(long)
        lane.steps.append((long - short) / (plan.tokens - plan.short))

    def _time_prefill(self, lane: Lane, prompts: Prompts, keep: bool) -> None:
        seconds = self._seconds(lambda: lane.arm.run(prompts, 1))
        if keep:
            lane.calls.append(seconds)

    def _time_set(self, lane: Lane, prompts: Prompts) -> None:
        lane.calls.append(self._seconds(lambda: lane.arm.run_set(prompts, self.plan.golden_tokens)))

    def _seconds(self, action: Callable[[], None]) -> float:
        before = self.clock()
        action()
        return self.clock() - before

    def _cell(self, lane: Lane, batch: int, new_tokens: int, tokens: int) -> Cell:
        arm, subject = lane.arm, self.subject
        cell = Cell(
            arm=arm.name,
            dtype=subject.dtype,
            batch=batch,
            new_tokens=new_tokens,
            note=arm.note(batch),
            problem=lane.problem,
        )
        if lane.problem is not None:
            return cell
        call, peak = Spread.of(lane.calls), lane.gauge.peak
        found = {
            "step": Spread.of(lane.steps) if lane.steps else None,
            "call": call,
            "tokens_per_second": tokens / call.median if call.median > 0 else None,
            "peak_memory": None if peak is None else peak + (weight_bytes(subject.model) if arm.shares_model else 0),
            "memory": arm.memory(),
        }
        return cell.model_copy(update=found)


def _rotated(lanes: list[Lane], by: int) -> list[Lane]:
    """Return the lanes, another one first each time, so that none always follows the same one."""
    start = by % len(lanes) if lanes else 0
    return lanes[start:] + lanes[:start]


def make_prompts(lengths: Sequence[int], vocabulary: int, seed: str) -> list[list[int]]:
    """Return prompts of random tokens, the same for the same seed."""
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def golden_lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Return the lengths in tokens of the golden set's prompts, the same in every run."""
    generator = random.Random("golden lengths")
    return [generator.randint(shortest, longest) for _ in range(count)]
