"""What the experiment on matrix products found."""

from __future__ import annotations

from typing import Literal, NamedTuple

from stablegen.core.frozen import Frozen
from stablegen.lab.reports.machine import Machine
from stablegen.lab.reports.wording import SAME_BITS, Cell, Form, counts_text, grouped

Precision = Literal["float32", "tf32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "float16", "bfloat16")
Kernels = Literal["vendor", "stablegen"]
Lane = tuple[Kernels, Precision]
Way = Literal["batched", "stacked", "row"]
"""Slice 0 of ``bmm``; the first M rows of a product n times as tall; row 0 of a product of n rows."""
TITLES: dict[Way, str] = {
    "batched": "slice 0 of bmm",
    "stacked": "first rows of a taller product",
    "row": "row 0 among rows",
}
MEANING = (
    "A library picks its kernel, and with it the order of its sums, from the shape of the whole call. So the same "
    "product may have other bits in a larger call; where the table says 0, the library kept its order. stablegen's "
    "kernels fix the order by N and K alone."
)


class Comparison(Frozen):
    """A product computed alone against the same product in a larger call, of ``count`` matrices or rows.

    ``max_abs``: the largest difference of two elements; ``l2``: the square root of the sum of squared differences.
    ``allclose``: torch's, with its own tolerances; ``equal``: bit for bit. ``alone`` and ``together``: the kernels that
    ran, by torch's profiler. ``problem``: why it was not measured.
    """

    kernels: Kernels
    precision: Precision
    way: Way
    count: int
    max_abs: float | None = None
    l2: float | None = None
    allclose: bool | None = None
    equal: bool | None = None
    alone: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    problem: str | None = None

    def cell(self, form: Form) -> Cell:
        """Return its cell of a table."""
        if self.problem is not None or self.max_abs is None:
            return Cell(self.problem or "")
        if self.equal:
            return SAME_BITS
        return Cell(form(self.max_abs) + ("" if self.allclose else ", not allclose"), moved=True)


class Searched(Frozen):
    """One shape in one precision: how many of ``counts`` moved the vendor's result, and by how much at most.

    ``first``: the smallest count that moved it, None where none did; ``moved``: how many did.
    """

    precision: Precision
    way: Way
    m: int
    n: int
    k: int
    counts: tuple[int, ...]
    first: int | None
    moved: int
    max_abs: float


class MatmulReport(Frozen):
    """What the experiment found; M x K times K x N, numbers normal with variance 1."""

    machine: Machine
    seed: int
    m: int
    n: int
    k: int
    comparisons: tuple[Comparison, ...]
    searched: tuple[Searched, ...]
    unavailable: dict[str, str]
    seconds: float


class Table(NamedTuple):
    """The comparisons of one way: a column for each lane, and rows of counts and cells."""

    lanes: list[Lane]
    rows: list[tuple[str, list[Cell]]]

    @property
    def head(self) -> list[str]:
        """Return the names of the lanes."""
        return [f"{kernels} {precision}" for kernels, precision in self.lanes]


def table_of(report: MatmulReport, way: Way, form: Form) -> Table:
    """Return the table of one way; counts with the same figures share a row."""
    mine = [one for one in report.comparisons if one.way == way]
    lanes = list(dict.fromkeys((one.kernels, one.precision) for one in mine))
    cells = {(one.kernels, one.precision, one.count): one.cell(form) for one in mine}
    rows = [
        ("", count, [cells.get((*lane, count), Cell("")) for lane in lanes])
        for count in dict.fromkeys(one.count for one in mine)
    ]
    return Table(lanes, [(counts, row) for _, counts, row in grouped(rows)])


class KernelLine(NamedTuple):
    """The kernels that ran alone, and those that ran in larger calls of these counts."""

    kernels: Kernels
    precision: Precision
    way: Way
    counts: str
    alone: tuple[str, ...]
    together: tuple[str, ...]


def kernel_lines(report: MatmulReport) -> list[KernelLine]:
    """Return, for each way and precision, the kernels that ran alone and those that ran in larger calls."""
    lines = []
    for kernels, precision, way in dict.fromkeys(map(_kind, report.comparisons)):
        mine = [one for one in report.comparisons if _kind(one) == (kernels, precision, way)]
        for together in dict.fromkeys(one.together for one in mine if one.together):
            those = [one for one in mine if one.together == together]
            counts = counts_text([one.count for one in those], [one.count for one in mine])
            lines.append(KernelLine(kernels, precision, way, counts, those[0].alone, together))
    return lines


def _kind(one: Comparison) -> tuple[Kernels, Precision, Way]:
    return one.kernels, one.precision, one.way
