"""Sums in several orders, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablegen.console.tables import say, sheet
from stablegen.lab.reports.associativity import MEANING, AssociativityReport

if TYPE_CHECKING:
    from rich.console import Console


def render(report: AssociativityReport, console: Console) -> None:
    """Print a report as tables."""
    say(console, f"associativity: {report.machine.summary()}")
    table = sheet("device", "dtype", "a", "b", "c", "(a + b) + c", "a + (b + c)", "")
    for one in report.triples:
        numbers = (one.a, one.b, one.c, one.from_left, one.from_right)
        table.add_row(one.device, one.dtype, *(f"{number:.6g}" for number in numbers), one.note)
    console.print(table)
    for sums in report.sums:
        say(
            console,
            f"{sums.device} {sums.dtype}: {sums.count} random numbers in {len(sums.sums)} orders: {sums.results} "
            f"results, {sums.spread:.3g} apart (exact {sums.exact:.9g})",
        )
    table = sheet("order", *(f"{sums.device} {sums.dtype}" for sums in report.sums))
    for index, ordered in enumerate(report.sums[0].sums):
        table.add_row(ordered.order, *(f"{sums.sums[index].value:.9g}" for sums in report.sums))
    console.print(table)
    say(console, MEANING)
