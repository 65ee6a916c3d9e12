"""What each policy costs on this machine, against what it replaces, and the floor that its memory sets.

The time of one decode step is the difference of two whole calls, one of all tokens and one of a quarter of them,
divided by the tokens between them: the prefill and what a call costs once drop out. Arms of one batch size are all
warmed up first and then take turns, so that drift of the machine hits all alike. Prompts are random tokens and fresh
in every call, since an engine may compute a shared prefix once.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from stablegen.core.frozen import Frozen
from stablegen.engine.loading import torch_device
from stablegen.errors import DeviceMemoryError, ParameterError, StablegenError
from stablegen.lab.arms import ARMS, Arm, Prompts
from stablegen.lab.machine import Machine, free_memory, machine_of, synchronise
from stablegen.lab.progress import ticker
from stablegen.lab.subject import RANDOM, Subject, load_subject, random_context
from stablegen.lab.tables import sheet
from stablegen.machine.device import Device
from stablegen.machine.digests import DigestMemory
from stablegen.machine.plan import find_device
from stablegen.sources.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress

ONCE = ("single", "static")
"""Arms that are measured at batch 1 alone unless they are named: they would take long and say little more."""
PREFILL_ARMS = ("invariant", "vendor", "eager")
PREFILL_CALLS = 4
"""Calls of a prefill in each repeat: they are short, and vary."""
GOLDEN_ARMS = ("invariant", "eager")
GOLDEN_TOKENS = 64
GOLDEN_LENGTHS = (5, 200)
GOLDEN_RUNS = 3
"""Measured runs of the golden set; transformers, which takes longest, gets one."""
COPIES = 10
OUT_OF_MEMORY = "out of memory"

Clock = Callable[[], float]


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; None, or empty, where he left it to the machine."""

    model: str | None = None
    revision: str | None = None
    random_weights: bool = False
    dtypes: Sequence[str] = ()
    batches: Sequence[int] = ()
    prompt: int | None = None
    tokens: int | None = None
    repeats: int | None = None
    arms: Sequence[str] = ()
    prefill: str | None = None
    golden: int | None = None
    device: str = "auto"


