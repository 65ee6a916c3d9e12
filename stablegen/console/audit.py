"""An audit on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablegen.console.tables import plain_table, say
from stablegen.core.audit import OUTCOMES, AuditReport, Bin, Share

if TYPE_CHECKING:
    from rich.console import Console


def render(report: AuditReport, console: Console) -> None:
    """Print a report: the confusion table, recall and precision, predicted against observed, and wrong verdicts."""
    say(console, f"{report.model}, {report.numerics.summary()}, accepted risk {report.accepted_risk:g}")
    left_out = "".join(f", {count} {reason}" for reason, count in report.skipped.items())
    say(
        console,
        f"{report.audited} of {report.records} cached answers generated again in {report.seconds:.1f} s{left_out}",
    )
    if not report.audited:
        return
    table = plain_table("verdict", "same bits", "same tokens", "diverged")
    for status, row in report.table.items():
        table.add_row(status, *(str(row[outcome]) for outcome in OUTCOMES))
    console.print(table)
    say(console, f"exact and equal in bits: {_share(report.exact)}")
    say(console, f"recall, flagged of those that diverged: {_share(report.recall)}")
    say(console, f"precision, diverged of those flagged: {_share(report.precision)}")
    if report.brier is not None:
        _render_calibration(report, console)
    for hit in report.wrong:
        where = "" if hit.step is None else f" at step {hit.step}"
        chance = "" if hit.verdict.probability is None else f", p {hit.verdict.probability:.3g}"
        status = f"{hit.verdict.status}{chance}; {hit.outcome}{where}"
        say(console, f"{hit.wrong}: {hit.key[:12]} {hit.prompt!r:.40}: {status}")


def _render_calibration(report: AuditReport, console: Console) -> None:
    from rich.text import Text

    say(console, f"Brier score {report.brier:.4f}, calibration error {report.calibration_error:.4f}")
    bars = plain_table("predicted", "answers", "mean", "observed", "")
    for one in report.reliability:
        bars.add_row(
            f"{one.low:.1f} to {one.high:.1f}",
            str(one.observed.of),
            f"{one.predicted:.3f}",
            _share(one.observed),
            Text(_bar(one)),
        )
    console.print(bars)


def _share(share: Share) -> str:
    if share.value is None:
        return "unknown: there are none"
    return f"{share.count} of {share.of}, {share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _bar(one: Bin, width: int = 30) -> str:
    """Return the observed share as a bar, with a mark at the predicted one."""
    filled = round((one.observed.value or 0.0) * width)
    bar = list("#" * filled + "." * (width - filled))
    bar[min(width - 1, int(one.predicted * width))] = "|"
    return "".join(bar)
