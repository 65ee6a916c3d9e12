"""Words that tables on a terminal and pages share: cells, ranges of counts, and numerics without their device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Form = Callable[[float], str]
"""Writes a number."""
_Title = TypeVar("_Title")
_Row = TypeVar("_Row")


class Cell(NamedTuple):
    """One cell of a table; ``moved``: whether its figure shows that bits moved, None where it shows neither."""

    text: str
    moved: bool | None = None


SAME_BITS = Cell("0", moved=False)
"""The cell of a difference where all bits are equal."""


def short_number(value: float) -> str:
    """Return a number to three significant digits, as terminals show it."""
    return f"{value:.3g}"


def grouped(
    rows: Iterable[tuple[_Title, int, _Row]], shown: Callable[[_Row], object] = lambda row: row
) -> list[tuple[_Title, str, _Row]]:
    """Merge neighbouring rows of (title, count, content) that look the same into one row with all their counts.

    ``shown`` returns what a reader sees of a row's content.
    """
    found: list[tuple[_Title, list[int], _Row]] = []
    for title, count, row in rows:
        if found and (found[-1][0], shown(found[-1][2])) == (title, shown(row)):
            found[-1][1].append(count)
        else:
            found.append((title, [count], row))
    return [(title, counts_text(counts), row) for title, counts, row in found]


def counts_text(counts: Sequence[int], among: Sequence[int] = ()) -> str:
    """Return counts as a list; four or more that are neighbours ``among`` all counts become a range."""
    known = list(among or counts)
    runs: list[list[int]] = []
    for count in counts:
        if runs and known.index(count) == known.index(runs[-1][-1]) + 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    return ", ".join(", ".join(map(str, run)) if len(run) < 4 else f"{run[0]} ... {run[-1]}" for run in runs)


@dataclass(frozen=True, slots=True)
class DeviceNames:
    """Names devices once, so that rows of a table need not repeat them.

    ``devices``: device -> its letter, '' where there is only one. ``short``: what ``Numerics.summary`` returned ->
    policy and dtype, with the device's letter where there are several.
    """

    devices: dict[str, str]
    short: dict[str, str]

    @classmethod
    def of(cls, summaries: Iterable[str]) -> DeviceNames:
        """Return the names for these summaries of numerics."""
        parts = {summary: summary.partition(" on ") for summary in summaries}
        found = list(dict.fromkeys(device for _, _, device in parts.values()))
        devices = {device: _letter(place) if len(found) > 1 else "" for place, device in enumerate(found)}
        short = {
            summary: f"{how} on {devices[device]}" if devices[device] else how
            for summary, (how, _, device) in parts.items()
        }
        return cls(devices, short)

    @property
    def several(self) -> bool:
        """Return whether there is more than one device."""
        return len(self.devices) > 1

    @property
    def legend(self) -> str:
        """Return the device, or several of them as ``A: ..., B: ...``."""
        return ", ".join(f"{letter}: {device}" if letter else device for device, letter in self.devices.items())


def _letter(place: int) -> str:
    """Return A to Z, and then AA, AB and so on."""
    text = ""
    while place >= 0:
        place, rest = divmod(place, 26)
        text, place = chr(ord("A") + rest) + text, place - 1
    return text
