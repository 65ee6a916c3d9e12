"""The lab's report: one experiment or all four, on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stablegen.frozen import Frozen
from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.tables import say

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress


class LabReport(Frozen):
    """The experiments that were run, and when, in Unix time."""

    created: float
    associativity: associativity.AssociativityReport | None = None
    matmul: matmul.MatmulReport | None = None
    layers: layers.LayersReport | None = None
    flips: flips.FlipsReport | None = None


def report_of(**found: Frozen) -> LabReport:
    """Return the report of experiments by name, as of now."""
    return LabReport(created=time.time(), **found)  # type: ignore[arg-type]  # pydantic checks them


def measure(
    *,
    model: str | None = None,
    revision: str | None = None,
    dtypes: Sequence[str] = (),
    tokens: int = flips.TOKENS,
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[str], Progress | None] = lambda _: None,
) -> LabReport:
    """Run all four experiments; ``progress`` returns, for an experiment's name, who hears how far it is.

    Raises what each of them raises.
    """
    return report_of(
        associativity=associativity.measure(device=device, seed=seed, progress=progress("associativity")),
        matmul=matmul.measure(device=device, seed=seed, progress=progress("matmul")),
        layers=layers.measure(
            model=model, revision=revision, dtypes=dtypes, device=device, seed=seed, progress=progress("layers")
        ),
        flips=flips.measure(
            model=model,
            revision=revision,
            dtypes=dtypes,
            tokens=tokens,
            prompts=prompts,
            count=count,
            device=device,
            progress=progress("flips"),
        ),
    )


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
    parts = (report.associativity, report.matmul, report.layers, report.flips)
    say(console, f"measured in {sum(part.seconds for part in parts if part is not None):.0f} s")
