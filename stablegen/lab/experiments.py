"""Run all four experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stablegen.core.frozen import Frozen
from stablegen.errors import DeviceMemoryError, EngineError, StablegenError
from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.reports.lab import LabReport, report_of

if TYPE_CHECKING:
    from stablegen.session.call import Progress


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
    """Run all four experiments; ``progress`` returns, for an experiment's name, what is told how far it is.

    An experiment that fails while it runs is among the ``problems``, and the others go on; where all fail, the last
    error is raised. Raises what each of them raises for settings that cannot be measured.
    """
    runs: dict[str, Callable[[Progress | None], Frozen]] = {
        # those that check the most arguments come first
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
