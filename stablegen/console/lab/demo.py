"""The demo on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablegen.console.tables import say, sheet
from stablegen.core.policy import keeps_bits
from stablegen.lab.reports.demo import DemoReport, Measured
from stablegen.lab.reports.wording import short_number

if TYPE_CHECKING:
    from rich.console import Console


def render(report: DemoReport, console: Console) -> None:
    """Print a report as tables."""
    control = [one for one in report.measured if not keeps_bits(one.policy)]
    promising = [one for one in report.measured if keeps_bits(one.policy)]
    device = report.numerics["device_model"]
    say(console, f"{report.model} on {device}, torch {report.numerics['torch']}, {report.prompts} prompts")
    say(console, "each prompt alone, then " + "; ".join(report.situations))
    names = ", ".join(dict.fromkeys(one.policy for one in control))
    say(console, f"\n(a) {names}: transformers as it is")
    _render_measured(control, console)
    for flip in (flip for one in control for flip in one.flips):
        say(
            console,
            f"  {flip.prompt!r} {flip.situation}: step {flip.step} says {flip.beside!r}, "
            f"alone {flip.alone!r} (margin {short_number(flip.margin)})",
        )
    if not any(one.flips for one in control):
        say(console, "  the scores moved, no token flipped on this machine in these situations")
    say(console, f"\n(b) the policies that promise equal bits: {', '.join(dict.fromkeys(m.policy for m in promising))}")
    _render_measured(promising, console)
    say(console, "\n(c) the cache: a miss, a hit, and hits recorded under other numerics")
    _render_judged(report, console)
    say(console, f"measured in {report.seconds:.0f} s")


def _render_measured(rows: list[Measured], console: Console) -> None:
    columns = ("policy", "dtype", "score rows", "moved", "largest difference", "answers that flip", "")
    table = sheet(*columns, left=columns, no_wrap=True)
    for one in rows:
        largest = short_number(one.largest) if one.moved else "0: not one bit"
        table.add_row(one.policy, one.dtype, str(one.rows), str(one.moved), largest, str(len(one.flips)), one.note)
    console.print(table)


def _render_judged(report: DemoReport, console: Console) -> None:
    from rich.text import Text

    columns = ("prompt", "recorded by", "asked by", "", "verdict", "p(diverges)", "step", "tokens", "margin", "truth")
    table = sheet(*columns, left=columns, no_wrap=True)
    for one in report.judged:
        verdict = one.verdict
        table.add_row(
            Text(repr(one.prompt)[:24]),
            one.recorded,
            one.current,
            "hit" if one.cached else "miss",
            verdict.status,
            "" if verdict.probability is None else f"{verdict.probability:.2g} {verdict.basis}",
            "" if verdict.step is None else str(verdict.step),
            Text("" if verdict.step is None else f"{one.token} or {one.runner_up}"),
            "" if verdict.margin is None else short_number(verdict.margin),
            one.truth,
        )
    console.print(table)
