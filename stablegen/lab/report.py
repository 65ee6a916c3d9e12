"""The lab's report: one experiment or all four, on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from stablegen.core.frozen import Frozen
from stablegen.errors import DeviceMemoryError, EngineError, InputFileError, ParameterError, StablegenError
from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.associativity import AssociativityReport
from stablegen.lab.flips import FlipsReport
from stablegen.lab.layers import LayersReport
from stablegen.lab.matmul import MatmulReport
from stablegen.lab.tables import say

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress


class LabReport(Frozen):
    """The experiments that were run, and when, in Unix time; ``problems``: of those that failed, why."""

    created: float
    associativity: AssociativityReport | None = None
    matmul: MatmulReport | None = None
    layers: LayersReport | None = None
    flips: FlipsReport | None = None
    problems: dict[str, str] = Field(default_factory=dict)


def report_of(**found: Frozen) -> LabReport:
    """Return the report of experiments by name, as of now."""
    return LabReport(created=time.time(), **found)  # type: ignore[arg-type]  # pydantic checks them


def read_report(file: Path) -> LabReport:
    """Return the report in a file that ``--json`` printed; raise ``InputFileError`` where it is none."""
    try:
        return LabReport.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputFileError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        problem = str(error).splitlines()[0]
        raise InputFileError(
            f"{file} holds no report: {problem}", accepted="what stablegen lab printed with --json"
        ) from error


def join(reports: Sequence[LabReport]) -> LabReport:
    """Return one report of several: each experiment once, of ``flips`` each dtype once.

    Raises ``ParameterError`` where one was run twice, or flips of unlike runs are to be joined.
    """
    names = ("associativity", "matmul", "layers", "flips")
    runs = {name: [found for one in reports if (found := getattr(one, name)) is not None] for name in names}
    parts: dict[str, Frozen] = {}
    for name, found in runs.items():
        if name == "flips" and found:
            parts[name] = _join_flips(found)
        elif len(found) > 1:
            raise ParameterError(f"{name} was run {len(found)} times", accepted="reports of different experiments")
        elif found:
            parts[name] = found[0]
    if not parts:
        raise ParameterError("no experiment in these reports", accepted="at least one")
    problems = {name: problem for one in reports for name, problem in one.problems.items() if name not in parts}
    return LabReport(created=max(one.created for one in reports), problems=problems, **parts)  # type: ignore[arg-type]  # as above


def _join_flips(runs: Sequence[FlipsReport]) -> FlipsReport:
    first = runs[0]
    fields = ("model", "machine", "baseline", "tokens")
    if any(getattr(run, name) != getattr(first, name) for run in runs for name in fields):
        raise ParameterError(
            "flips of several models, machines or sizes", accepted="flips that differ in the dtype alone"
        )
    dtypes = [one for run in runs for one in run.dtypes]
    if len({one.dtype for one in dtypes}) < len(dtypes):
        raise ParameterError("flips of one dtype twice", accepted="each dtype once")
    skipped = dict.fromkeys(line for run in runs for line in run.skipped)
    seconds = sum(run.seconds for run in runs)
    return first.model_copy(update={"dtypes": tuple(dtypes), "skipped": tuple(skipped), "seconds": seconds})


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

    One that fails while it runs is among the ``problems``, and the others go on; where all fail, the last one's error
    is raised. Raises what each of them raises for
    what cannot be measured at all.
    """
    runs: dict[str, Callable[[Progress | None], Frozen]] = {
        # first what is choosy about its arguments
        "flips": lambda bar: flips.measure(
            model=model,
            revision=revision,
            dtypes=dtypes,
            tokens=tokens,
            prompts=prompts,
            count=count,
            device=device,
            progress=bar,
        ),
        "layers": lambda bar: layers.measure(
            model=model, revision=revision, dtypes=dtypes, device=device, seed=seed, progress=bar
        ),
        "matmul": lambda bar: matmul.measure(device=device, seed=seed, progress=bar),
        "associativity": lambda bar: associativity.measure(device=device, seed=seed, progress=bar),
    }
    found: dict[str, Frozen] = {}
    problems: dict[str, str] = {}
    failure: StablegenError | None = None
    for name, run in runs.items():
        try:
            found[name] = run(progress(name))
        except (EngineError, DeviceMemoryError) as error:
            problems[name], failure = str(error), error
    if failure is not None and not found:
        raise failure
    return report_of(**found).model_copy(update={"problems": problems})


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
    parts = (report.associativity, report.matmul, report.layers, report.flips)
    say(console, f"measured in {sum(part.seconds for part in parts if part is not None):.0f} s")
