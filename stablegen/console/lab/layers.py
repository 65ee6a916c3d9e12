"""The layers of a transformer alone and in batches, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablegen.console.tables import cell_text, say, say_unavailable, sheet
from stablegen.lab.reports.layers import HEAD, LayersReport
from stablegen.lab.reports.wording import grouped, short_number

if TYPE_CHECKING:
    from rich.console import Console


def render(report: LayersReport, console: Console) -> None:
    """Print a report as a table."""
    say(console, f"layers: {report.model}, a sequence of {report.length} tokens, on {report.machine.summary()}")
    table = sheet(*HEAD)
    rows = (((f"{run.kernels} {run.dtype}", run.stage), run.batch, run.cells(short_number)) for run in report.ordered)
    for titles, counts, cells in grouped(rows):
        table.add_row(*titles, counts, *map(cell_text, cells))
    console.print(table)
    say_unavailable(console, report.unavailable)
    say(console, report.meaning)
