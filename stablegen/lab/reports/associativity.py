"""What the experiment on the order of sums found."""

from __future__ import annotations

import math

from pydantic import ConfigDict

from stablegen.core.frozen import Frozen
from stablegen.lab.reports.machine import Machine

MEANING = (
    "Each addition is rounded, so (a + b) + c and a + (b + c) may differ, and so may the sum of the same numbers in "
    "another order. No order is wrong; another order gives another result."
)


class Triple(Frozen):
    """Three numbers as a dtype stores them, added from the left and from the right."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    device: str
    dtype: str
    a: float
    b: float
    c: float
    from_left: float
    from_right: float
    note: str = ""

    @property
    def differs(self) -> bool:
        """Return whether the two sums differ; NaN differs from every number."""
        both_nan = math.isnan(self.from_left) and math.isnan(self.from_right)
        return self.from_left != self.from_right and not both_nan


class OrderedSum(Frozen):
    """The sum of the numbers in one order; ``error`` is its distance from their exact sum."""

    order: str
    value: float
    error: float


class SumsInOrders(Frozen):
    """The sums of the same ``count`` random numbers of a dtype in several orders, on one device.

    ``exact`` is the exact sum of the numbers as the dtype stores them, rounded once to float64.
    """

    device: str
    dtype: str
    count: int
    exact: float
    sums: tuple[OrderedSum, ...]

    @property
    def results(self) -> int:
        """Return how many different results there are."""
        return len({one.value for one in self.sums})

    @property
    def spread(self) -> float:
        """Return the largest result minus the smallest."""
        values = [one.value for one in self.sums]
        return max(values) - min(values)


class AssociativityReport(Frozen):
    """What the experiment found, on the CPU and, where there is one, on the GPU."""

    machine: Machine
    seed: int
    triples: tuple[Triple, ...]
    sums: tuple[SumsInOrders, ...]
    seconds: float
