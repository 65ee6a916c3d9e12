"""What the benchmark measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import Field

from stablegen.core.frozen import Frozen
from stablegen.lab.reports.machine import Machine

OUT_OF_MEMORY = "out of memory"


class Plan(Frozen):
    """What is measured: ``prompt`` and ``tokens`` in tokens, ``prefill`` (prompts, tokens each), ``golden`` prompts.

    ``once`` names the arms that are measured at batch 1 alone. Golden prompts have ``golden_lengths`` (shortest,
    longest) tokens, their answers ``golden_tokens``.
    """

    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    prompt: int
    tokens: int
    repeats: int
    arms: tuple[str, ...]
    once: tuple[str, ...]
    prefill: tuple[int, int] | None
    golden: int
    golden_lengths: tuple[int, int]
    golden_tokens: int

    @property
    def short(self) -> int:
        """Return the tokens of the shorter of the two calls whose difference is measured."""
        return max(1, self.tokens // 4)

    def at(self, batch: int) -> list[str]:
        """Return the arms that are measured at a batch size."""
        return [arm for arm in self.arms if batch == 1 or arm not in self.once]


class Spread(Frozen):
    """Repeats of one measurement in the order they ran, with their summary; seconds."""

    values: tuple[float, ...]
    median: float
    lowest: float
    highest: float
    interquartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the summary of at least one value."""
        cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0] * 3
        return cls(
            values=tuple(values),
            median=statistics.median(values),
            lowest=min(values),
            highest=max(values),
            interquartile=cuts[2] - cuts[0],
        )


class Cell(Frozen):
    """One arm at one dtype and batch size: its measurements, or the ``problem`` that stopped it.

    ``step`` is the time of one decode step of the whole batch, ``call`` that of a call of ``new_tokens`` tokens.
    ``tokens_per_second`` counts new tokens, in a prefill those of the prompts. ``faster_than_...`` is the other arm's
    median over this one's, by step where there is one, else by call. ``over_floor`` is the step's median over the
    floor. ``peak_memory`` is the most GPU memory the arm needs, the model's weights included; ``memory`` what its
    engine says it holds; bytes.
    """

    arm: str
    dtype: str
    batch: int
    new_tokens: int
    note: str = ""
    problem: str | None = None
    step: Spread | None = None
    call: Spread | None = None
    tokens_per_second: float | None = None
    faster_than_eager: float | None = None
    faster_than_vendor: float | None = None
    over_floor: float | None = None
    peak_memory: int | None = None
    memory: dict[str, int] | None = None

    @property
    def time(self) -> Spread | None:
        """Return the times by which arms are compared."""
        return self.step or self.call


class Bandwidth(Frozen):
    """A copy within one memory: ``bytes_copied`` each, read once and written once; seconds."""

    bytes_copied: int
    seconds: Spread
    bytes_per_second: float


class Floor(Frozen):
    """The least time of a decode step in a dtype: its weights read once at the measured bandwidth."""

    dtype: str
    weight_bytes: int
    seconds: float


class Report(Frozen):
    """What ``stablegen bench`` measured.

    ``arms`` and ``labels``: what each arm is, in a sentence and in a word or two. ``unavailable``: why arms that were
    asked for do not run here. ``finished`` is False in a report that was written before the end.
    """

    model: str
    machine: Machine
    plan: Plan
    arms: dict[str, str]
    labels: dict[str, str] = Field(default_factory=dict)
    unavailable: dict[str, str]
    bandwidth: Bandwidth
    floors: list[Floor]
    decode: list[Cell]
    prefill: list[Cell]
    golden: list[Cell]
    seconds: float
    finished: bool = True

    @property
    def cells(self) -> list[Cell]:
        """Return all cells."""
        return [*self.decode, *self.prefill, *self.golden]

    def label(self, arm: str) -> str:
        """Return how tables name an arm."""
        return self.labels.get(arm, arm)


def compare(cells: Sequence[Cell], floors: Sequence[Floor]) -> list[Cell]:
    """Return the cells with their ratios to the arms of the same dtype and batch, and to the floor."""
    medians = {(c.arm, c.dtype, c.batch): c.time.median for c in cells if c.time is not None}
    least = {floor.dtype: floor.seconds for floor in floors}
    found = []
    for cell in cells:
        if cell.time is None or cell.time.median <= 0:  # below the clock's noise there is no ratio
            found.append(cell)
            continue
        mine = cell.time.median
        ratios = {
            f"faster_than_{other}": medians[place] / mine
            for other in ("eager", "vendor")
            if (place := (other, cell.dtype, cell.batch)) in medians and other != cell.arm
        }
        if cell.step is not None:
            ratios["over_floor"] = mine / least[cell.dtype]
        found.append(cell.model_copy(update=ratios))
    return found
