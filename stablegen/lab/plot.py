"""Pictures of reports: step time over batch size, predicted against observed probabilities."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from stablegen.errors import MissingPackageError, ParameterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stablegen.core.audit import AuditReport
    from stablegen.lab.reports.bench import Cell, Report

SUFFIXES = (".png", ".svg", ".pdf")
_MARKERS = "osD^vPX"


def check_plot(file: Path) -> None:
    """Raise an error where no picture could be written, before hours of measuring end in it."""
    if file.suffix.lower() not in SUFFIXES:
        raise ParameterError(f"plot={str(file)!r}", accepted=f"a file that ends in {', '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise ParameterError(f"plot={str(file)!r}: there is no such folder", accepted="a file in a folder that exists")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"a picture needs matplotlib, which cannot be imported: {error}",
            hint="Install it with: pip install 'stablegen[plot]'",
        ) from error


def draw(report: Report, file: Path) -> None:
    """Write a report's decode steps to ``file``: a panel for each dtype, a line with error bars for each arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(report.floors), 5.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen; the file's suffix may select another canvas
    panels = figure.subplots(1, len(report.floors), sharey=True, squeeze=False)[0]
    for axes, floor in zip(panels, report.floors, strict=True):
        _panel(axes, report, floor.dtype, floor.seconds)
    panels[0].set_ylabel("ms a decode step")
    caption = (
        f"{report.model}; prompts of {report.plan.prompt} tokens, {report.plan.tokens} new tokens; median and range of "
        f"{report.plan.repeats} repeats; floor: weights read once at {report.bandwidth.bytes_per_second / 1e9:,.0f} "
        f"GB/s. {report.machine.summary()}"
    )
    figure.supxlabel(textwrap.fill(caption, 88 * len(report.floors)), fontsize="x-small")
    _save(figure, file)


def draw_reliability(report: AuditReport, file: Path) -> None:
    """Write an audit's predicted and observed probabilities to ``file``, with confidence bounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="calibrated")
    for one in report.reliability:
        seen = one.observed
        assert seen.value is not None
        bounds = [[seen.value - seen.low], [seen.high - seen.value]]
        axes.errorbar(one.predicted, seen.value, yerr=bounds, marker="o", capsize=3, color="C0")
        axes.annotate(str(seen.of), (one.predicted, seen.value), xytext=(6, 6), textcoords="offset points")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted probability of diverging", ylabel="observed")
    axes.legend(frameon=False)
    caption = (
        f"{report.model}, {report.numerics.summary()}: {report.audited} cached answers generated again; "
        "bars: 95 % confidence, numbers: answers"
    )
    figure.supxlabel(textwrap.fill(caption, 80), fontsize="x-small")
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise ParameterError(f"plot={str(file)!r} cannot be written: {error.strerror}") from error


def _panel(axes: Axes, report: Report, dtype: str, floor: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set(title=dtype, xlabel="batch size", xscale="log", yscale="log")
    for index, arm in enumerate(report.plan.arms):
        cells = [c for c in report.decode if (c.arm, c.dtype) == (arm, dtype) and _drawable(c)]
        if not cells:
            continue
        steps = [c.step for c in cells if c.step is not None]
        middle = [step.median * 1e3 for step in steps]
        # a logarithmic axis has no 0: a range that reaches it ends at a tenth of the median
        below = [(s.median - max(s.lowest, s.median / 10)) * 1e3 for s in steps]
        above = [(s.highest - s.median) * 1e3 for s in steps]
        axes.errorbar(
            [c.batch for c in cells],
            middle,
            yerr=(below, above),
            label=report.label(arm),
            color=f"C{index}",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            capsize=3,
        )
    axes.axhline(floor * 1e3, linestyle="--", color="black", label="floor")
    axes.set_xticks(report.plan.batches, labels=[str(batch) for batch in report.plan.batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")


def _drawable(cell: Cell) -> bool:
    return cell.step is not None and cell.step.median > 0