class Plan(Frozen):
    """What is measured. ``prompt`` and ``tokens`` in tokens, ``prefill`` (prompts, tokens each), ``golden`` prompts.

    ``once`` names the arms that are measured at batch 1 alone.
    """

    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    prompt: int
    tokens: int
    repeats: int
    arms: tuple[str, ...]
    once: tuple[str, ...]
    prefill: tuple[int, int] | None
    golden: int

    @property
    def short(self) -> int:
        """Return the tokens of the shorter of the two calls whose difference is measured."""
        return max(1, self.tokens // 4)

    def at(self, batch: int) -> list[str]:
        """Return the arms that are measured at a batch size."""
        return [arm for arm in self.arms if batch == 1 or arm not in self.once]


def make_plan(options: Options, device: Device, context: int) -> Plan:
    """Return what to measure: what was asked, and for the rest sizes that suit the device.

    Raises ``ParameterError`` for what cannot be measured.
    """
    on_gpu = device.is_cuda
    half = "bfloat16" if device.capability is None or device.capability >= (8, 0) else "float16"
    unknown = [arm for arm in options.arms if arm not in ARMS]
    if unknown:
        raise ParameterError(f"arm {unknown[0]!r} is unknown", accepted=", ".join(ARMS))
    prompt = _count("prompt", options.prompt, 32)
    tokens = _count("tokens", options.tokens, 128 if on_gpu else 16, least=2)
    if prompt + tokens > context:
        raise ParameterError(
            f"prompt {prompt} and tokens {tokens} make {prompt + tokens} tokens",
            accepted=f"up to {context} together: the model's context",
        )
    batches = options.batches or ((1, 8, 32, 64, 256) if on_gpu else (1, 4))
    return Plan(
        dtypes=_unique(options.dtypes or (("float32", half) if on_gpu else ("float32",))),
        batches=_unique(_count("batch", batch, 1) for batch in batches),
        prompt=prompt,
        tokens=tokens,
        repeats=_count("repeats", options.repeats, 5),
        arms=_unique(options.arms or ARMS),
        once=tuple(arm for arm in ONCE if arm not in options.arms),
        prefill=_prefill(options.prefill, (16, 512) if on_gpu else (2, 64), context),
        golden=_golden(options.golden, 1000 if on_gpu else 8, context),
    )


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _count(name: str, given: int | None, default: int, *, least: int = 1) -> int:
    value = default if given is None else given
    if value < least:
        raise ParameterError(f"{name}={value}", accepted=f"a whole number, at least {least}")
    return value


def _prefill(given: str | None, default: tuple[int, int], context: int) -> tuple[int, int] | None:
    if given == "0":
        return None
    if given is None:
        rows, length = default[0], min(default[1], context - 1)
    else:
        match = re.fullmatch(r"(\d{1,6})x(\d{1,9})", given)
        rows, length = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= length < context or rows < 1:
            raise ParameterError(
                f"prefill={given!r}",
                accepted=f"PROMPTSxTOKENS such as '16x512', with 1 to {context - 1} tokens; '0' leaves it out",
            )
    return (rows, length) if length else None


def _golden(given: int | None, default: int, context: int) -> int:
    short = context < GOLDEN_LENGTHS[0] + GOLDEN_TOKENS
    if given is None:
        return 0 if short else default
    if given < 0:
        raise ParameterError(f"golden={given}", accepted="a number of prompts; 0 leaves it out")
    if given and short:
        raise ParameterError(
            f"golden={given}, and the model's context is {context}",
            accepted=f"a context of at least {GOLDEN_LENGTHS[0] + GOLDEN_TOKENS} tokens; 0 leaves it out",
        )
    return given


# --- what is found ----------------------------------------------------------------------------------------------------


class Spread(Frozen):
    """Repeats of one measurement, in the order they ran, and what summarises them; seconds."""

    values: tuple[float, ...]
    median: float
    lowest: float
    highest: float
    interquartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the summary of at least one value."""
        cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0] * 3
        return cls(
            values=tuple(values),
            median=statistics.median(values),
            lowest=min(values),
            highest=max(values),
            interquartile=cuts[2] - cuts[0],
        )


class Cell(Frozen):
    """One arm at one dtype and batch size: its measurements, or the ``problem`` that stopped it.

    ``step`` is the time of one decode step of the whole batch, ``call`` that of a call of ``new_tokens`` tokens.
    ``tokens_per_second`` counts new tokens, in a prefill the prompts'. ``faster_than_...`` is the other arm's median
    over this one's, by step where there is one, else by call.
    ``over_floor`` is the step's median over the floor. ``peak_memory`` is what the arm needs of the GPU at most, the
    model's weights included; ``memory`` what its engine says it holds; bytes.
    """

    arm: str
    dtype: str
    batch: int
    new_tokens: int
    note: str = ""
    problem: str | None = None
    step: Spread | None = None
    call: Spread | None = None
    tokens_per_second: float | None = None
    faster_than_eager: float | None = None
    faster_than_vendor: float | None = None
    over_floor: float | None = None
    peak_memory: int | None = None
    memory: dict[str, int] | None = None

    @property
    def time(self) -> Spread | None:
        """Return what arms are compared by."""
        return self.step or self.call


class Bandwidth(Frozen):
    """A copy from memory to the same memory: ``bytes_copied`` each, read once and written once; seconds."""

    bytes_copied: int
    seconds: Spread
    bytes_per_second: float


class Floor(Frozen):
    """The least time of a decode step in a dtype: its weights read once at the bandwidth measured."""

    dtype: str
    weight_bytes: int
    seconds: float


class Report(Frozen):
    """What ``stablegen bench`` measured; ``unavailable`` says why arms that were asked for do not run here.

    ``finished`` is false of what was kept before the end.
    """

    model: str
    machine: Machine
    plan: Plan
    arms: dict[str, str]
    unavailable: dict[str, str]
    bandwidth: Bandwidth
    floors: list[Floor]
    decode: list[Cell]
    prefill: list[Cell]
    golden: list[Cell]
    seconds: float
    finished: bool = True

    @property
    def cells(self) -> list[Cell]:
        """Return all cells."""
        return [*self.decode, *self.prefill, *self.golden]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    options: Options,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    keep: Callable[[Report], None] | None = None,
) -> Report:
    """Return the measurements that ``options`` ask for, on this machine.

    ``keep`` gets what there is after each table, so that what ends the process in between loses no more than one.
    Raises ``ParameterError`` for options that cannot be measured, ``DeviceError`` or ``ModelError`` where the device
    or the model cannot be had. An arm that fails or does not fit has its reason in its cell; the others go on.
    """
    started = clock()
    if options.random_weights and options.model is not None:
        raise ParameterError(f"model={options.model!r} together with random weights", accepted="one of the two")
    device = find_device(options.device, (*options.dtypes, "float32")[0])
    own = options.random_weights or (options.model is None and device.is_cuda)
    checkpoint = None if own else open_checkpoint(options.model, options.revision, DigestMemory(None))
    plan = make_plan(options, device, random_context() if checkpoint is None else checkpoint.context)
    for dtype in plan.dtypes:
        find_device(options.device, dtype)
    torch_device(device.name)

    found = {name: ARMS[name]().missing(device) for name in plan.arms}
    unavailable = {name: reason for name, reason in found.items() if reason is not None}
    arms = [name for name in plan.arms if name not in unavailable]
    tick = ticker(progress, _ticks(plan, arms))
    bandwidth = measure_bandwidth(device.name, clock)
    tick()
    floors: list[Floor] = []
    cells: dict[str, list[Cell]] = {"decode": [], "prefill": [], "golden": []}
    name = RANDOM if checkpoint is None else checkpoint.identity.name
    machine = machine_of(device)

    def report(*, finished: bool) -> Report:
        return Report(
            model=name,
            machine=machine,
            plan=plan,
            arms={name: ARMS[name].about for name in plan.arms},
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
        subject = load_subject(checkpoint, device, dtype)
        size = step_bytes(subject.model)
        floors.append(Floor(dtype=dtype, weight_bytes=size, seconds=size / bandwidth.bytes_per_second))
        tick()
        bench = Bench(subject, plan, clock, tick)
        for batch in plan.batches:
            add("decode", bench.decode([name for name in plan.at(batch) if name in arms], batch))
        add("prefill", bench.prefill([name for name in PREFILL_ARMS if name in arms]))
        add("golden", bench.golden([name for name in GOLDEN_ARMS if name in arms]))
        del subject, bench
        free_memory(device.name)
    return report(finished=True)


def _ticks(plan: Plan, arms: list[str]) -> int:
    decode = sum(1 for batch in plan.batches for arm in plan.at(batch) if arm in arms) * (plan.repeats + 1)
    prefill = sum(arm in arms for arm in PREFILL_ARMS) * (plan.repeats * PREFILL_CALLS + 1) if plan.prefill else 0
    golden = sum(_golden_runs(arm) + 1 for arm in GOLDEN_ARMS if arm in arms) if plan.golden else 0
    return 1 + len(plan.dtypes) * (1 + decode + prefill + golden)


def _golden_runs(arm: str) -> int:
    return 1 if arm == "eager" else GOLDEN_RUNS


class Gauge:
    """Follows what one arm holds of a GPU's memory, and needs at most, beside the others; nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._held = 0
        self.peak: int | None = None

    @contextmanager
    def phase(self, *, counts: bool = True) -> Iterator[None]:
        """Measure what the arm alone does inside; the peak only where it ``counts``."""
        if not self.device.startswith("cuda"):
            yield
            return
        others = torch.cuda.memory_allocated(self.device) - self._held
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if counts:
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated(self.device) - others)
        self._held = torch.cuda.memory_allocated(self.device) - others


