"""Matrix products alone and in larger calls, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from stablegen.console.tables import cell_text, say, say_unavailable, sheet
from stablegen.lab.reports.matmul import MEANING, TITLES, MatmulReport, Way, kernel_lines, table_of
from stablegen.lab.reports.wording import short_number

if TYPE_CHECKING:
    from rich.console import Console


def render(report: MatmulReport, console: Console) -> None:
    """Print a report as tables."""
    say(console, f"matmul: {report.m} x {report.k} times {report.k} x {report.n} on {report.machine.summary()}")
    for way in get_args(Way):
        found = table_of(report, way, short_number)
        table = sheet("rows" if way == "row" else "matrices", *found.head)
        for counts, cells in found.rows:
            table.add_row(counts, *map(cell_text, cells))
        say(console, f"{TITLES[way]} against the same computed alone: largest difference")
        console.print(table)
    for line in kernel_lines(report):
        say(
            console,
            f"{line.kernels} {line.precision}, {TITLES[line.way]}: alone {' + '.join(line.alone)}; "
            f"{line.counts}: {' + '.join(line.together)}",
        )
    if report.searched:
        say(console, "other shapes whose product moved in a larger call:")
        table = sheet("precision", "M x N x K", "how", "from", "of counts", "largest difference")
        for one in report.searched:
            if one.first is not None:
                shape, share = f"{one.m} x {one.n} x {one.k}", f"{one.moved}/{len(one.counts)}"
                moved = (str(one.first), share, short_number(one.max_abs))
                table.add_row(one.precision, shape, TITLES[one.way], *moved)
        console.print(table)
    say_unavailable(console, report.unavailable)
    say(console, MEANING)
