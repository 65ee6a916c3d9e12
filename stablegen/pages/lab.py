"""The page of the lab's report: the experiments that were run, as tables and charts, with a sentence on each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from markupsafe import Markup

from stablegen.lab.reports import associativity, flips, layers, matmul
from stablegen.lab.reports.lab import LabReport
from stablegen.lab.reports.wording import Cell, grouped
from stablegen.pages import charts
from stablegen.pages.charts import Series
from stablegen.pages.render import number, write_page

ShownCell = dict[str, str]
"""A cell as the template shows it: its text, and its class: ``same`` where bits are equal, ``moved`` where not."""


def write(report: LabReport, file: Path) -> None:
    """Write a report as a page; raise ``ParameterError`` where the file cannot be written."""
    machine = report.parts[0].machine
    write_page(
        "lab.html.j2",
        file,
        title=f"Batch variance on {machine.device_model}",
        measured=f"{datetime.fromtimestamp(report.created, UTC):%Y-%m-%d %H:%M} UTC",
        on=machine.summary(),
        seconds=sum(part.seconds for part in report.parts),
        tiles=_tiles(report),
        associativity=None if report.associativity is None else _associativity(report.associativity),
        matmul=None if report.matmul is None else _matmul(report.matmul),
        layers=None if report.layers is None else _layers(report.layers),
        flips=None if report.flips is None else _flips(report.flips),
        problems=report.problems,
    )


def _row(*texts: str, cells: Iterable[Cell] = ()) -> list[ShownCell]:
    """Return a row of plain texts and then of cells."""
    kinds = {None: "", True: "moved", False: "same"}
    return [{"text": cell.text, "kind": kinds[cell.moved]} for cell in (*map(Cell, texts), *cells)]


# --- the summary ------------------------------------------------------------------------------------------------------


def _tiles(report: LabReport) -> list[dict[str, str]]:
    """Return the report in a few figures, each with what it counts."""
    found: list[tuple[str, str, str]] = []
    if report.associativity is not None:
        sums = next(one for one in reversed(report.associativity.sums) if one.dtype == "float32")
        note = f"from {len(sums.sums)} orders of one float32 sum of {number(sums.count)} numbers"
        found.append(("Results", str(sums.results), note))
    if report.matmul is not None:
        moved = [one for one in report.matmul.comparisons if one.kernels == "vendor" and one.equal is False]
        worst = max((one.max_abs or 0.0 for one in moved if one.precision == "float32"), default=0.0)
        shape = f"{report.matmul.m} x {report.matmul.n} x {report.matmul.k}"
        found.append(("One product, larger calls", number(worst, 2), f"float32, largest difference at {shape}"))
    if report.layers is not None:
        worst_runs = [run for run in report.layers.runs if run.kernels == "vendor" and run.worst is not None]
        worst_run = max(worst_runs, key=lambda run: run.worst.max_abs if run.worst else 0.0, default=None)
        if worst_run is not None and worst_run.worst is not None:
            note = f"at layer {worst_run.worst.layer}, {worst_run.dtype}, batch {worst_run.batch}"
            found.append(("Worst layer", number(worst_run.worst.max_abs, 2), note))
        else:
            found.append(("Worst layer", "0", "no layer moved here"))
    if report.flips is not None:
        for one in report.flips.dtypes:
            flipped = sum(any(trial.flips for trial in p.trials if trial.cause != flips.MISTAKE) for p in one.prompts)
            note = f"of {len(one.prompts)} in {one.dtype}, by batch size or padding"
            found.append(("Answers that flip", str(flipped), note))
        flipped = sum(total.flipped for one in report.flips.dtypes for total in one.policies)
        moved_rows = sum(total.moved_steps for one in report.flips.dtypes for total in one.policies)
        steps = sum(total.steps for one in report.flips.dtypes for total in one.policies)
        names = ", ".join(dict.fromkeys(total.policy for one in report.flips.dtypes for total in one.policies))
        if names:
            found.append(
                ("Under the policies", str(flipped), f"{number(moved_rows)} of {number(steps)} rows moved; {names}")
            )
    return [{"label": label, "value": value, "note": note} for label, value, note in found]


# --- the experiments --------------------------------------------------------------------------------------------------


def _associativity(report: associativity.AssociativityReport) -> dict[str, Any]:
    triples = []
    for one in report.triples:
        numbers = (f"{value:g}" for value in (one.a, one.b, one.c))
        results = [Cell(f"{value:g}", moved=one.differs) for value in (one.from_left, one.from_right)]
        triples.append(_row(f"{one.device} {one.dtype}", *numbers, cells=[*results, Cell(one.note)]))
    names = [f"{sums.device} {sums.dtype}" for sums in report.sums]
    chart = charts.bars(
        "Different results of one sum, by dtype",
        names,
        {"different results": [sums.results for sums in report.sums]},
    )
    spreads = charts.bars(
        "Distance between the smallest and the largest result, by dtype",
        names,
        {"spread": [sums.spread for sums in report.sums]},
    )
    orders = [
        _row(order.order, *(f"{sums.sums[place].value:.9g}" for sums in report.sums))
        for place, order in enumerate(report.sums[0].sums)
    ]
    orders.append(_row("exact", *(f"{sums.exact:.9g}" for sums in report.sums)))
    return {
        "meaning": associativity.MEANING,
        "triples": triples,
        "count": report.sums[0].count,
        "orders_count": len(report.sums[0].sums),
        "chart": chart,
        "spreads": spreads,
        "names": names,
        "orders": orders,
    }


def _matmul(report: matmul.MatmulReport) -> dict[str, Any]:
    ways = []
    for way in get_args(matmul.Way):
        table = matmul.table_of(report, way, number)
        ways.append(
            {
                "title": matmul.TITLES[way],
                "head": ["rows" if way == "row" else "matrices", *table.head],
                "rows": [_row(counts, cells=cells) for counts, cells in table.rows],
            }
        )
    kernels = [
        _row(
            f"{line.kernels} {line.precision}",
            matmul.TITLES[line.way],
            line.counts,
            " + ".join(line.alone),
            cells=[Cell(" + ".join(line.together), None if line.alone == line.together else True)],
        )
        for line in matmul.kernel_lines(report)
    ]
    searched = [
        _row(
            one.precision,
            f"{one.m} x {one.n} x {one.k}",
            matmul.TITLES[one.way],
            cells=[
                Cell("none" if one.first is None else str(one.first), moved=one.first is not None),
                Cell(f"{one.moved} of {len(one.counts)}"),
                Cell(number(one.max_abs)),
            ],
        )
        for one in sorted(report.searched, key=lambda one: (matmul.PRECISIONS.index(one.precision), one.first is None))
    ]
    return {
        "meaning": matmul.MEANING,
        "shape": f"{report.m} x {report.k} times {report.k} x {report.n}",
        "ways": ways,
        "kernels": kernels,
        "searched": searched,
        "unavailable": report.unavailable,
    }


def _layers(report: layers.LayersReport) -> dict[str, Any]:
    figures = []
    for dtype in dict.fromkeys(run.dtype for run in report.runs):
        for stage in dict.fromkeys(run.stage for run in report.runs):
            chosen = [run for run in report.ordered if (run.kernels, run.dtype, run.stage) == ("vendor", dtype, stage)]
            moved = [run for run in chosen if run.worst is not None]
            if not moved:
                continue
            curves = grouped(
                ("", run.batch, [(place, one.max_abs) for place, one in enumerate(run.layers[:-1]) if one.max_abs > 0])
                for run in moved
            )
            series = [Series(f"batch {counts}", points) for _, counts, points in curves]
            chart = charts.lines(
                f"Largest difference by place in the model, {dtype}, {stage}",
                series,
                x_label="halves of layers from the embedding on",
                y_label="max abs",
                y_log=True,
            )
            worst = max((run.worst for run in moved if run.worst), key=lambda one: one.max_abs)
            only = f"; {series[0].name}" if len(series) == 1 else ""  # one line has no legend
            figures.append({"heading": f"{dtype}, {stage}", "note": f"worst: {worst.layer}{only}", "chart": chart})
    found = grouped(((f"{run.kernels} {run.dtype}", run.stage), run.batch, run.cells(number)) for run in report.ordered)
    return {
        "meaning": report.meaning,
        "model": report.model,
        "length": report.length,
        "figures": figures,
        "head": layers.HEAD,
        "rows": [_row(*titles, counts, cells=cells) for titles, counts, cells in found],
        "unavailable": report.unavailable,
    }


def _flips(report: flips.FlipsReport) -> dict[str, Any]:
    found = []
    for one in report.dtypes:
        totals = grouped((total.cause, total.setting, total.cells(number)) for total in one.totals)
        policies = grouped((total.policy, total.batch, total.cells()) for total in one.policies)
        found.append(
            {
                "dtype": one.dtype,
                "prompts": len(one.prompts),
                "by_batch": _by_batch(one),
                "by_padding": _by_padding(one),
                "rows": [_row(cause, settings, cells=cells) for cause, settings, cells in totals],
                "policies": [_row(policy, sizes, cells=cells) for policy, sizes, cells in policies],
                "notes": one.notes,
                "steps": _steps(one),
                "flips": [_shown(prompt, flip) for prompt in one.prompts for flip in prompt.shown],
            }
        )
    return {
        "meaning": report.meaning,
        "causes": flips.CAUSES,
        "head": flips.TOTAL_HEAD,
        "policy_head": flips.POLICY_HEAD,
        "control": report.control,
        "model": report.model,
        "baseline": report.baseline,
        "tokens": report.tokens,
        "dtypes": found,
        "skipped": report.skipped,
        "unavailable": report.unavailable,
    }


def _steps(found: flips.DtypeFlips) -> list[dict[str, str]]:
    """Return in which batches and at which steps prompts flip by rounding."""
    return [
        {
            "prompt": prompt.prompt,
            "batch": trial.batch,
            "steps": ", ".join(map(str, trial.flips)),
            "of": str(prompt.steps),
        }
        for prompt in found.prompts
        for trial in prompt.trials
        if trial.flips and trial.cause != flips.MISTAKE
    ]


def _by_batch(found: flips.DtypeFlips) -> Markup | None:
    """Return a chart of the prompts that flip by the rows of the batch; None where only one size was measured."""
    causes: tuple[flips.Cause, ...] = ("batch size", "mixed lengths")
    series = [
        Series(cause, points)
        for cause in causes
        if (points := [(total.setting, total.flipped) for total in found.totals if total.cause == cause])
    ]
    if not series:
        return None
    most = int(max(1, *(flipped for one in series for _, flipped in one.points)))
    return charts.lines(
        f"Prompts that flip by batch size, of {len(found.prompts)}, {found.dtype}",
        series,
        x_label="rows of the batch",
        y_label="prompts that flip",
        x_log=True,
        x_ticks=sorted({setting for one in series for setting, _ in one.points}),
        y_span=(0, most),
        y_ticks=range(0, most + 1, -(-most // 5)),
    )


def _by_padding(found: flips.DtypeFlips) -> Markup | None:
    """Return a chart of the prompts that flip by tokens of padding, with a mask and without; None without padding."""
    totals = {(total.cause, total.setting): total.flipped for total in found.totals}
    pads = sorted({setting for cause, setting in totals if cause == "padding"})
    causes: tuple[flips.Cause, ...] = ("padding", flips.MISTAKE)
    if not pads:
        return None
    return charts.bars(
        f"Prompts that flip by padding, of {len(found.prompts)}, {found.dtype}",
        [f"{pad} token{'s' if pad > 1 else ''} of padding" for pad in pads],
        {cause: [totals.get((cause, pad), 0) for pad in pads] for cause in causes},
        colours=("c3", "c5"),
    )


def _shown(prompt: flips.PromptFlips, flip: flips.Flip) -> dict[str, Any]:
    return {
        "prompt": prompt.prompt,
        "batch": flip.batch,
        "step": flip.step,
        "margin": flip.margin,
        "answer": prompt.answer,
        "tables": [_candidates(flip.baseline), _candidates(flip.other)],
    }


def _candidates(found: Sequence[flips.Candidate]) -> list[tuple[str, str]]:
    return [(one.text, f"{one.score:.6g}") for one in found]
