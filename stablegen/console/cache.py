"""The whole cache on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stablegen.console.tables import plain_table, say
from stablegen.core.verdict import Status
from stablegen.lab.reports.wording import DeviceNames
from stablegen.reports.audit import OTHER_MODEL
from stablegen.reports.cache import STATUSES, Answer, CacheReport, rests_on

if TYPE_CHECKING:
    from rich.console import Console


def render(report: CacheReport, console: Console, *, most: int = 10) -> None:
    """Print a report: verdicts, what each policy would do, and the most fragile answers, at most ``most``."""
    corrupt = f", {report.corrupt} that cannot be read" if report.corrupt else ""
    say(console, f"{report.records} answers in {report.path}, {report.size / 1e6:.1f} MB{corrupt}")
    if not report.records:
        return
    say(console, f"judged for {report.model} under {report.numerics.summary()}, accepted risk {report.accepted_risk:g}")
    say(console, _counts(report.verdicts) + f"; {report.expected:.3g} divergences expected")
    names = DeviceNames.of(report.by_numerics)
    by_numerics = {names.short[name]: verdicts for name, verdicts in report.by_numerics.items()}
    for name, groups in (("app", report.by_app), ("model", report.by_model), ("numerics", by_numerics)):
        if groups is by_numerics:
            say(console, f"computed on {names.legend}:")
        _render_groups(name, groups, console)
    _render_what_if(report, console)
    if report.audit is not None:
        recall, precision = report.audit.recall, report.audit.precision
        say(
            console,
            f"newest audit: {report.audit.audited} answers under {report.audit.numerics.summary()}, recall "
            f"{recall.count} of {recall.of}, precision {precision.count} of {precision.of}",
        )
    fragile = [one for one in report.answers if one.verdict.flagged][:most]
    if fragile:
        _render_fragile(fragile, console)


def _render_groups(name: str, groups: Mapping[str, Mapping[Status, int]], console: Console) -> None:
    from rich.text import Text

    table = plain_table(name, *(status.replace("_", " ") for status in STATUSES))
    for group, verdicts in groups.items():
        table.add_row(Text(group), *(str(verdicts[status] or "") for status in STATUSES))
    console.print(table)


def _render_what_if(report: CacheReport, console: Console) -> None:
    from rich.text import Text

    left_out = f", {report.others} {OTHER_MODEL} left out" if report.others else ""
    say(console, f"if misses ran under another policy, on the same device in {report.numerics.dtype}{left_out}:")
    table = plain_table("policy", "exact", "stable", "at risk", "unknown", "expected", "self-check", "rests on")
    for one in report.what_if:
        if one.problem is not None:
            table.add_row(one.policy, *[""] * 6, Text(one.problem))
            continue
        counts = [str(one.verdicts[status]) for status in ("exact", "stable", "at_risk", "unknown")]
        table.add_row(one.policy, *counts, f"{one.expected:.3g}", one.self_check, rests_on(one))
    console.print(table)


def _render_fragile(answers: list[Answer], console: Console) -> None:
    from rich.text import Text

    say(console, "most fragile:")
    table = plain_table("key", "prompt", "verdict", "p", "margin", "step", "token", "runner-up")
    for answer in answers:
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
