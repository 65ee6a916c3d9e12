"""Experiment 2: one matrix product alone, and the same product in company.

``A0 @ B0`` is computed alone, as slice 0 of a batched product, as the first rows of a taller one with the same right
operand, and its row 0 alone against row 0 among others. What changes is what else is computed in the same call; the
numbers multiplied are the same. Beside the vendor's libraries run stablegen's own kernels.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch does not say that it is there

from stablegen.core.frozen import Frozen
from stablegen.engine.loading import kernels_for, torch_device
from stablegen.errors import ParameterError
from stablegen.kernels.base import KernelSet, Linear
from stablegen.lab.bits import same_bits
from stablegen.lab.machine import Machine, available_memory, free_memory, machine_of, synchronise
from stablegen.lab.progress import ticker
from stablegen.lab.tables import counts_text, grouped, say, sheet
from stablegen.machine.device import Device
from stablegen.machine.plan import find_device

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress

Precision = Literal["float32", "tf32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "float16", "bfloat16")
Kernels = Literal["vendor", "stablegen"]
Lane = tuple[Kernels, Precision]
Way = Literal["batched", "stacked", "row"]
"""Slice 0 of ``bmm``; the first M rows of a product n times as tall; row 0 of a product of n rows."""
WAYS: tuple[Way, ...] = ("batched", "stacked", "row")
SHAPE = (512, 512, 512)
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100, 1000)
ROWS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512)
SEARCHED = {
    "cuda": (
        *((64, 64, 64), (128, 128, 128), (256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048)),
        *((16, 512, 4096), (64, 64, 4096), (128, 128, 8192), (512, 512, 4096), (64, 1024, 1024)),
        *((32, 2304, 768), (32, 768, 768), (32, 3072, 768), (32, 768, 3072), (16, 4096, 4096), (32, 50257, 768)),
    ),
    "cpu": ((64, 64, 64), (128, 128, 128), (256, 256, 256), (16, 512, 4096), (32, 2304, 768), (32, 768, 3072)),
}
"""Shapes (M, N, K) in which differences are looked for, by device: squares, long sums, and layers of GPT-2."""
SEARCHED_COUNTS = (2, 3, 4, 8, 16, 32, 64)
LIMIT = 10.0
"""Seconds that one product may take by what a single one took; it is left out beyond."""
CPU_OWN = 10
"""Matrices that stablegen's kernels stack on a CPU at most: there they take one row after the other."""
MEANING = (
    "A library picks its kernel, and with it the order of its sums, from the shape of the whole call. So the same "
    "product comes out otherwise in company, and where the table says 0 the library happened to keep its order. "
    "stablegen's kernels fix the order by N and K alone."
)


class Company(Frozen):
    """The product alone against the same product in company: ``count`` matrices or, of ``row``, rows.

    ``max_abs``: the largest difference of two elements; ``l2``: the square root of the sum of their squares.
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


class Searched(Frozen):
    """One shape in one precision: the company from which on the vendor's result moved, and by how much at most.

    ``first``: the smallest count that moved it, None where none of ``counts`` did; ``moved``: how many did.
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
    companies: tuple[Company, ...]
    searched: tuple[Searched, ...]
    unavailable: dict[str, str]
    seconds: float


