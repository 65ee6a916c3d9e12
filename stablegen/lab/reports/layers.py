"""What the experiment on the layers of a transformer found."""

from __future__ import annotations

from typing import Literal

from stablegen.core.frozen import Frozen
from stablegen.lab.reports.machine import Machine
from stablegen.lab.reports.wording import SAME_BITS, Cell, Form

Stage = Literal["prefill", "decode"]
Kernels = Literal["vendor", "stablegen"]
EMBEDDING = "embedding"
SCORES = "scores"
MEANING = (
    "A difference enters at the first layer whose kernel sums in another order at another batch size; each layer after "
    "it passes the difference on and adds its own."
)
HEAD = ("", "stage", "batch", "first that differs", "worst layer", "max abs there", "l2", "max abs of scores")
"""Columns of the report's table: kernels and dtype, stage, batch sizes, and the cells of ``LayersRun``."""


def attention_of(index: int) -> str:
    """Return the name of the residual stream after a layer's attention."""
    return f"{index} attention"


def mlp_of(index: int) -> str:
    """Return the name of the residual stream after a layer's MLP, which ends the layer."""
    return f"{index} MLP"


class LayerDifference(Frozen):
    """How far one place of the residual stream moved; ``largest``: the largest absolute value there."""

    layer: str
    max_abs: float
    l2: float
    equal: bool
    largest: float


class LayersRun(Frozen):
    """The sequence as row 0 of a batch against the sequence alone, layer by layer in their order.

    ``prefill`` computes the whole sequence, ``decode`` the token that follows it.
    """

    kernels: Kernels
    dtype: str
    stage: Stage
    batch: int
    layers: tuple[LayerDifference, ...]

    @property
    def first(self) -> str | None:
        """Return the first layer that differs; None where none does."""
        return next((one.layer for one in self.layers if not one.equal), None)

    @property
    def worst(self) -> LayerDifference | None:
        """Return the layer of the largest difference, without the scores; None where none differs."""
        moved = [one for one in self.layers if not one.equal and one.layer != SCORES]
        return max(moved, key=lambda one: one.max_abs, default=None)

    def cells(self, form: Form) -> tuple[Cell, ...]:
        """Return its cells of a table: see ``HEAD``."""
        worst, scores = self.worst, self.layers[-1]
        return (
            Cell(self.first or "none"),
            Cell("none" if worst is None else worst.layer),
            SAME_BITS if worst is None else Cell(form(worst.max_abs), moved=True),
            Cell("" if worst is None else form(worst.l2)),
            SAME_BITS if scores.equal else Cell(form(scores.max_abs), moved=True),
        )


class LayersReport(Frozen):
    """What the experiment found; ``length`` in tokens."""

    model: str
    machine: Machine
    seed: int
    length: int
    batches: tuple[int, ...]
    runs: tuple[LayersRun, ...]
    unavailable: dict[str, str]
    seconds: float

    @property
    def meaning(self) -> str:
        """Return in words what was found."""
        seen = []
        for kernels in dict.fromkeys(run.kernels for run in self.runs):
            mine = [run for run in self.runs if run.kernels == kernels]
            seen.append(f"{kernels} moved in {sum(run.first is not None for run in mine)} of {len(mine)} runs")
        return f"{MEANING} Here {', '.join(seen)}."

    @property
    def ordered(self) -> list[LayersRun]:
        """Return the runs by kernels, dtype and stage, and then by batch."""
        groups = list(dict.fromkeys((run.kernels, run.dtype, run.stage) for run in self.runs))
        return sorted(self.runs, key=lambda run: (groups.index((run.kernels, run.dtype, run.stage)), run.batch))
