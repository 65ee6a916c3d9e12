"""The command ``stablegen bench``: its reports, tables and pictures, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import small_directory, small_gpt2

from stablegen import cli
from stablegen.console.lab.bench import render
from stablegen.errors import MissingPackageError, ParameterError
from stablegen.lab import bench_plan, gauges
from stablegen.lab.arms import EagerArm
from stablegen.lab.bench import Bench
from stablegen.lab.device import machine_of
from stablegen.lab.plot import check_plot, draw
from stablegen.lab.reports.bench import OUT_OF_MEMORY, Bandwidth, Cell, Floor, Plan, Report, Spread
from stablegen.machine.device import Device

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, in an empty folder; return its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gauges, "CPU_BYTES", 1 << 20)

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


def small(*more: str) -> tuple[str, ...]:
    """Return arguments for a small model, batches of 1 and 2, and short prompts and answers."""
    sizes = ("--batch", "1,2", "--prompt", "4", "--tokens", "4", "--repeats", "2")
    return ("--model", str(small_directory()), *sizes, *more)


def shown(report: Report) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    render(report, console)
    return console.export_text()


def test_the_bench_measures_and_draws(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plan, "GOLDEN_TOKENS", 2)
    monkeypatch.setattr(bench_plan, "GOLDEN_LENGTHS", (3, 6))
    named = ("--arms", "single,padded", "--arms", "eager,invariant,static")
    others = ("--prefill", "2x6", "--golden", "3", "--json", "--plot", "steps.png", "--out", "report.json")
    code, out, err = run(*small(*named, *others))
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    report = Report.model_validate(content)
    assert (report.model, report.machine.device) == (str(small_directory()), "cpu")
    assert list(report.unavailable) == ["static"]
    measured = [(c.arm, c.batch) for c in report.decode]
    assert measured == [(arm, b) for b in (1, 2) for arm in ("single", "padded", "eager", "invariant")]
    assert [c.arm for c in report.prefill] == [c.arm for c in report.golden] == ["invariant", "eager"]
    assert [c.problem for c in report.cells] == [None] * 12
    assert [len(c.step.values) for c in report.decode if c.step] == [2] * 8
    assert all(c.call is not None and c.call.lowest > 0 for c in report.cells)
    assert report.bandwidth.bytes_per_second > 0
    assert report.floors[0].weight_bytes == gauges.step_bytes(small_gpt2())

    text = shown(report)
    parts = (
        *("on the CPU", "GB/s", "padded:N", "transformers eager", "floor", "invariant / floor"),
        *("prefill: 2 x 6 tokens", "golden set: 3 prompts, 2 new tokens each", "2 requests one after another"),
        "not measured: transformers static-compiled",
    )
    assert [part for part in parts if part not in text] == []


def test_what_ends_the_process_loses_no_table_that_was_done(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Bench, names: Sequence[str]) -> list[Cell]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "prefill", dies)
    code, _, _ = run(*small("--arms", "eager", "--golden", "0", "--out", "report.json"))
    assert code != 0
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert not report.finished
    assert [(c.arm, c.batch) for c in report.decode] == [("eager", 1), ("eager", 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_problems_are_shown_and_all_of_them_fail_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: EagerArm, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        raise RuntimeError("[red]kernel[/red] failed") if len(prompts) == 1 else torch.OutOfMemoryError("no")

    monkeypatch.setattr(EagerArm, "run", broken)
    code, out, _ = run(*small("--arms", "eager", "--prefill", "0", "--golden", "0"))
    assert code == 1
    assert "failed [1]" in out
    assert "out of memory" in out
    assert "[1] RuntimeError: [red]kernel[/red] failed" in out


def cell(arm: str, step: float, **more: object) -> Cell:
    return Cell.model_validate(
        {"arm": arm, "dtype": "float32", "batch": 1, "new_tokens": 4, "step": Spread.of([step, step * 2, step / 2])}
        | more
    )


def report_of(*cells: Cell) -> Report:
    spread = Spread.of([0.5])
    dtypes = ("float32", "bfloat16")
    plan = Plan(
        dtypes=dtypes,
        batches=(1, 4),
        prompt=32,
        tokens=16,
        repeats=5,
        arms=tuple(dict.fromkeys(cell.arm for cell in cells)),
        once=(),
        prefill=None,
        golden=0,
        golden_lengths=(5, 200),
        golden_tokens=64,
    )
    return Report(
        model="a model",
        machine=machine_of(Device("cpu", "a processor", threads=1)),
        plan=plan,
        arms={},
        unavailable={},
        bandwidth=Bandwidth(bytes_copied=1, seconds=spread, bytes_per_second=4.0),
        floors=[Floor(dtype=dtype, weight_bytes=1, seconds=0.01) for dtype in dtypes],
        decode=list(cells),
        prefill=[],
        golden=[],
        seconds=1.0,
    )


def test_memory_is_shown_where_it_was_measured() -> None:
    measured = cell("invariant", 1.0, peak_memory=3 * 2**20, memory={"weights": 2**20, "kv_cache": 2 * 2**20})
    text = shown(report_of(measured))
    assert "peak GPU memory, MiB" in text
    assert "of which kv cache" in text
    assert "peak GPU memory" not in shown(report_of(cell("eager", 1.0)))


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_the_picture_is_of_the_kind_its_name_says(suffix: str, tmp_path: Path) -> None:
    report = report_of(
        *(cell("eager", 1.0), cell("eager", 2.0, batch=4), cell("invariant", -0.1)),
        cell("padded", 1.0, problem=OUT_OF_MEMORY).model_copy(update={"step": None, "call": None}),
    )
    file = tmp_path / f"steps{suffix}"
    draw(report, file)
    assert file.stat().st_size > 1000
    with pytest.raises(ParameterError, match="cannot be written"):
        draw(report, tmp_path / "absent" / file.name)


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*small("--plot", "steps.gif"))[::2] == (
        2,
        "error: plot='steps.gif'. Accepted: a file that ends in .png, .svg, .pdf.\n",
    )
    assert "no such folder" in run(*small("--plot", "absent/steps.png"))[2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'stablegen\[plot\]'"):
        check_plot(tmp_path / "steps.png")
    code, out, err = run(*small("--plot", "steps.png"))
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
def test_wrong_usage_is_named(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run("--model", str(small_directory()), *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_its_help_names_the_arms_and_loads_nothing_heavy() -> None:
    code = "import sys\nfrom stablegen.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'transformers', 'triton', 'matplotlib'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "bench", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--golden" in shown
    assert "invariant, vendor, single, padded, eager" in " ".join(shown.split())