class _Operands(NamedTuple):
    """``a`` [B, M, K] and ``b`` [B, K, N]."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def matrices(self) -> int:
        return len(self.a)


def measure(
    *,
    shape: Sequence[int] = SHAPE,
    batches: Sequence[int] = BATCHES,
    rows: Sequence[int] = ROWS,
    precisions: Sequence[str] = PRECISIONS,
    search: bool = True,
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> MatmulReport:
    """Compare ``A0 @ B0`` alone and in company, ``shape`` being (M, N, K), and look for shapes that differ.

    ``batches``: matrices of ``bmm`` and of the taller product; ``rows``: rows beside row 0. What does not fit into
    memory, or would take more than ``LIMIT`` seconds, is left out and says so. Raises ``ParameterError`` for sizes
    that are none, ``DeviceError`` for a device that is not there.
    """
    started = time.perf_counter()
    m, n, k = _sizes("shape", shape, 3)
    _sizes("batch", batches)
    _sizes("rows", rows)
    unknown = [one for one in precisions if one not in PRECISIONS]
    if unknown or not precisions:
        raise ParameterError(f"precision {(unknown or [''])[0]!r}", accepted=", ".join(PRECISIONS))
    place = find_device(device, "float32")
    torch_device(place.name)
    unavailable = {one: reason for one in precisions if (reason := _missing(one, place))}
    chosen = [one for one in PRECISIONS if one in precisions and one not in unavailable]
    searched_shapes = SEARCHED["cuda" if place.is_cuda else "cpu"] if search else ()
    tick = ticker(progress, len(chosen) * (2 + len(searched_shapes)))
    companies: list[Company] = []
    searched: list[Searched] = []
    for precision in chosen:
        with _precision(precision), torch.inference_mode():
            bench = _Products(place, precision, (m, n, k), tuple(batches), tuple(rows), seed)
            companies += bench.vendor()
            tick()
            if precision != "tf32":  # stablegen computes float32 as float32
                companies += bench.own()
            tick()
            del bench
            free_memory(place.name)
            for one in searched_shapes:
                searched += _search(place, precision, one, seed)
                tick()
    return MatmulReport(
        machine=machine_of(place),
        seed=seed,
        m=m,
        n=n,
        k=k,
        companies=tuple(companies),
        searched=tuple(searched),
        unavailable=unavailable,
        seconds=time.perf_counter() - started,
    )


def _sizes(name: str, given: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    if not given or any(size < 1 for size in given) or (count is not None and len(given) != count):
        wanted = "whole numbers from 1 on" if count is None else f"{count} whole numbers from 1 on"
        raise ParameterError(f"{name}={','.join(map(str, given))}", accepted=wanted)
    return tuple(given)


def _missing(precision: str, device: Device) -> str | None:
    """Return why a precision cannot be had on a device; None where it can."""
    if precision == "tf32" and not (device.is_cuda and (device.capability or (0, 0)) >= (8, 0)):
        return "TF32 is computed by NVIDIA GPUs from compute capability 8.0 on"
    if precision == "bfloat16" and device.is_cuda and (device.capability or (8, 0)) < (8, 0):
        return "bfloat16 is computed by NVIDIA GPUs from compute capability 8.0 on"
    return None


@contextmanager
def _precision(precision: Precision) -> Iterator[None]:
    """Multiply float32 as float32, or as TF32 where that is asked for; put torch's flag back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


