"""Lines and tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from stablegen.lab.reports.wording import SAME_BITS, Cell

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def say(console: Console, text: str = "") -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False)


def sheet(*columns: str, left: Iterable[str] = (), no_wrap: bool = False) -> Table:
    """Return an empty table; its first column and those named ``left`` are aligned to the left, others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    chosen = {*columns[:1], *left}
    for column in columns:
        made.add_column(column, justify="left" if column in chosen else "right", no_wrap=no_wrap)
    return made


def plain_table(*columns: str) -> Table:
    """Return an empty table without lines, aligned to the left."""
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False)


def cell_text(cell: Cell) -> str:
    """Return a cell's text; a terminal has no colour for equal bits."""
    return f"{cell.text}, same bits" if cell == SAME_BITS else cell.text


def say_unavailable(console: Console, reasons: dict[str, str]) -> None:
    """Print what was not measured, and why."""
    for name, reason in reasons.items():
        say(console, f"not measured: {name}: {reason}")
