"""Experiment 1: floating-point addition is not associative, so the order of a sum is part of its result."""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING

import torch

from stablegen.errors import ParameterError
from stablegen.lab.device import machine_of
from stablegen.lab.progress import ticker
from stablegen.lab.reports.associativity import AssociativityReport, OrderedSum, SumsInOrders, Triple
from stablegen.machine.device import Device
from stablegen.machine.plan import find_device

if TYPE_CHECKING:
    from stablegen.session.call import Progress

DTYPES = ("float16", "bfloat16", "float32", "float64")
COUNT = 4096
"""Numbers of the sum; a power of two, so that it can be halved to one."""
TRIPLE = (1e16, -1e16, 1.0)
SMALL_TRIPLE = (3e4, -3e4, 1.0)
"""The same in float16, whose largest number is 65504."""
BLOCKS = (32, 256)
SHUFFLES = 3


def measure(
    *, device: str = "auto", count: int = COUNT, seed: int = 0, progress: Progress | None = None
) -> AssociativityReport:
    """Add three numbers in two orders, and ``count`` random ones, normal with variance 1, in many orders.

    Runs on the CPU, and on ``device`` too where that is a GPU. Raises ``ParameterError`` for a ``count`` that is not a
    power of two from 256 on, ``DeviceError`` for a device that this machine does not have.
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
        asked = [(TRIPLE, "1e16 is infinite in float16"), (SMALL_TRIPLE, "numbers that float16 can hold")]
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
        "first to last": torch.arange(count),
        "last to first": torch.arange(count - 1, -1, -1),
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
    found["halved until one is left"] = halving(held).item()
    found["torch.sum"] = held.sum().item()
    sums = tuple(OrderedSum(order=order, value=value, error=abs(value - exact)) for order, value in found.items())
    return SumsInOrders(device=device.name, dtype=dtype, count=count, exact=exact, sums=sums)


def one_by_one(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sums of rows [R, N], one addition and one rounding after the other."""
    total = torch.zeros_like(numbers[:, 0])
    for column in numbers.unbind(1):
        total = total + column
    return total


def halving(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum of numbers [N], N a power of two: the second half is added to the first until one is left."""
    while len(numbers) > 1:
        numbers = numbers[: len(numbers) // 2] + numbers[len(numbers) // 2 :]
    return numbers[0]
