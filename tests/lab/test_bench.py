"""The benchmark: what it plans and how it measures; no figure of a real clock is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import small_gpt2

from stablegen.errors import DeviceMemoryError, EngineError, ParameterError
from stablegen.lab import bench, gauges
from stablegen.lab.arms import Arm, known_arms
from stablegen.lab.bench import Bench
from stablegen.lab.bench_plan import Options, make_plan
from stablegen.lab.compared import arm_names
from stablegen.lab.reports.bench import OUT_OF_MEMORY, Cell, Floor, Plan, Spread, compare
from stablegen.lab.subject import Subject
from stablegen.machine.device import Device

CPU = Device("cpu", "a processor", threads=1)
GPU = Device("cuda:0", "a GPU", capability=(9, 0), sm_count=132)


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(*, device: Device = CPU, context: int = 1024, known: dict[str, bool] | None = None, **asked: Any) -> Plan:
    if known is None:
        known = {name: make().once for name, make in known_arms().items()}
    return make_plan(Options(**asked), device, context, known)


def test_a_gpu_gets_the_whole_table_and_a_cpu_a_small_one() -> None:
    large, small = plan(device=GPU), plan()
    assert (large.batches, large.prompt, large.tokens, large.repeats) == ((1, 8, 32, 64, 256), 32, 128, 5)
    assert (large.dtypes, large.prefill, large.golden) == (("float32", "bfloat16"), (16, 512), 1000)
    assert (small.batches, small.tokens, small.dtypes) == ((1, 4), 16, ("float32",))
    assert large.arms == small.arms == arm_names()
    assert large.short == 32
    old = Device("cuda:0", "an old GPU", capability=(7, 5), sm_count=40)
    assert plan(device=old).dtypes == ("float32", "float16")


def test_slow_arms_are_measured_once_unless_they_are_named() -> None:
    assert plan().at(1) == list(arm_names())
    assert plan().at(8) == [name for name in arm_names() if name not in ("single", "static")]
    assert plan(arms=["single", "eager"]).at(8) == ["single", "eager"]


def test_the_rest_shrinks_to_a_short_context() -> None:
    assert plan(context=60).prefill == (2, 59)
    assert plan(context=60).golden == 0
    assert plan(context=200, device=GPU).prefill == (16, 199)
    short = plan(context=100)
    assert short.golden_lengths == (5, 36)
    assert max(bench.golden_lengths(500, *short.golden_lengths)) == 36
    assert plan(prefill="0", golden=0) == plan(prefill="0", golden=0, batches=[1, 4, 1])
    assert plan(prefill="0").prefill is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"batches": [0]}, "batch=0"),
        ({"batches": [1, -2]}, "batch=-2"),
        ({"prompt": 0}, "prompt=0"),
        ({"tokens": 1}, "tokens=1. Accepted: a whole number, at least 2"),
        ({"repeats": 0}, "repeats=0"),
        ({"prompt": 1000, "tokens": 25}, "make 1025 tokens. Accepted: up to 1024"),
        ({"arms": ["invariant", "magic"]}, "arm 'magic' is unknown. Accepted: invariant, vendor"),
        ({"prefill": "16"}, "prefill='16'"),
        ({"prefill": "0x16"}, "prefill='0x16'"),
        ({"prefill": "2x1024"}, "with 1 to 1023 tokens"),
        ({"golden": -1}, "golden=-1"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError) as raised:
        plan(**asked)
    assert said in str(raised.value)


def test_a_golden_set_needs_a_context() -> None:
    with pytest.raises(ParameterError, match="golden=3, and the model's context is 60"):
        plan(context=60, golden=3)


# --- measuring, by a clock that the test sets -------------------------------------------------------------------------


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = FakeClock()
LOG: list[tuple[str, int, tuple[tuple[int, ...], ...]]] = []


class FakeArm(Arm):
    """Takes a second a call and ``pace`` seconds a token; logs what it was given."""

    about = ""
    pace = 1.0

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        self.prepared = (batch, reach)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        LOG.append((self.name, new_tokens, tuple(map(tuple, prompts))))
        CLOCK.now += 1.0 + self.pace * new_tokens

    def close(self) -> None:
        LOG.append((self.name, -1, ()))


class Fast(FakeArm):
    name = label = "fast"
    pace = 0.5
    golden_runs = 3


class Slow(FakeArm):
    name = label = "eager"
    pace = 2.0
    golden_runs = 1


class Broken(FakeArm):
    name = label = "broken"

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        super().run(prompts, new_tokens)
        if len(LOG) > 8:
            raise ValueError("[no] such kernel")


class TooLarge(FakeArm):
    name = label = "large"
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory")

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        raise self.error


class WrongLength(FakeArm):
    name = label = "short"

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        raise EngineError("3 tokens were generated where 4 were asked for")


FAKES = {arm.name: arm for arm in (Fast, Slow, Broken, TooLarge, WrongLength)}
SUBJECT = Subject(None, "float32", CPU, 256, 50_000)

MakeBench = Callable[..., tuple[Bench, list[int]]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> MakeBench:
    LOG.clear()
    CLOCK.now = 0.0
    monkeypatch.setattr(bench, "free_memory", lambda _: None)

    def make(**asked: Any) -> tuple[Bench, list[int]]:
        ticks: list[int] = []
        wanted: dict[str, Any] = {"prompt": 3, "tokens": 8, "repeats": 3, "prefill": "2x5", "golden": 70} | asked
        planned = plan(context=256, known=dict.fromkeys(FAKES, False), **wanted)
        return Bench(SUBJECT, planned, CLOCK, lambda: ticks.append(1), FAKES), ticks

    return make


def median(spread: Spread | None) -> float:
    assert spread is not None
    return spread.median


def test_a_step_is_the_difference_of_two_calls(fake: MakeBench) -> None:
    measured, ticks = fake()
    fast, slow = measured.decode(["fast", "eager"], 2)
    assert fast.step is not None
    assert fast.step.values == (0.5, 0.5, 0.5)
    assert (median(fast.call), median(slow.step), median(slow.call)) == (5.0, 2.0, 17.0)
    assert fast.tokens_per_second == 16 / 5
    assert (fast.batch, fast.new_tokens, fast.peak_memory) == (2, 8, None)
    assert len(ticks) == 8


def test_arms_take_turns_after_their_warm_up_and_no_prompt_comes_twice(fake: MakeBench) -> None:
    measured, _ = fake()
    measured.decode(["fast", "eager"], 2)
    runs = [(name, tokens) for name, tokens, _ in LOG]
    warm = [("fast", 8), ("fast", 2), ("eager", 8), ("eager", 2)]
    turn = [[(name, 8), (name, 2)] for name in ("fast", "eager")]
    assert runs == warm + turn[0] + turn[1] + turn[1] + turn[0] + turn[0] + turn[1] + [("fast", -1), ("eager", -1)]
    mine = [prompts for name, _, prompts in LOG if name == "fast" and prompts]
    assert len({prompt for prompts in mine for prompt in prompts}) == 2 * len(mine) == 16
    assert [prompts for name, _, prompts in LOG if name == "eager" and prompts] == mine
    assert {len(prompt) for prompts in mine for prompt in prompts} == {3}


def test_an_arm_that_fails_says_why_and_the_others_go_on(fake: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, ticks = fake()
    cells = {cell.arm: cell for cell in measured.decode(["broken", "large", "short", "eager"], 2)}
    assert cells["broken"].problem == "ValueError: [no] such kernel"
    assert cells["large"].problem == OUT_OF_MEMORY
    assert cells["short"].problem == "3 tokens were generated where 4 were asked for."
    assert median(cells["eager"].step) == 2.0
    assert (cells["broken"].step, cells["broken"].call) == (None, None)
    assert len(ticks) == 16
    monkeypatch.setattr(TooLarge, "error", DeviceMemoryError("a batch did not fit"))
    (cell,) = measured.decode(["large"], 2)
    assert cell.problem == OUT_OF_MEMORY
    monkeypatch.setattr(TooLarge, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        measured.decode(["large"], 2)


def test_prefill_is_a_call_of_one_token(fake: MakeBench) -> None:
    measured, ticks = fake()
    fast, slow = measured.prefill(["fast", "eager"])
    assert fast.call is not None
    assert (fast.call.values, median(slow.call), fast.step) == ((1.5,) * 12, 3.0, None)
    assert fast.tokens_per_second == 10 / 1.5
    assert len({prompts for name, _, prompts in LOG if name == "eager" and prompts}) == 13
    assert {tokens for _, tokens, _ in LOG} == {1, -1}
    assert len(ticks) == 26
    assert fake(prefill="0")[0].prefill(["eager"]) == []


def test_the_golden_set_is_run_as_often_as_each_arm_says(fake: MakeBench) -> None:
    measured, ticks = fake()
    fast, slow = measured.golden(["fast", "eager"])
    assert fast.call is not None and slow.call is not None
    assert (len(fast.call.values), len(slow.call.values)) == (3, 1)
    assert slow.tokens_per_second == 70 * 64 / (1 + 2 * 64)
    counts = [(name, len(prompts)) for name, _, prompts in LOG if prompts]
    assert counts == [*[("fast", 70), ("eager", 70)] * 2, *[("fast", 70)] * 2]
    sizes = {len(prompt) for _, _, prompts in LOG for prompt in prompts}
    assert (min(sizes) >= 5, max(sizes) <= 192) == (True, True)
    assert len(ticks) == 6
    assert fake(golden=0)[0].golden(["eager"]) == []


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_spread_says_what_it_summarises() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (spread.median, spread.lowest, spread.highest, spread.interquartile) == (3.0, 1.0, 10.0, 2.0)
    assert spread.values == (4.0, 1.0, 2.0, 3.0, 10.0)
    assert Spread.of([2.0]).interquartile == 0.0


def cell(arm: str, step: float | None, *, call: float | None = None, **more: Any) -> Cell:
    timed: dict[str, Any] = {
        "step": None if step is None else Spread.of([step, step * 2, step / 2]),
        "call": None if call is None else Spread.of([call]),
    }
    return Cell.model_validate({"arm": arm, "dtype": "float32", "batch": 1, "new_tokens": 4} | timed | more)


def test_ratios_are_between_arms_of_one_dtype_and_batch() -> None:
    floors = [
        Floor(dtype="float32", weight_bytes=8, seconds=0.25),
        Floor(dtype="bfloat16", weight_bytes=4, seconds=0.1),
    ]
    found = compare(
        [
            *(cell("invariant", 1.0), cell("vendor", 0.5), cell("eager", 4.0)),
            *(cell("invariant", 2.0, batch=8), cell("eager", None, batch=8, problem=OUT_OF_MEMORY)),
            *(cell("invariant", 3.0, dtype="bfloat16"), cell("padded", 0.0)),
        ],
        floors,
    )
    assert [(c.faster_than_eager, c.faster_than_vendor, c.over_floor) for c in found] == [
        *((4.0, 0.5, 4.0), (8.0, None, 2.0), (None, 0.125, 16.0)),
        *((None, None, 8.0), (None, None, None)),
        *((None, None, pytest.approx(30.0)), (None, None, None)),
    ]
    first, second = compare([cell("invariant", None, call=2.0), cell("eager", None, call=5.0)], floors)
    assert (first.faster_than_eager, first.over_floor, second.faster_than_eager) == (2.5, None, None)


def test_the_floor_counts_what_a_step_reads() -> None:
    tied, untied = small_gpt2(), small_gpt2(tie_word_embeddings=False)
    words, positions, width = 4096, 256, 32
    layer = 12 * width * width + 13 * width
    stack = 2 * layer + 2 * width
    assert gauges.step_bytes(tied) == 4 * (stack + words * width)
    assert gauges.step_bytes(untied) == 4 * (stack + words * width)
    assert gauges.weight_bytes(tied) == 4 * (stack + words * width + positions * width)
    assert gauges.step_bytes(tied.half()) == 2 * (stack + words * width)


def test_bandwidth_counts_what_is_read_and_what_is_written() -> None:
    clock = FakeClock()

    def advancing() -> float:
        clock.now += 0.5
        return clock.now

    found = gauges.measure_bandwidth("cpu", advancing, size=1000)
    assert (found.bytes_copied, found.bytes_per_second, len(found.seconds.values)) == (1000, 4000.0, 5)


def test_an_arms_peak_leaves_out_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"now": 100, "peak": 100}

    def allocate(size: int) -> None:
        memory["now"] += size
        memory["peak"] = max(memory["peak"], memory["now"])

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: memory.update(peak=memory["now"]))
    gauge = gauges.Gauge("cuda:0")
    peaks = []
    with gauge.phase(counts=False):  # loads a copy, part of which stays
        allocate(50)
        allocate(-30)
    peaks.append(gauge.peak)
    allocate(1000)  # another arm
    for _ in range(2):
        with gauge.phase():
            allocate(7)
            allocate(-5)
        peaks.append(gauge.peak)
    assert peaks == [None, 20 + 7, 20 + 2 + 7]
    nothing = gauges.Gauge("cpu")
    with nothing.phase():
        pass
    assert nothing.peak is None
