"""The whole cache on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stablegen.core.answer import Status
from stablegen.reports.audit import OTHER_MODEL
from stablegen.reports.cache import STATUSES, CacheReport, rests_on

if TYPE_CHECKING:
    from rich.console import Console


def render(report: CacheReport, console: Console, *, most: int = 10) -> None:
    """Print a report: verdicts, what each policy would do, and the most fragile answers, at most so many."""
    from rich.table import Table
    from rich.text import Text

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    corrupt = f", {report.corrupt} that cannot be read" if report.corrupt else ""
    say(f"{report.records} answers in {report.path}, {report.size / 1e6:.1f} MB{corrupt}")
    if not report.records:
        return
    say(f"judged for {report.model} under {report.numerics.summary()}, accepted risk {report.accepted_risk:g}")
    say(_counts(report.verdicts) + f"; {report.expected:.3g} divergences to be expected")
    for name, groups in (("app", report.by_app), ("model", report.by_model), ("numerics", report.by_numerics)):
        table = Table(name, *(status.replace("_", " ") for status in STATUSES), box=None, pad_edge=False)
        for group, verdicts in groups.items():
            table.add_row(Text(group), *(str(verdicts[status] or "") for status in STATUSES))
        console.print(table)
    left_out = f", {report.others} {OTHER_MODEL} left out" if report.others else ""
    say(f"were misses run on the same device in {report.numerics.dtype}{left_out}:")
    columns = ("policy", "exact", "stable", "at risk", "unknown", "expected", "self-check", "rests on")
    table = Table(*columns, box=None, pad_edge=False)
    for one in report.what_if:
        if one.problem is not None:
            table.add_row(one.policy, *[""] * 6, Text(one.problem))
            continue
        counts = [str(one.verdicts[status]) for status in ("exact", "stable", "at_risk", "unknown")]
        table.add_row(one.policy, *counts, f"{one.expected:.3g}", one.self_check, rests_on(one))
    console.print(table)
    if report.audit is not None:
        recall, precision = report.audit.recall, report.audit.precision
        say(
            f"newest audit: {report.audit.audited} answers under {report.audit.numerics.summary()}, recall "
            f"{recall.count} of {recall.of}, precision {precision.count} of {precision.of}"
        )
    fragile = [one for one in report.answers if one.verdict.flagged][:most]
    if not fragile:
        return
    say("most fragile:")
    table = Table("key", "prompt", "verdict", "p", "margin", "step", "token", "runner-up", box=None, pad_edge=False)
    for answer in fragile:
        chance = answer.verdict.probability
        table.add_row(
            answer.key[:12],
            Text(f"{answer.prompt!r:.40}"),
            answer.verdict.status,
            "" if chance is None else f"{chance:.3g}",
            "" if answer.margin is None else f"{answer.margin:.4g}",
            "" if answer.step is None else str(answer.step),
            Text("" if answer.token is None else repr(answer.token)),
            Text("" if answer.runner_up is None else repr(answer.runner_up)),
        )
    console.print(table)


def _counts(verdicts: Mapping[Status, int]) -> str:
    return ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in verdicts.items() if count)
