"""Tables and lines of experiments on a console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_Title = TypeVar("_Title")
_Cells = TypeVar("_Cells")


def say(console: Console, text: str = "") -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False)


def sheet(*columns: str, no_wrap: bool = False) -> Table:
    """Return an empty table, its first column to the left and the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=no_wrap)
    return made


def grouped(
    rows: Iterable[tuple[_Title, int, _Cells]], told: Callable[[_Cells], object] = lambda cells: cells
) -> list[tuple[_Title, str, _Cells]]:
    """Return rows of a title, a count and what came of it; neighbours of which the same is ``told`` become one row."""
    found: list[tuple[_Title, list[int], _Cells]] = []
    for title, count, cells in rows:
        if found and (found[-1][0], told(found[-1][2])) == (title, told(cells)):
            found[-1][1].append(count)
        else:
            found.append((title, [count], cells))
    return [(title, counts_text(counts), cells) for title, counts, cells in found]


def counts_text(counts: Sequence[int], among: Sequence[int] = ()) -> str:
    """Return counts as a list, those that follow each other ``among`` all counts as ranges where they are many."""
    known = list(among or counts)
    runs: list[list[int]] = []
    for count in counts:
        if runs and known.index(count) == known.index(runs[-1][-1]) + 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    return ", ".join(", ".join(map(str, run)) if len(run) < 4 else f"{run[0]} ... {run[-1]}" for run in runs)
