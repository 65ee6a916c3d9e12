"""Answers that flip, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablegen.console.tables import cell_text, say, say_unavailable, sheet
from stablegen.lab.reports.flips import POLICY_HEAD, TOTAL_HEAD, Flip, FlipsReport
from stablegen.lab.reports.wording import grouped, short_number

if TYPE_CHECKING:
    from rich.console import Console


def render(report: FlipsReport, console: Console) -> None:
    """Print a report as tables and, for each dtype, the flips of the widest margins."""
    say(console, f"flips: {report.model}, greedy, at most {report.tokens} tokens, on {report.machine.summary()}")
    for found in report.dtypes:
        say(
            console,
            f"{found.dtype}: {len(found.prompts)} prompts under {report.control}, against a batch of {report.baseline}",
        )
        table = sheet(*TOTAL_HEAD)
        for cause, settings, cells in grouped((t.cause, t.setting, t.cells(short_number)) for t in found.totals):
            table.add_row(cause, settings, *map(cell_text, cells))
        console.print(table)
        if found.policies:
            table = sheet(*POLICY_HEAD)
            for policy, sizes, cells in grouped((t.policy, t.batch, t.cells()) for t in found.policies):
                table.add_row(policy, sizes, *map(cell_text, cells))
            console.print(table)
        for note in found.notes:
            say(console, note)
        for prompt, flip in found.widest():
            _render_flip(prompt, flip, console)
    for line in report.skipped:
        say(console, f"left out: {line}")
    say_unavailable(console, report.unavailable)
    say(console, report.meaning)


def _render_flip(prompt: str, flip: Flip, console: Console) -> None:
    from rich.text import Text

    say(console, f"  {prompt!r:.60} {flip.batch}, step {flip.step}, margin {short_number(flip.margin)}")
    table = sheet("  baseline", "score", flip.batch, "score")
    for mine, theirs in zip(flip.baseline, flip.other, strict=True):
        texts = (f"  {mine.text!r}", repr(theirs.text))
        scores = (f"{mine.score:.6g}", f"{theirs.score:.6g}")
        table.add_row(Text(texts[0]), scores[0], Text(texts[1]), scores[1])
    console.print(table)
