"""The lab's report: one experiment or several, on one machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from stablegen.core.frozen import Frozen
from stablegen.errors import InputFileError, ParameterError
from stablegen.lab.reports.associativity import AssociativityReport
from stablegen.lab.reports.flips import FlipsReport
from stablegen.lab.reports.layers import LayersReport
from stablegen.lab.reports.matmul import MatmulReport

Part = AssociativityReport | MatmulReport | LayersReport | FlipsReport


class LabReport(Frozen):
    """The experiments that were run, and when, in Unix time; ``problems``: why others failed."""

    created: float
    associativity: AssociativityReport | None = None
    matmul: MatmulReport | None = None
    layers: LayersReport | None = None
    flips: FlipsReport | None = None
    problems: dict[str, str] = Field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        """Return the reports of the experiments that were run."""
        found = (self.associativity, self.matmul, self.layers, self.flips)
        return [part for part in found if part is not None]


def report_of(**found: Frozen) -> LabReport:
    """Return the report of experiments by name, as of now."""
    return LabReport(created=time.time(), **found)  # type: ignore[arg-type]  # pydantic checks them


def read_report(file: Path) -> LabReport:
    """Return the report in a file that ``--json`` printed; raise ``InputFileError`` where it cannot be read."""
    try:
        return LabReport.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputFileError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        problem = str(error).splitlines()[0]
        raise InputFileError(
            f"{file} is not a report of the lab: {problem}", accepted="what stablegen lab printed with --json"
        ) from error


def join(reports: Sequence[LabReport]) -> LabReport:
    """Join several reports into one: each experiment once, and each dtype of ``flips`` once.

    Raises ``ParameterError`` where an experiment was run twice, or ``flips`` were run with different settings.
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
        raise ParameterError("these reports hold no experiment", accepted="at least one")
    problems = {name: problem for one in reports for name, problem in one.problems.items() if name not in parts}
    return LabReport(created=max(one.created for one in reports), problems=problems, **parts)  # type: ignore[arg-type]  # as above


def _join_flips(runs: Sequence[FlipsReport]) -> FlipsReport:
    first = runs[0]
    fields = ("model", "machine", "control", "baseline", "tokens")
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
