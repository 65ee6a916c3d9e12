"""The bench: what it plans, how it measures, what it shows; no figure of a real clock is judged."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from support import small_gpt2

from stablegen import cli
from stablegen.errors import DeviceMemoryError, EngineError, MissingPackageError, ParameterError
from stablegen.lab import arms as arms_module
from stablegen.lab import bench
from stablegen.lab.arms import ARMS, Arm, EagerArm, StaticArm
from stablegen.lab.bench import Bench, Cell, Floor, Options, Plan, Report, Spread, compare, make_plan
from stablegen.lab.machine import machine_of
from stablegen.lab.plot import check_plot
from stablegen.lab.subject import Subject
from stablegen.machine.device import Device

CPU = Device("cpu", "a processor", threads=1)
GPU = Device("cuda:0", "a GPU", capability=(9, 0), sm_count=132)


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(*, on_gpu: bool = False, context: int = 1024, **asked: Any) -> Plan:
    return make_plan(Options(**asked), GPU if on_gpu else CPU, context)


def test_a_gpu_gets_the_whole_table_and_a_cpu_a_small_one() -> None:
    large, small = plan(on_gpu=True), plan()
    assert (large.batches, large.prompt, large.tokens, large.repeats) == ((1, 8, 32, 64, 256), 32, 128, 5)
    assert (large.dtypes, large.prefill, large.golden) == (("float32", "bfloat16"), (16, 512), 1000)
    assert (small.batches, small.tokens, small.dtypes) == ((1, 4), 16, ("float32",))
    assert large.arms == small.arms == tuple(ARMS)
    assert large.short == 32
    old = Device("cuda:0", "an old GPU", capability=(7, 5), sm_count=40)
    assert make_plan(Options(), old, 1024).dtypes == ("float32", "float16")


def test_slow_arms_are_measured_once_unless_they_are_named() -> None:
    assert plan().at(1) == list(ARMS)
    assert plan().at(8) == [name for name in ARMS if name not in ("single", "static")]
    assert plan(arms=["single", "eager"]).at(8) == ["single", "eager"]


def test_the_rest_shrinks_to_a_short_context() -> None:
    assert plan(context=60).prefill == (2, 59)
    assert plan(context=60).golden == 0
    assert plan(context=200, on_gpu=True).prefill == (16, 199)
    assert max(bench.golden_lengths(500, 100)) == 36
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


# --- measuring, by a clock that tells what it is told -----------------------------------------------------------------


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = FakeClock()
LOG: list[tuple[str, int, tuple[tuple[int, ...], ...]]] = []


class FakeArm(Arm):
    """Takes a second a call and ``pace`` seconds a token; notes what it was given."""

    about = ""
    pace = 1.0

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        self.prepared = (batch, reach)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        LOG.append((self.name, new_tokens, tuple(map(tuple, prompts))))
        CLOCK.now += 1.0 + self.pace * new_tokens

    def close(self) -> None:
        LOG.append((self.name, -1, ()))


class FakeInvariant(FakeArm):
    name = label = "invariant"
    pace = 0.5


class FakeEager(FakeArm):
    name = label = "eager"
    pace = 2.0


class Broken(FakeArm):
    name = label = "vendor"

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        super().run(prompts, new_tokens)
        if len(LOG) > 8:
            raise ValueError("[no] such kernel")


class TooLarge(FakeArm):
    name = label = "padded"
    error: ClassVar[Exception] = torch.OutOfMemoryError("CUDA out of memory")

    def prepare(self, subject: Subject, batch: int | None, reach: int) -> None:
        raise self.error


class WrongLength(FakeArm):
    name = label = "single"

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        raise EngineError("3 tokens were generated where 4 were asked for")


FAKES = {arm.name: arm for arm in (FakeInvariant, FakeEager, Broken, TooLarge, WrongLength)}
SUBJECT = Subject(None, "float32", CPU, 256, 50_000)


@pytest.fixture
def fake() -> Callable[..., tuple[Bench, list[int]]]:
    LOG.clear()
    CLOCK.now = 0.0

    def make(**asked: Any) -> tuple[Bench, list[int]]:
        ticks: list[int] = []
        wanted = {"prompt": 3, "tokens": 8, "repeats": 3, "prefill": "2x5", "golden": 70} | asked
        planned = plan(context=256, arms=list(FAKES), **wanted)
        return Bench(SUBJECT, planned, CLOCK, lambda: ticks.append(1), FAKES), ticks

    return make


def test_a_step_is_the_difference_of_two_calls(fake: Callable[..., Any]) -> None:
    measured, ticks = fake()
    invariant, eager = measured.decode(["invariant", "eager"], 2)
    assert invariant.step.values == (0.5, 0.5, 0.5)
    assert (invariant.call.median, eager.step.median, eager.call.median) == (5.0, 2.0, 17.0)
    assert invariant.tokens_per_second == 16 / 5
    assert (invariant.batch, invariant.new_tokens, invariant.peak_memory) == (2, 8, None)
    assert len(ticks) == 8


def test_arms_take_turns_after_their_warm_up_and_no_prompt_comes_twice(fake: Callable[..., Any]) -> None:
    measured, _ = fake()
    measured.decode(["invariant", "eager"], 2)
    runs = [(name, tokens) for name, tokens, _ in LOG]
    warm = [("invariant", 8), ("invariant", 2), ("eager", 8), ("eager", 2)]
    turn = [[(name, 8), (name, 2)] for name in ("invariant", "eager")]
    assert runs == warm + turn[0] + turn[1] + turn[1] + turn[0] + turn[0] + turn[1] + [("invariant", -1), ("eager", -1)]
    mine = [prompts for name, _, prompts in LOG if name == "invariant" and prompts]
    assert len({prompt for prompts in mine for prompt in prompts}) == 2 * len(mine) == 16
    assert [prompts for name, _, prompts in LOG if name == "eager" and prompts] == mine
    assert all(len(prompt) == 3 for prompts in mine for prompt in prompts)


def test_an_arm_that_fails_says_why_and_the_others_go_on(
    fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, ticks = fake()
    cells = {cell.arm: cell for cell in measured.decode(["vendor", "padded", "single", "eager"], 2)}
    assert cells["vendor"].problem == "ValueError: [no] such kernel"
    assert cells["padded"].problem == bench.OUT_OF_MEMORY
    assert cells["single"].problem == "3 tokens were generated where 4 were asked for."
    assert cells["eager"].step.median == 2.0
    assert (cells["vendor"].step, cells["vendor"].call) == (None, None)
    assert len(ticks) == 16
    monkeypatch.setattr(TooLarge, "error", DeviceMemoryError("a batch did not fit"))
    (cell,) = measured.decode(["padded"], 2)
    assert cell.problem == bench.OUT_OF_MEMORY
    monkeypatch.setattr(TooLarge, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        measured.decode(["padded"], 2)


def test_prefill_is_a_call_of_one_token(fake: Callable[..., Any]) -> None:
    measured, ticks = fake()
    invariant, eager = measured.prefill(["invariant", "eager"])
    assert (invariant.call.values, eager.call.median, invariant.step) == ((1.5,) * 12, 3.0, None)
    assert invariant.tokens_per_second == 10 / 1.5
    assert len({prompts for name, _, prompts in LOG if name == "eager" and prompts}) == 13
    assert {tokens for _, tokens, _ in LOG} == {1, -1}
    assert len(ticks) == 26
    assert fake(prefill="0")[0].prefill(["eager"]) == []


def test_the_golden_set_is_run_thrice_and_once_by_transformers(fake: Callable[..., Any]) -> None:
    measured, ticks = fake()
    invariant, eager = measured.golden(["invariant", "eager"])
    assert (len(invariant.call.values), len(eager.call.values)) == (3, 1)
    assert eager.tokens_per_second == 70 * 64 / (1 + 2 * 64)
    counts = [(name, len(prompts)) for name, _, prompts in LOG if prompts]
    assert counts == [*[("invariant", 70), ("eager", 70)] * 2, *[("invariant", 70)] * 2]
    sizes = {len(prompt) for _, _, prompts in LOG for prompt in prompts}
    assert (min(sizes) >= 5, max(sizes) <= 192) == (True, True)
    assert len(ticks) == 6
    assert fake(golden=0)[0].golden(["eager"]) == []


def test_a_spread_says_what_it_summarises() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (spread.median, spread.lowest, spread.highest, spread.interquartile) == (3.0, 1.0, 10.0, 2.0)
    assert spread.values == (4.0, 1.0, 2.0, 3.0, 10.0)
    assert Spread.of([2.0]).interquartile == 0.0


def cell(arm: str, step: float | None, *, call: float | None = None, **more: Any) -> Cell:
    timed = {
        "step": None if step is None else Spread.of([step, step * 2, step / 2]),
        "call": None if call is None else Spread.of([call]),
    }
    return Cell(**({"arm": arm, "dtype": "float32", "batch": 1, "new_tokens": 4} | timed | more))


def test_ratios_are_between_arms_of_one_dtype_and_batch() -> None:
    floors = [
        Floor(dtype="float32", weight_bytes=8, seconds=0.25),
        Floor(dtype="bfloat16", weight_bytes=4, seconds=0.1),
    ]
    found = compare(
        [
            *(cell("invariant", 1.0), cell("vendor", 0.5), cell("eager", 4.0)),
            *(cell("invariant", 2.0, batch=8), cell("eager", None, batch=8, problem=bench.OUT_OF_MEMORY)),
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
    assert bench.step_bytes(tied) == 4 * (stack + words * width)
    assert bench.step_bytes(untied) == 4 * (stack + words * width)
    assert sum(p.numel() for p in tied.parameters()) == stack + words * width + positions * width
    assert bench.step_bytes(tied.half()) == 2 * (stack + words * width)


def test_bandwidth_counts_what_is_read_and_what_is_written() -> None:
    clock = FakeClock()

    def advancing() -> float:
        clock.now += 0.5
        return clock.now

    found = bench.measure_bandwidth("cpu", advancing, size=1000)
    assert (found.bytes_copied, found.bytes_per_second, len(found.seconds.values)) == (1000, 4000.0, 5)


def test_an_arms_peak_leaves_out_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"now": 100, "peak": 100}

    def allocate(size: int) -> None:
        memory["now"] += size
        memory["peak"] = max(memory["peak"], memory["now"])

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: memory.update(peak=memory["now"]))
    gauge = bench.Gauge("cuda:0")
    with gauge.phase(counts=False):  # loads a copy, of which a part stays
        allocate(50)
        allocate(-30)
    assert gauge.peak is None
    allocate(1000)  # another arm
    for _ in range(2):
        with gauge.phase():
            allocate(7)
            allocate(-5)
    assert gauge.peak == 20 + 2 + 7
    nothing = bench.Gauge("cpu")
    with nothing.phase():
        pass
    assert nothing.peak is None


# --- the arms ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def subject() -> Subject:
    from transformers import GenerationConfig

    model = small_gpt2()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return Subject(model, "float32", CPU, 256, 4096)


def test_transformers_runs_a_set_in_groups_of_like_length(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms_module, "GROUP", 2)
    seen: list[tuple[list[int], torch.Tensor]] = []
    honest = subject.model.generate

    def generate(**arguments: Any) -> Any:
        mask = arguments["attention_mask"]
        seen.append((mask.sum(1).tolist(), mask[:, -1]))
        return honest(**arguments)

    monkeypatch.setattr(subject.model, "generate", generate)
    arm = EagerArm()
    arm.prepare(subject, None, 12)
    arm.run_set([[1] * 5, [2] * 2, [3] * 4], 3)
    assert [lengths for lengths, _ in seen] == [[2, 4], [5]]
    assert all(bool(last.all()) for _, last in seen)


def test_an_answer_of_another_length_is_no_measurement(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.model, "generate", lambda **arguments: arguments["input_ids"])
    arm = EagerArm()
    arm.prepare(subject, 1, 8)
    with pytest.raises(EngineError, match="0 tokens were generated where 4 were asked for"):
        arm.run([[1, 2]], 4)


def test_the_static_arm_asks_for_a_static_cache(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    arm = StaticArm()
    arm.prepare(subject, 2, 8)
    arm.run([[1, 2], [3, 4]], 3)
    assert arm._model is not subject.model
    assert hasattr(arm._model, "_previous_max_cache_length")
    arm.close()
    assert (arm._model, resets) == (None, [1])


def test_batch_invariant_ops_is_used_where_it_is_there(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = ARMS["batch_invariant_ops"]()
    assert "cannot be imported" in str(arm.missing(GPU))
    entered: list[bool] = []

    @contextlib.contextmanager
    def mode(enabled: bool) -> Any:
        entered.append(enabled)
        yield

    monkeypatch.setitem(sys.modules, "batch_invariant_ops", SimpleNamespace(set_batch_invariant_mode=mode))
    assert arm.missing(GPU) is None
    assert "GPU" in str(arm.missing(CPU))
    arm.prepare(subject, 1, 8)
    arm.run([[1, 2]], 2)
    assert entered == [True]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command in this process, in an empty folder; return its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stablegen", "bench", "--device", "cpu", *arguments])
        code = 0
        with warnings.catch_warnings():
            try:
                cli.main()
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return call


SMALL = ("--model", "tiny-gpt2", "--batch", "1,2", "--prompt", "4", "--tokens", "4", "--repeats", "2")


def test_the_bench_measures_and_draws(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GOLDEN_TOKENS", 2)
    monkeypatch.setattr(bench, "GOLDEN_LENGTHS", (3, 6))
    code, out, err = run(
        *(*SMALL, "--arms", "single,padded", "--arms", "eager,invariant,static", "--prefill", "2x6", "--golden", "3"),
        *("--json", "--plot", "steps.png", "--out", "report.json"),
    )
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    report = Report.model_validate(content)
    assert (report.model, report.machine.device, list(report.unavailable)) == ("tiny-gpt2", "cpu", ["static"])
    named = [(c.arm, c.batch) for c in report.decode]
    assert named == [(arm, b) for b in (1, 2) for arm in ("single", "padded", "eager", "invariant")]
    assert [c.arm for c in report.prefill] == [c.arm for c in report.golden] == ["invariant", "eager"]
    assert [c.problem for c in report.cells] == [None] * len(report.cells)
    assert all(len(c.step.values) == 2 for c in report.decode if c.step)
    assert all(c.call is not None and c.call.lowest > 0 for c in report.cells)
    assert report.bandwidth.bytes_per_second > 0
    assert report.floors[0].weight_bytes > 20e6

    console = Console(record=True, width=160, file=io.StringIO())
    bench.render(report, console)
    shown = console.export_text()
    parts = (
        "on the CPU",
        "GB/s",
        "padded:N",
        "transformers eager",
        "floor",
        "prefill: 2 x 6 tokens",
        "golden set: 3",
    )
    assert [part for part in parts if part not in shown] == []
    assert "2 requests one after another" in shown
    assert "not measured: transformers static-compiled" in shown


def test_what_ends_the_process_loses_no_table_that_was_done(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Bench, names: Sequence[str]) -> list[Cell]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "prefill", dies)
    code, _, _ = run(*SMALL, "--arms", "eager", "--golden", "0", "--out", "report.json")
    assert code != 0
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert not report.finished
    assert [(c.arm, c.batch) for c in report.decode] == [("eager", 1), ("eager", 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_problems_are_shown_and_all_of_them_fail_the_command(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: EagerArm, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        raise RuntimeError("[red]kernel[/red] failed") if len(prompts) == 1 else torch.OutOfMemoryError("no")

    monkeypatch.setattr(EagerArm, "run", broken)
    code, out, _ = run(*SMALL, "--arms", "eager", "--prefill", "0", "--golden", "0")
    assert code == 1
    assert "failed [1]" in out
    assert "out of memory" in out
    assert "[1] RuntimeError: [red]kernel[/red] failed" in out


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_the_picture_is_of_the_kind_its_name_says(suffix: str, tmp_path: Path) -> None:
    from stablegen.lab.plot import draw

    spread = Spread.of([0.5])
    report = Report(
        model="a model",
        machine=machine_of(CPU),
        plan=plan(dtypes=["float32", "bfloat16"]),
        arms={},
        unavailable={},
        bandwidth=bench.Bandwidth(bytes_copied=1, seconds=spread, bytes_per_second=4.0),
        floors=[Floor(dtype=dtype, weight_bytes=1, seconds=0.01) for dtype in ("float32", "bfloat16")],
        decode=[
            *(cell("eager", 1.0), cell("eager", 2.0, batch=4), cell("invariant", -0.1)),
            cell("padded", 1.0, problem=bench.OUT_OF_MEMORY).model_copy(update={"step": None, "call": None}),
        ],
        prefill=[],
        golden=[],
        seconds=1.0,
    )
    file = tmp_path / f"steps{suffix}"
    draw(report, file)
    assert file.stat().st_size > 1000
    with pytest.raises(ParameterError, match="cannot be written"):
        draw(report, tmp_path / "absent" / file.name)


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*SMALL, "--plot", "steps.gif")[::2] == (
        2,
        "error: plot='steps.gif'. Accepted: a file that ends in .png, .svg, .pdf.\n",
    )
    assert "no such folder" in run(*SMALL, "--plot", "absent/steps.png")[2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'stablegen\[plot\]'"):
        check_plot(tmp_path / "steps.png")
    code, out, err = run(*SMALL, "--plot", "steps.png")
    assert (code, out, "Traceback" in err) == (1, "", False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch", "0"), "batch=0"),
        (("--batch", "1,many"), "'many'"),
        (("--tokens", "2000"), "context"),
        (("--arms", "magic"), "magic"),
        (("--dtype", "float8"), "float8"),
        (("--dtype", "float32,int4"), "int4"),
        (("--random",), "random weights"),
        (("--prefill", "many"), "prefill='many'"),
        (("--out", "absent/report.json"), "absent"),
    ],
)
def test_wrong_usage_is_named(run: Callable[..., Any], arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run("--model", "tiny-gpt2", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_its_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom stablegen.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'transformers', 'triton', 'matplotlib'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "bench", "--help"]
    assert "--golden" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
