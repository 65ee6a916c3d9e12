"""The benchmark on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from stablegen.console.tables import say, sheet
from stablegen.core.policy import BATCH_INVARIANT, registered_policies
from stablegen.lab.reports.bench import OUT_OF_MEMORY, Cell, Floor, Plan, Report

if TYPE_CHECKING:
    from rich.console import Console

_Cells = Mapping[tuple[str, int], Cell]
"""The cells of one dtype by arm and batch size."""


def render(report: Report, console: Console) -> None:
    """Print a report as tables."""
    say(console, f"{report.model} on {report.machine.summary()}")
    if report.machine.device == "cpu":
        say(console, "measured on the CPU: these figures say nothing about a GPU")
    copied = report.bandwidth
    say(
        console,
        f"memory copies at {copied.bytes_per_second / 1e9:,.0f} GB/s (read and written, median of "
        f"{len(copied.seconds.values)} copies of {copied.bytes_copied / 2**20:,.0f} MiB)",
    )
    problems: list[str] = []
    for floor in report.floors:
        _render_dtype(report, floor, console, problems)
    for number, problem in enumerate(problems, start=1):
        say(console, f"[{number}] {problem}")
    for arm, reason in report.unavailable.items():
        say(console, f"not measured: {report.label(arm)}: {reason}")
    say(console, f"measured in {report.seconds:.0f} s")


def _render_dtype(report: Report, floor: Floor, console: Console, problems: list[str]) -> None:
    from rich.text import Text

    plan = report.plan
    say(
        console,
        f"\n{floor.dtype}: ms per decode step (times as fast as transformers eager), below it the range of "
        f"{plan.repeats} repeats; prompts of {plan.prompt} tokens, {plan.tokens} new tokens",
    )
    cells = {(cell.arm, cell.batch): cell for cell in report.decode if cell.dtype == floor.dtype}
    table = sheet("", *(f"batch {batch}" for batch in plan.batches), no_wrap=True)
    for arm in plan.arms:
        if arm not in report.unavailable:
            texts = (_step_text(cells.get((arm, batch)), problems) for batch in plan.batches)
            table.add_row(report.label(arm), *map(Text, texts))
    table.add_row("floor", *[_milliseconds(floor.seconds)] * len(plan.batches))
    for title, ratios in _ratios(plan, cells):
        table.add_row(title, *ratios)
    console.print(table)
    say(console, f"the floor: {floor.weight_bytes / 1e6:,.1f} MB of weights, read once at the copies' speed")
    _render_memory(report, cells, console)
    for title, measured in ((_prefill_title(plan), report.prefill), (_golden_title(plan), report.golden)):
        found = [cell for cell in measured if cell.dtype == floor.dtype]
        if found:
            say(console, f"\n{floor.dtype}, {title}")
            table = sheet("", "seconds", "range", "tokens/s", "x eager", "x vendor", no_wrap=True)
            for cell in found:
                table.add_row(report.label(cell.arm), *map(Text, _call_texts(cell, problems)))
            console.print(table)


def _ratios(plan: Plan, cells: _Cells) -> list[tuple[str, list[str]]]:
    """Return rows that compare stablegen's own kernels with the floor and with the vendor's."""
    ratios: dict[str, Callable[[Cell], float | None]] = {
        "floor": lambda cell: cell.over_floor,
        "vendor": lambda cell: None if not cell.faster_than_vendor else 1 / cell.faster_than_vendor,
    }
    found = []
    for arm in (kind.name for kind in registered_policies() if kind.engines == BATCH_INVARIANT):
        for other, ratio in ratios.items():
            values = [ratio(cells[arm, batch]) if (arm, batch) in cells else None for batch in plan.batches]
            if any(value is not None for value in values):
                texts = ["" if value is None else f"{value:.2f} x" for value in values]
                found.append((f"{arm} / {other}", texts))
    return found


def _prefill_title(plan: Plan) -> str:
    return "prefill" if plan.prefill is None else "prefill: {} x {} tokens".format(*plan.prefill)


def _golden_title(plan: Plan) -> str:
    return f"golden set: {plan.golden} prompts, {plan.golden_tokens} new tokens each"


def _render_memory(report: Report, cells: _Cells, console: Console) -> None:
    if not any(cell.peak_memory for cell in cells.values()):
        return
    plan = report.plan
    table = sheet("peak GPU memory, MiB", *(f"batch {batch}" for batch in plan.batches), no_wrap=True)
    for arm in plan.arms:
        if arm in report.unavailable:
            continue
        found = [cells.get((arm, batch)) for batch in plan.batches]
        table.add_row(report.label(arm), *(_mebibytes(cell.peak_memory if cell else None) for cell in found))
        for kind in ("weights", "kv_cache"):
            sizes = [(cell.memory or {}).get(kind) if cell else None for cell in found]
            if any(sizes):
                table.add_row(f"  of which {kind.replace('_', ' ')}", *map(_mebibytes, sizes))
    console.print(table)


def _step_text(cell: Cell | None, problems: list[str]) -> str:
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
    """Return a problem as its number in the list below the tables, to which it is added."""
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
