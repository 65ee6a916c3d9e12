"""Experiment 2: one matrix product alone, and the same product in larger calls.

``A0 @ B0`` is computed alone, as slice 0 of a batched product, as the first rows of a taller one with the same right
operand, and its row 0 alone against row 0 among others. Only what else the same call computes changes; the numbers
multiplied are the same. Beside the vendor's libraries run stablegen's own kernels.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch does not export it for type checkers

from stablegen.engine.loading import kernels_for, torch_device
from stablegen.errors import ParameterError
from stablegen.kernels.base import KernelSet, Linear
from stablegen.lab.bits import same_bits
from stablegen.lab.device import available_memory, free_memory, machine_of, synchronise
from stablegen.lab.progress import ticker
from stablegen.lab.reports.matmul import PRECISIONS, Comparison, Kernels, MatmulReport, Precision, Searched, Way
from stablegen.machine.device import Device
from stablegen.machine.plan import find_device

if TYPE_CHECKING:
    from stablegen.session.call import Progress

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
"""Shapes (M, N, K) that are searched for differences, by device: squares, long sums, and layers of GPT-2."""
SEARCHED_COUNTS = (2, 3, 4, 8, 16, 32, 64)
LIMIT = 10.0
"""Seconds that one product may take, estimated from a single one; longer ones are left out."""
CPU_OWN = 10
"""Matrices that stablegen's kernels stack at most on a CPU, where they compute one row after the other."""


class _Operands(NamedTuple):
    """``a`` [B, M, K] and ``b`` [B, K, N]."""

    a: torch.Tensor
    b: torch.Tensor


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
    """Compare ``A0 @ B0`` alone and in larger calls, and search for shapes that differ; ``shape`` is (M, N, K).

    ``batches``: matrices of ``bmm`` and of the taller product; ``rows``: rows of the product whose row 0 is compared.
    Products that do not fit into memory, or would take more than ``LIMIT`` seconds, have a ``problem`` in the report.
    Raises ``ParameterError`` for sizes that are not whole numbers from 1 on, ``DeviceError`` for a device that this
    machine does not have.
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
    shapes = SEARCHED["cuda" if place.is_cuda else "cpu"] if search else ()
    tick = ticker(progress, len(chosen) * (2 + len(shapes)))
    comparisons: list[Comparison] = []
    searched: list[Searched] = []
    for precision in chosen:
        with _precision(precision), torch.inference_mode():
            bench = _Products(place, precision, (m, n, k), tuple(batches), tuple(rows), seed)
            comparisons += bench.vendor()
            tick()
            if precision != "tf32":  # stablegen computes float32 as float32
                comparisons += bench.own()
            tick()
            del bench
            free_memory(place.name)
            for one in shapes:
                searched += _search(place, precision, one, seed)
                tick()
    return MatmulReport(
        machine=machine_of(place),
        seed=seed,
        m=m,
        n=n,
        k=k,
        comparisons=tuple(comparisons),
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
    """Return why a device cannot compute in a precision; None where it can."""
    if precision == "tf32" and not (device.is_cuda and (device.capability or (0, 0)) >= (8, 0)):
        return "TF32 needs an NVIDIA GPU of compute capability 8.0 or newer"
    if precision == "bfloat16" and device.is_cuda and (device.capability or (8, 0)) < (8, 0):
        return "bfloat16 needs compute capability 8.0 or newer"
    return None


@contextmanager
def _precision(precision: Precision) -> Iterator[None]:
    """Multiply float32 as float32, or as TF32 where that is asked for; restore torch's flag."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


class _Products:
    """The products of one precision, alone and in larger calls."""

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

    def vendor(self) -> list[Comparison]:
        """Compare torch's own products."""
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

    def own(self) -> list[Comparison]:
        """Compare those of stablegen's kernels, for which a batch is rows times one weight."""
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
    ) -> Comparison:
        asked = Comparison(kernels=kernels, precision=self.precision, way=way, count=count)
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
        """Return a result and the names of the kernels that computed it; on a CPU there are no names."""
        if not self.device.is_cuda:
            return run().clone(), ()
        run()  # the first call compiles and loads kernels
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
    """Return whether a kernel only copies, fills or adds, as the code around a product does."""
    return name.startswith(("Memcpy", "Memset")) or "elementwise_kernel" in name or "CatArrayBatchedCopy" in name


def short_name(name: str) -> str:
    """Return a kernel's own name, without its template arguments."""
    wrapped = re.search(r"\bKernel2?<(\w+)", name)  # CUTLASS has the name among the template arguments
    if wrapped is not None:
        return wrapped[1]
    while (plain := re.sub(r"<[^<>]*>", "", name)) != name:
        name = plain
    return name.partition("(")[0].split()[-1]


def product(kernels: KernelSet, x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """Return ``x @ weight`` [M, N] float32 by a kernel set, its partial sums added in their order."""
    if layer.paired:
        from stablegen.kernels.operand import as_pairs

        x = as_pairs(x)
    summands = kernels.partial(x, layer)
    total = summands[0]
    for part in summands[1:]:
        total = total + part
    return total


def differences(alone: torch.Tensor, together: torch.Tensor) -> dict[str, float | bool]:
    """Return how two results of one shape and dtype differ, as fields of ``Comparison``."""
    apart = alone.double() - together.double()
    return {
        "max_abs": apart.abs().max().item(),
        "l2": apart.norm().item(),
        "allclose": torch.allclose(alone, together),
        "equal": same_bits(alone, together),
    }


def _fitting(device: Device, shape: tuple[int, int, int], dtype: torch.dtype, wanted: int) -> int:
    """Return how many of the wanted matrices fit into half of the free memory."""
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
    """Search one shape, each way, for the counts at which the vendor's product moves."""
    m, n, k = shape
    most = min(max(SEARCHED_COUNTS), _fitting(device, shape, _dtype(precision), max(SEARCHED_COUNTS)))
    if not device.is_cuda and precision == "float16":
        most = min(most, 4)  # slow on processors without float16 arithmetic
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