class _Products:
    """The products of one precision, alone and in company."""

    def __init__(
        self,
        device: Device,
        precision: Precision,
        shape: tuple[int, int, int],
        batches: tuple[int, ...],
        rows: tuple[int, ...],
        seed: int,
    ) -> None:
        self.device = device
        self.precision = precision
        self.shape = shape
        self.batches = batches
        self.rows = rows
        self.fitting = _fitting(device, shape, _dtype(precision), max(batches))
        self.operands = _operands(device, precision, shape, max(self.fitting, -(-max(rows) // shape[0])), seed)

    def vendor(self) -> list[Company]:
        """Return torch's own products, compared."""
        a, b = self.operands
        stacked = a.flatten(0, 1)
        alone, of_alone = self._profiled(lambda: torch.mm(a[0], b[0]))
        row, of_row = self._profiled(lambda: torch.mm(stacked[:1], b[0]))
        each = self._seconds(lambda: torch.mm(a[0], b[0]))
        m = self.shape[0]
        found = []
        ways: dict[Way, Callable[[int], torch.Tensor]] = {
            "batched": lambda count: torch.bmm(a[:count], b[:count])[0],
            "stacked": lambda count: torch.mm(stacked[: count * m], b[0])[:m],
        }
        for way, runs in ways.items():
            found += [
                self._compared("vendor", way, count, alone, of_alone, runs, each * count) for count in self.batches
            ]
        return found + [
            self._compared("vendor", "row", count, row, of_row, lambda count: torch.mm(stacked[:count], b[0])[:1], 0.0)
            for count in self.rows
        ]

    def own(self) -> list[Company]:
        """Return the same by stablegen's kernels, for which a batch is rows over one weight."""
        a, b = self.operands
        kernels = kernels_for(torch.device(self.device.name))
        layer, stacked, m = kernels.prepare(b[0], None), a.flatten(0, 1), self.shape[0]
        alone, of_alone = self._profiled(lambda: product(kernels, stacked[:m], layer))
        row, of_row = self._profiled(lambda: product(kernels, stacked[:1], layer))
        most = max(self.batches) if self.device.is_cuda else CPU_OWN

        def stack(count: int) -> torch.Tensor:
            return product(kernels, stacked[: count * m], layer)[:m]

        def among(count: int) -> torch.Tensor:
            return product(kernels, stacked[:count], layer)[:1]

        taller = [
            self._compared("stablegen", "stacked", count, alone, of_alone, stack, 0.0)
            for count in self.batches
            if count <= most
        ]
        return taller + [self._compared("stablegen", "row", count, row, of_row, among, 0.0) for count in self.rows]

    def _compared(
        self,
        kernels: Kernels,
        way: Way,
        count: int,
        alone: torch.Tensor,
        of_alone: tuple[str, ...],
        run: Callable[[int], torch.Tensor],
        expected: float,
    ) -> Company:
        asked = Company(kernels=kernels, precision=self.precision, way=way, count=count)
        if way != "row" and count > self.fitting:
            return asked.model_copy(update={"problem": "does not fit into memory"})
        if expected > LIMIT:
            return asked.model_copy(update={"problem": f"would take about {expected:.0f} s"})
        try:
            together, of_together = self._profiled(lambda: run(count))
        except torch.OutOfMemoryError:
            free_memory(self.device.name)
            return asked.model_copy(update={"problem": "does not fit into memory"})
        found = differences(alone, together)
        return asked.model_copy(update=found | {"alone": of_alone, "together": of_together})

    def _profiled(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Return a result and the names of the kernels that made it; a CPU's profiler knows none."""
        if not self.device.is_cuda:
            return run().clone(), ()
        run()  # what is compiled or loaded at the first call is no part of it
        synchronise(self.device.name)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            result = run().clone()
            synchronise(self.device.name)
        names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
        return result, tuple(dict.fromkeys(short_name(name) for name in names if not _is_copy(name)))

    def _seconds(self, run: Callable[[], torch.Tensor]) -> float:
        synchronise(self.device.name)
        before = time.perf_counter()
        run()
        synchronise(self.device.name)
        return time.perf_counter() - before


def _is_copy(name: str) -> bool:
    """Return whether a kernel only moves, fills or adds up memory, as ours around a product do."""
    return name.startswith(("Memcpy", "Memset")) or "elementwise_kernel" in name or "CatArrayBatchedCopy" in name


def short_name(name: str) -> str:
    """Return a kernel's own name without the types it was compiled for."""
    wrapped = re.search(r"\bKernel2?<(\w+)", name)  # CUTLASS puts the name where others put types
    if wrapped is not None:
        return wrapped[1]
    while (plain := re.sub(r"<[^<>]*>", "", name)) != name:
        name = plain
    return name.partition("(")[0].split()[-1]


def product(kernels: KernelSet, x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """Return ``x @ weight`` [M, N] float32 through a kernel set, its summands added up in their order."""
    if layer.paired:
        from stablegen.kernels.operand import as_pairs

        x = as_pairs(x)
    summands = kernels.partial(x, layer)
    total = summands[0]
    for part in summands[1:]:
        total = total + part
    return total


def differences(alone: torch.Tensor, together: torch.Tensor) -> dict[str, float | bool]:
    """Return how two results of one shape and dtype differ, as fields of ``Company``."""
    apart = alone.double() - together.double()
    return {
        "max_abs": apart.abs().max().item(),
        "l2": apart.norm().item(),
        "allclose": torch.allclose(alone, together),
        "equal": same_bits(alone, together),
    }


def _fitting(device: Device, shape: tuple[int, int, int], dtype: torch.dtype, wanted: int) -> int:
    """Return how many of the wanted matrices fit into half of the memory that is free."""
    m, n, k = shape
    each = (m * k + k * n + m * n) * dtype.itemsize
    free = available_memory(device.name)
    return max(1, min(wanted, free // 2 // each))


def _operands(device: Device, precision: Precision, shape: tuple[int, int, int], matrices: int, seed: int) -> _Operands:
    """Return the operands; the first matrices are the same however many there are."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    dtype = _dtype(precision)
    first_a, first_b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    drawn = torch.Generator(device.name).manual_seed(seed)
    a = torch.randn(matrices, m, k, generator=drawn, device=device.name, dtype=dtype)
    b = torch.randn(matrices, k, n, generator=drawn, device=device.name, dtype=dtype)
    a[0], b[0] = first_a.to(dtype), first_b.to(dtype)
    return _Operands(a, b)


def _search(device: Device, precision: Precision, shape: tuple[int, int, int], seed: int) -> list[Searched]:
    """Return from which company on a shape's product moves, each way."""
    m, n, k = shape
    most = min(max(SEARCHED_COUNTS), _fitting(device, shape, _dtype(precision), max(SEARCHED_COUNTS)))
    if not device.is_cuda and precision == "float16":
        most = min(most, 4)  # processors without float16 arithmetic take long
    counts = tuple(count for count in SEARCHED_COUNTS if count <= most)
    a, b = _operands(device, precision, shape, most, seed)
    stacked = a.flatten(0, 1)
    alone, row = torch.mm(a[0], b[0]), torch.mm(stacked[:1], b[0])
    runs: dict[Way, tuple[torch.Tensor, Callable[[int], torch.Tensor]]] = {
        "batched": (alone, lambda count: torch.bmm(a[:count], b[:count])[0]),
        "stacked": (alone, lambda count: torch.mm(stacked[: count * m], b[0])[:m]),
        "row": (row, lambda count: torch.mm(stacked[:count], b[0])[:1]),
    }
    found = []
    for way, (expected, run) in runs.items():
        results = {count: run(count) for count in counts}
        moved = [count for count, result in results.items() if not same_bits(expected, result)]
        apart = [(expected.double() - results[count].double()).abs().max().item() for count in moved]
        found.append(
            Searched(
                precision=precision,
                way=way,
                m=m,
                n=n,
                k=k,
                counts=counts,
                first=moved[0] if moved else None,
                moved=len(moved),
                max_abs=max(apart, default=0.0),
            )
        )
    return found


TITLES: dict[Way, str] = {
    "batched": "slice 0 of bmm",
    "stacked": "first rows of a taller product",
    "row": "row 0 among rows",
}


def render(report: MatmulReport, console: Console) -> None:
    """Print a report as tables."""
    say(console, f"matmul: {report.m} x {report.k} times {report.k} x {report.n} on {report.machine.summary()}")
    for way in WAYS:
        lanes, rows = table_of(report, way)
        table = sheet("rows" if way == "row" else "matrices", *(f"{kernels} {name}" for kernels, name in lanes))
        for counts, cells in rows:
            table.add_row(counts, *map(cell_text, cells))
        say(console, f"{TITLES[way]} against the same alone: largest difference")
        console.print(table)
    for line in kernel_lines(report):
        say(
            console,
            f"{line.kernels} {line.precision}, {TITLES[line.way]}: alone {' + '.join(line.alone)}; "
            f"{line.counts}: {' + '.join(line.together)}",
        )
    moved = [one for one in report.searched if one.first is not None]
    if report.searched:
        say(console, "shapes looked at whose product moved in company:")
        table = sheet("precision", "M x N x K", "how", "from", "of counts", "largest difference")
        for one in moved:
            where = f"{one.m} x {one.n} x {one.k}"
            table.add_row(
                one.precision,
                where,
                TITLES[one.way],
                str(one.first),
                f"{one.moved}/{len(one.counts)}",
                f"{one.max_abs:.3g}",
            )
        console.print(table)
    for name, reason in report.unavailable.items():
        say(console, f"not measured: {name}: {reason}")
    say(console, MEANING)


Companies = tuple[Company | None, ...]


def table_of(report: MatmulReport, way: Way) -> tuple[list[Lane], list[tuple[str, Companies]]]:
    """Return who was compared in a way, and by counts what came of it; counts of the same figures are one row."""
    mine = [one for one in report.companies if one.way == way]
    lanes = list(dict.fromkeys((one.kernels, one.precision) for one in mine))
    cells = {(one.kernels, one.precision, one.count): one for one in mine}
    rows = [
        ("", count, tuple(cells.get((*lane, count)) for lane in lanes))
        for count in dict.fromkeys(one.count for one in mine)
    ]
    return lanes, [(text, row) for _, text, row in grouped(rows, lambda row: [*map(cell_text, row)])]


def cell_text(one: Company | None) -> str:
    """Return what a table says of a comparison."""
    if one is None:
        return ""
    if one.problem is not None:
        return one.problem
    return "0, same bits" if one.equal else f"{one.max_abs:.3g}" + ("" if one.allclose else ", not allclose")


class KernelLine(NamedTuple):
    """Which kernels ran alone, and which with so many others."""

    kernels: Kernels
    precision: Precision
    way: Way
    counts: str
    alone: tuple[str, ...]
    together: tuple[str, ...]


def kernel_lines(report: MatmulReport) -> list[KernelLine]:
    """Return, for each way and precision, the kernels that ran alone and those that ran in company."""
    lines = []
    for kernels, precision, way in dict.fromkeys((one.kernels, one.precision, one.way) for one in report.companies):
        mine = [one for one in report.companies if (one.kernels, one.precision, one.way) == (kernels, precision, way)]
        for together in dict.fromkeys(one.together for one in mine if one.together):
            those = [one for one in mine if one.together == together]
            counts = counts_text([one.count for one in those], [one.count for one in mine])
            lines.append(KernelLine(kernels, precision, way, counts, those[0].alone, together))
    return lines
