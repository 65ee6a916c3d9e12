"""The page of a whole cache: verdicts, margins, what each policy would do, the newest audit, and every answer."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stablegen.core.audit import OUTCOMES, AuditReport, Share
from stablegen.core.verdict import Status
from stablegen.lab.reports.wording import DeviceNames
from stablegen.pages import charts
from stablegen.pages.render import number, percent, write_page
from stablegen.reports.cache import EDGES, STATUSES, Answer, CacheReport, Margins, WhatIf, rests_on

MOST = 10
"""Groups of a chart; smaller ones are combined."""
_SELF_CHECKS = {
    "passed": "passed",
    "failed": "failed",
    "none": "not run yet",
    "no promise": "no promise",
}


def write_cache(report: CacheReport, file: Path) -> None:
    """Write the page of a report to ``file``."""
    write_page(
        "cache.html.j2",
        file,
        machine=report.numerics.device_model,
        report=report,
        flagged=sum(report.verdicts[status] for status in ("at_risk", "diverged", "unknown")),
        pictures=_pictures(report) if report.records else [],
        what_if_chart=_what_if_chart(report.what_if) if any(one.verdicts for one in report.what_if) else None,
        what_if=[_row(one) for one in report.what_if],
        audit=None if report.audit is None else _audit(report.audit),
        data=_data(report),
    )


def _named(status: str) -> str:
    return status.replace("_", " ")


def _pictures(report: CacheReport) -> list[tuple[Markup, str, str]]:
    """Return the charts with their headings and notes."""
    shown = [status for status in STATUSES if report.verdicts[status]]
    found = [
        (
            charts.bars(
                "Answers by verdict",
                [_named(status) for status in shown],
                {"answers": [report.verdicts[status] for status in shown]},
                each=[f"v-{status}" for status in shown],
            ),
            "Verdicts",
            "How a hit on each would be judged now.",
        )
    ]
    devices = DeviceNames.of(report.by_numerics)
    by_numerics = {devices.short[name]: verdicts for name, verdicts in report.by_numerics.items()}
    grouped = (
        ("app", report.by_app, "An answer of several apps counts for each."),
        ("model", report.by_model, "Models that answered."),
        ("numerics", by_numerics, f"How the answers were computed, on {devices.legend}."),
    )
    for name, groups, note in grouped:
        if len(groups) > 1 or name == "numerics":
            found.append((_stacked(f"Answers by {name} and verdict", groups), f"By {name}", note))
    for margins, heading, note in (
        (report.smallest, "Smallest margin of each answer", "Best minus second-best score at its closest step."),
        (report.all, "Margins of all steps", "Best minus second-best score."),
    ):
        if margins.total:
            beyond = f" {number(margins.beyond)} lie beyond 100." if margins.beyond else ""
            found.append((_distribution(heading, margins), heading, note + beyond))
    return found


def _stacked(title: str, groups: Mapping[str, Mapping[Status, int]]) -> Markup:
    top = dict(list(groups.items())[:MOST])
    rest = list(groups.values())[MOST:]
    if rest:
        top[f"{len(rest)} others"] = {status: sum(group[status] for group in rest) for status in STATUSES}
    shown = [status for status in STATUSES if any(group[status] for group in top.values())]
    return charts.bars(
        title,
        list(top),
        {_named(status): [group[status] for group in top.values()] for status in shown},
        stacked=True,
        colours=[f"v-{status}" for status in shown],
    )


def _distribution(title: str, margins: Margins) -> Markup:
    filled = [place for place, count in enumerate(margins.counts) if count] or [0]
    first = 0 if margins.below else max(filled[0] - 1, 0)
    last = min(max(filled[-1] + 2, first + 4), len(margins.counts))
    first = min(first, last - 4)
    counts = margins.counts[first:last]
    return charts.histogram(
        title,
        EDGES[first : last + 1],
        [margins.below, *counts] if margins.below else counts,
        x_label="margin",
        y_label="answers" if title.startswith("Smallest") else "steps",
        below="<10⁻⁶" if margins.below else "",
    )


def _what_if_chart(what_if: list[WhatIf]) -> Markup:
    able = [one for one in what_if if one.problem is None]
    shown = [status for status in STATUSES if any(one.verdicts[status] for one in able)]
    return charts.bars(
        "Verdicts of the cache under each policy",
        [one.policy + (" (now)" if one.current else "") for one in able],
        {_named(status): [one.verdicts[status] for one in able] for status in shown},
        stacked=True,
        colours=[f"v-{status}" for status in shown],
    )


def _row(one: WhatIf) -> dict[str, Any]:
    if one.problem is not None:
        return {"policy": one.policy, "current": False, "problem": one.problem}
    counts = [number(one.verdicts[status]) for status in ("exact", "stable", "at_risk", "unknown")]
    return {
        "policy": one.policy,
        "current": one.current,
        "problem": None,
        "cells": [*counts, number(one.expected)],
        "self_check": _SELF_CHECKS[one.self_check],
        "rests_on": rests_on(one) or "equal numerics",
    }


def _audit(report: AuditReport) -> dict[str, Any]:
    """Return an audit as the page shows it."""
    caught = [(point.recall, point.precision) for point in report.curve if point.recall is not None]
    points = [
        charts.Point(
            one.predicted,
            one.observed.value or 0.0,
            one.observed.low,
            one.observed.high,
            f"{one.observed.count} of {one.observed.of} answers",
        )
        for one in report.reliability
    ]
    operating = [(report.recall.value, report.precision.value)]
    series = [charts.Series("every threshold", caught)]
    if None not in operating[0]:
        series.append(charts.Series(f"accepted risk {report.accepted_risk:g}", operating))  # type: ignore[arg-type]
    return {
        "when": f"{datetime.fromtimestamp(report.made, UTC):%Y-%m-%d %H:%M} UTC",
        "head": ["verdict", "same bits", "same tokens", "diverged"],
        "rows": [[_named(status), *(row[outcome] for outcome in OUTCOMES)] for status, row in report.table.items()],
        "tiles": [
            ("audited", number(report.audited), f"of {number(report.records)} answers"),
            ("exact, equal in bits", *_share(report.exact)),
            ("recall", *_share(report.recall)),
            ("precision", *_share(report.precision)),
            ("Brier score", number(report.brier), "0 is perfect"),
        ],
        "reliability": charts.reliability("Predicted and observed shares of divergences", points) if points else None,
        "curve": charts.lines(
            "Precision over recall",
            series,
            x_label="recall: flagged, of those that diverged",
            y_label="precision: diverged, of those flagged",
            x_span=(0.0, 1.0),
            y_span=(0.0, 1.0),
            x_form=lambda value: f"{value:.0%}",
            y_form=lambda value: f"{value:.0%}",
            height=330,
        )
        if caught
        else None,
    }


def _share(share: Share) -> tuple[str, str]:
    if share.value is None:
        return "unknown", "there are none"
    return percent(share.value), f"{share.count} of {share.of}; {percent(share.low)} to {percent(share.high)}"


class _Names:
    """Repeated texts, each by its place in one list."""

    def __init__(self, start: tuple[str, ...] = ()) -> None:
        self.places = {name: place for place, name in enumerate(start)}

    def place(self, name: str) -> int:
        return self.places.setdefault(name, len(self.places))


def _data(report: CacheReport) -> dict[str, Any]:
    """Return the answers as the page's script reads them: rows of values, with repeated texts by their numbers."""
    apps, models, numerics, reasons = _Names(), _Names(), _Names(), _Names()
    statuses = _Names(STATUSES)

    def row(answer: Answer) -> list[Any]:
        verdict = answer.verdict
        return [
            answer.key,
            answer.prompt,
            answer.text,
            [apps.place(app) for app in answer.apps],
            models.place(answer.model),
            statuses.place(verdict.status),
            _rounded(verdict.probability),
            _rounded(answer.margin),
            answer.step,
            answer.token,
            answer.runner_up,
            answer.tokens,
            numerics.place(answer.numerics),
            reasons.place(f"{answer.policy} · {answer.dtype}"),
            round(answer.created),
            reasons.place(verdict.reason),
            reasons.place(verdict.basis),
            [
                [
                    -1 if flag.app is None else apps.place(flag.app),
                    statuses.place(flag.status),
                    _rounded(flag.probability),
                    numerics.place(flag.current),
                    round(flag.seen),
                ]
                for flag in answer.flagged
            ],
            answer.mine + 2 * answer.scored + 4 * answer.superseded,
        ]

    rows = [row(answer) for answer in report.answers]
    devices = DeviceNames.of(numerics.places)
    return {
        "rows": rows,
        "devices": devices.legend,
        "short": list(devices.short.values()),
        "apps": list(apps.places),
        "models": list(models.places),
        "numerics": list(numerics.places),
        "words": list(reasons.places),
        "statuses": list(STATUSES),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