@dataclass(slots=True)
class Lane:
    """One arm of a comparison: its times in seconds, and what stopped it."""

    arm: Arm
    gauge: Gauge
    calls: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    problem: str | None = None

    def attempt(self, action: Callable[..., None], *arguments: Any, counts: bool = True) -> None:
        """Do what may fail; a lane that has failed lets go of its memory and does nothing more."""
        if self.problem is not None:
            return
        try:
            with self.gauge.phase(counts=counts):
                action(*arguments)
        except (torch.OutOfMemoryError, DeviceMemoryError):
            self.problem = OUT_OF_MEMORY
        except StablegenError as error:
            self.problem = str(error)
        except Exception as error:  # whatever an arm raises is its result; the other arms go on
            self.problem = f"{type(error).__name__}: {error}"
        if self.problem is not None:
            self.close()

    def close(self) -> None:
        """Let go of what the arm holds."""
        self.arm.close()
        with suppress(RuntimeError):  # an arm may have left the device unusable; its cell says so
            free_memory(self.gauge.device)


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures arms on one subject; ``tick`` is called once a warm-up and once a repeat of each arm."""

    subject: Subject
    plan: Plan
    clock: Clock
    tick: Callable[[], None]
    arms: Mapping[str, type[Arm]] = field(default_factory=lambda: ARMS)

    def decode(self, names: Sequence[str], batch: int) -> list[Cell]:
        """Return a cell an arm: decode steps of ``batch`` prompts."""
        plan = self.plan
        lengths = [plan.prompt] * batch
        with self._lanes(names, batch, plan.prompt + plan.tokens) as lanes:
            for lane in lanes:
                # in full: libraries prepare a kernel for each length they meet, too
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
        """Return a cell an arm: prompts of equal length, one new token each."""
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
        """Return a cell an arm: a set of prompts of many lengths, all of which must be answered."""
        count = self.plan.golden
        if not count:
            return []
        lengths = golden_lengths(count, self.subject.context)
        with self._lanes(names, None, max(lengths) + GOLDEN_TOKENS) as lanes:
            for lane in lanes:
                lane.attempt(lane.arm.run_set, self._prompts(lengths, "golden warm"), GOLDEN_TOKENS)
                self.tick()
            for repeat in range(GOLDEN_RUNS):
                prompts = self._prompts(lengths, f"golden {repeat}")
                for lane in lanes:
                    if repeat < _golden_runs(lane.arm.name):
                        lane.attempt(self._time_set, lane, prompts)
                        self.tick()
            return [self._cell(lane, count, GOLDEN_TOKENS, count * GOLDEN_TOKENS) for lane in lanes]

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
        lane.calls.append(self._seconds(lambda: lane.arm.run_set(prompts, GOLDEN_TOKENS)))

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
            "peak_memory": None if peak is None else peak + (_bytes(subject.model) if arm.shares_model else 0),
            "memory": arm.memory(),
        }
        return cell.model_copy(update=found)


def _rotated(lanes: list[Lane], by: int) -> list[Lane]:
    """Return the lanes beginning with another one each time: none is always behind the same one."""
    start = by % len(lanes) if lanes else 0
    return lanes[start:] + lanes[:start]


def make_prompts(lengths: Sequence[int], vocabulary: int, seed: str) -> list[list[int]]:
    """Return prompts of random tokens, the same ones for the same seed."""
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def golden_lengths(count: int, context: int) -> list[int]:
    """Return the lengths in tokens of the golden set's prompts: always the same ones."""
    generator = random.Random("golden lengths")
    longest = min(GOLDEN_LENGTHS[1], context - GOLDEN_TOKENS)
    return [generator.randint(GOLDEN_LENGTHS[0], longest) for _ in range(count)]


