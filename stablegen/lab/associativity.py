"""Experiment 1: floating-point addition is not associative, so the order of a sum is part of its result."""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING

import torch
from pydantic import ConfigDict

from stablegen.core.frozen import Frozen
from stablegen.errors import ParameterError
from stablegen.lab.machine import Machine, machine_of
from stablegen.lab.progress import ticker
from stablegen.lab.tables import say, sheet
from stablegen.machine.device import Device
from stablegen.machine.plan import find_device

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress

DTYPES = ("float16", "bfloat16", "float32", "float64")
COUNT = 4096
"""Numbers of the sum; a power of two, so that halving it ends evenly."""
TRIPLE = (1e16, -1e16, 1.0)
SMALL_TRIPLE = (3e4, -3e4, 1.0)
"""The same in float16, whose largest number is 65504."""
BLOCKS = (32, 256)
SHUFFLES = 3
MEANING = (
    "Each addition is rounded, so (a + b) + c and a + (b + c) may differ, and so may the same numbers added up in "
    "another order. No order is wrong; whoever changes the order changes the result."
)


class Triple(Frozen):
    """Three numbers as a dtype holds them, added up from the left and from the right."""

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
    """The numbers added up in one order; ``error`` is its distance from the exact sum of the numbers."""

    order: str
    value: float
    error: float


class SumsInOrders(Frozen):
    """The same ``count`` random numbers of a dtype, added up in several orders on a device.

    ``exact`` is the exact sum of the numbers as the dtype holds them, rounded once to float64.
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
        """Return the largest result less the smallest."""
        values = [one.value for one in self.sums]
        return max(values) - min(values)


class AssociativityReport(Frozen):
    """What the experiment found, on the CPU and, where there is one, on the GPU."""

    machine: Machine
    seed: int
    triples: tuple[Triple, ...]
    sums: tuple[SumsInOrders, ...]
    seconds: float


def measure(
    *, device: str = "auto", count: int = COUNT, seed: int = 0, progress: Progress | None = None
) -> AssociativityReport:
    """Add up three numbers in two orders and ``count`` random ones, normal with variance 1, in many.

    Runs on the CPU, and on ``device`` too where that is a GPU. Raises ``ParameterError`` for a ``count`` that is no
    power of two from 256 on, ``DeviceError`` for a device that is not there.
    """
    started = time.perf_counter()
    if count < max(BLOCKS) or count & (count - 1):
        raise ParameterError(f"count={count}", accepted=f"a power of two, at least {max(BLOCKS)}")
    main = find_device(device, "float32")
    devices = [find_device("cpu", "float32")] + ([main] if main.is_cuda else [])
    tick = ticker(progress, len(devices) * len(DTYPES))
    triples: list[Triple] = []
    sums: list[SumsInOrders] = []
    for place in devices:
        for dtype in DTYPES:
            triples += _triples(place, dtype)
            sums.append(_sums(place, dtype, count, seed))
            tick()
    return AssociativityReport(
        machine=machine_of(main),
        seed=seed,
        triples=tuple(triples),
        sums=tuple(sums),
        seconds=time.perf_counter() - started,
    )


def _triples(device: Device, dtype: str) -> list[Triple]:
    asked = [(TRIPLE, "")]
    if dtype == "float16":
        asked = [(TRIPLE, "1e16 is infinite in float16"), (SMALL_TRIPLE, "numbers that float16 has")]
    found = []
    for numbers, note in asked:
        a, b, c = torch.tensor(numbers, dtype=getattr(torch, dtype), device=device.name)
        found.append(
            Triple(
                device=device.name,
                dtype=dtype,
                a=a.item(),
                b=b.item(),
                c=c.item(),
                from_left=((a + b) + c).item(),
                from_right=(a + (b + c)).item(),
                note=note,
            )
        )
    return found


def _sums(device: Device, dtype: str, count: int, seed: int) -> SumsInOrders:
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    held = numbers.to(getattr(torch, dtype))
    exact = math.fsum(held.tolist())
    size = held.double().abs()
    orders = {
        "one after the other": torch.arange(count),
        "from the last to the first": torch.arange(count - 1, -1, -1),
        "smallest first": size.argsort(stable=True),
        "largest first": size.argsort(stable=True, descending=True),
    }
    shuffle = random.Random(seed)
    for number in range(1, SHUFFLES + 1):
        places = list(range(count))
        shuffle.shuffle(places)
        orders[f"shuffled ({number})"] = torch.tensor(places)
    held = held.to(device.name)
    found = dict(zip(orders, one_by_one(held[torch.stack(list(orders.values()))]).tolist(), strict=True))
    for block in BLOCKS:
        found[f"in blocks of {block}, then the blocks"] = one_by_one(one_by_one(held.view(-1, block))[None]).item()
    found["halved again and again"] = halving(held).item()
    found["torch.sum"] = held.sum().item()
    sums = tuple(OrderedSum(order=order, value=value, error=abs(value - exact)) for order, value in found.items())
    return SumsInOrders(device=device.name, dtype=dtype, count=count, exact=exact, sums=sums)


def one_by_one(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sums of rows [R, N], each number added to what there is and the sum rounded every time."""
    total = torch.zeros_like(numbers[:, 0])
    for column in numbers.unbind(1):
        total = total + column
    return total


def halving(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum of a power of two of numbers [N], the second half added to the first until one is left."""
    while len(numbers) > 1:
        numbers = numbers[: len(numbers) // 2] + numbers[len(numbers) // 2 :]
    return numbers[0]


def render(report: AssociativityReport, console: Console) -> None:
    """Print a report as tables."""
    say(console, f"associativity: {report.machine.summary()}")
    table = sheet("device", "dtype", "a", "b", "c", "(a + b) + c", "a + (b + c)", "")
    for one in report.triples:
        numbers = (one.a, one.b, one.c, one.from_left, one.from_right)
        table.add_row(one.device, one.dtype, *(f"{number:.6g}" for number in numbers), one.note)
    console.print(table)
    for sums in report.sums:
        say(
            console,
            f"{sums.device} {sums.dtype}: {sums.count} random numbers in {len(sums.sums)} orders: {sums.results} "
            f"results, {sums.spread:.3g} apart (exact {sums.exact:.9g})",
        )
    table = sheet("order", *(f"{sums.device} {sums.dtype}" for sums in report.sums))
    for index, ordered in enumerate(report.sums[0].sums):
        table.add_row(ordered.order, *(f"{sums.sums[index].value:.9g}" for sums in report.sums))
    console.print(table)
    say(console, MEANING)
