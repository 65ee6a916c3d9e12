"""The lab's reports on a terminal, a file for each experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablegen.console.lab import associativity, flips, layers, matmul
from stablegen.console.tables import say

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.lab.reports.lab import LabReport


def render(report: LabReport, console: Console) -> None:
    """Print the experiments that were run, one after the other."""
    if report.associativity is not None:
        associativity.render(report.associativity, console)
    if report.matmul is not None:
        matmul.render(report.matmul, console)
    if report.layers is not None:
        layers.render(report.layers, console)
    if report.flips is not None:
        flips.render(report.flips, console)
    for name, problem in report.problems.items():
        say(console, f"{name} failed: {problem}")
    say(console, f"measured in {sum(part.seconds for part in report.parts):.0f} s")