def compare(cells: Sequence[Cell], floors: Sequence[Floor]) -> list[Cell]:
    """Return the cells with the ratios to the arms of the same dtype and batch, and to the floor."""
    medians = {(c.arm, c.dtype, c.batch): c.time.median for c in cells if c.time is not None}
    least = {floor.dtype: floor.seconds for floor in floors}
    found = []
    for cell in cells:
        if cell.time is None or cell.time.median <= 0:  # less than the clock's noise: there is no ratio
            found.append(cell)
            continue
        mine = cell.time.median
        ratios = {
            f"faster_than_{other}": medians[place] / mine
            for other in ("eager", "vendor")
            if (place := (other, cell.dtype, cell.batch)) in medians and other != cell.arm
        }
        if cell.step is not None:
            ratios["over_floor"] = mine / least[cell.dtype]
        found.append(cell.model_copy(update=ratios))
    return found


def measure_bandwidth(device: str, clock: Clock = time.perf_counter, *, size: int | None = None) -> Bandwidth:
    """Return how fast the device copies its own memory; ``size`` in bytes, by default what suits it."""
    cuda = device.startswith("cuda")
    if size is None:
        size = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 4) if cuda else 1 << 28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = COPIES if cuda else 1
    times = []
    for repeat in range(6):
        target.copy_(source)
        synchronise(device)
        before = clock()
        for _ in range(copies):
            target.copy_(source)
        synchronise(device)
        if repeat:  # the first one warms up
            times.append((clock() - before) / copies)
    del source, target
    free_memory(device)
    seconds = Spread.of(times)
    return Bandwidth(bytes_copied=size, seconds=seconds, bytes_per_second=2 * size / seconds.median)


def step_bytes(model: Any) -> int:
    """Return the bytes of weights that a decode step reads in full: all but what is only looked up by row."""
    head = model.get_output_embeddings()
    looked_up = {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.data_ptr() not in looked_up)


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# --- showing ----------------------------------------------------------------------------------------------------------


def render(report: Report, console: Console) -> None:
    """Print a report as tables."""
    from rich.text import Text

    plan, machine = report.plan, report.machine

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False)

    say(f"{report.model} on {machine.summary()}")
    if machine.device == "cpu":
        say("measured on the CPU: these figures say nothing about a GPU")
    copied = report.bandwidth
    say(
        f"memory copies at {copied.bytes_per_second / 1e9:,.0f} GB/s (read and written, median of "
        f"{len(copied.seconds.values)} copies of {copied.bytes_copied / 2**20:,.0f} MiB)"
    )
    problems: list[str] = []
    for floor in report.floors:
        say(
            f"\n{floor.dtype}: ms a decode step (times as fast as transformers eager), below it the range of "
            f"{plan.repeats} repeats; prompts of {plan.prompt} tokens, {plan.tokens} new ones"
        )
        cells = {(c.arm, c.batch): c for c in report.decode if c.dtype == floor.dtype}
        arms = [arm for arm in plan.arms if arm not in report.unavailable]
        made = sheet("", *(f"batch {batch}" for batch in plan.batches), no_wrap=True)
        for arm in arms:
            texts = (_cell_text(cells.get((arm, batch)), problems) for batch in plan.batches)
            made.add_row(ARMS[arm].label, *map(Text, texts))
        made.add_row("floor", *[_milliseconds(floor.seconds)] * len(plan.batches))
        for arm, title, ratio in (
            ("invariant", "invariant / floor", lambda cell: cell.over_floor),
            ("invariant", "invariant / vendor", lambda cell: _inverse(cell.faster_than_vendor)),
        ):
            ratios = [ratio(cells[arm, batch]) if (arm, batch) in cells else None for batch in plan.batches]
            if any(value is not None for value in ratios):
                made.add_row(title, *("" if value is None else f"{value:.2f} x" for value in ratios))
        console.print(made)
        say(f"the floor: {floor.weight_bytes / 1e6:,.1f} MB of weights, read once at the copies' speed")
        _render_memory(console, arms, cells, plan.batches)
        for title, workload in (
            (_prefill_title(plan), report.prefill),
            (f"golden set: {plan.golden} prompts, {GOLDEN_TOKENS} new tokens each", report.golden),
        ):
            found = [cell for cell in workload if cell.dtype == floor.dtype]
            if not found:
                continue
            say(f"\n{floor.dtype}, {title}")
            made = sheet("", "seconds", "range", "tokens/s", "x eager", "x vendor", no_wrap=True)
            for cell in found:
                made.add_row(ARMS[cell.arm].label, *map(Text, _call_texts(cell, problems)))
            console.print(made)
    for number, problem in enumerate(problems, start=1):
        say(f"[{number}] {problem}")
    for arm, reason in report.unavailable.items():
        say(f"not measured: {ARMS[arm].label}: {reason}")
    say(f"measured in {report.seconds:.0f} s")


def _prefill_title(plan: Plan) -> str:
    return "prefill" if plan.prefill is None else "prefill: {} x {} tokens".format(*plan.prefill)


def _render_memory(
    console: Console, arms: list[str], cells: Mapping[tuple[str, int], Cell], batches: Sequence[int]
) -> None:
    if not any(cell.peak_memory for cell in cells.values()):
        return
    made = sheet("peak GPU memory, MiB", *(f"batch {batch}" for batch in batches), no_wrap=True)
    for arm in arms:
        found = [cells.get((arm, batch)) for batch in batches]
        made.add_row(ARMS[arm].label, *(_mebibytes(cell.peak_memory if cell else None) for cell in found))
        for kind in ("weights", "kv_cache"):
            sizes = [(cell.memory or {}).get(kind) if cell else None for cell in found]
            if any(sizes):
                made.add_row(f"  of it {kind.replace('_', ' ')}", *map(_mebibytes, sizes))
    console.print(made)


def _cell_text(cell: Cell | None, problems: list[str]) -> str:
    if cell is None:
        return ""
    if cell.problem is not None:
        return _problem_text(cell.problem, problems)
    assert cell.step is not None
    ratio = "" if cell.faster_than_eager is None else f" ({cell.faster_than_eager:.2f}x)"
    spread = f"{_milliseconds(cell.step.lowest)}..{_milliseconds(cell.step.highest)}"
    note = f"\n{cell.note}" if cell.note else ""
    return f"{_milliseconds(cell.step.median)}{ratio}\n{spread}{note}"


def _call_texts(cell: Cell, problems: list[str]) -> list[str]:
    if cell.problem is not None:
        return [_problem_text(cell.problem, problems)]
    assert cell.call is not None
    return [
        f"{cell.call.median:.4g}",
        f"{cell.call.lowest:.4g}..{cell.call.highest:.4g}",
        "" if cell.tokens_per_second is None else f"{cell.tokens_per_second:,.0f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in (cell.faster_than_eager, cell.faster_than_vendor)),
    ]


def _problem_text(problem: str, problems: list[str]) -> str:
    if problem == OUT_OF_MEMORY:
        return OUT_OF_MEMORY
    if problem not in problems:
        problems.append(problem)
    return f"failed [{problems.index(problem) + 1}]"


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 1000 else f"{milliseconds:.3g}"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def _inverse(ratio: float | None) -> float | None:
    return None if not ratio else 1 / ratio
