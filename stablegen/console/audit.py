"""An audit on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stablegen.core.audit import OUTCOMES, AuditReport, Bin, Share

if TYPE_CHECKING:
    from rich.console import Console


def render(report: AuditReport, console: Console) -> None:
    """Print a report: the confusion table, recall and precision, predicted against observed, and wrong verdicts."""
    from rich.table import Table
    from rich.text import Text

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(f"{report.model}, {report.numerics.summary()}, accepted risk {report.accepted_risk:g}")
    left_out = "".join(f", {count} {reason}" for reason, count in report.skipped.items())
    say(f"{report.audited} of {report.records} cached answers generated anew in {report.seconds:.1f} s{left_out}")
    if not report.audited:
        return
    table = Table("verdict", "same bits", "same tokens", "diverged", box=None, pad_edge=False)
    for status, row in report.table.items():
        table.add_row(status, *(str(row[outcome]) for outcome in OUTCOMES))
    console.print(table)
    say(f"exact and equal in bits: {_share(report.exact)}")
    say(f"recall, flagged of those that diverged: {_share(report.recall)}")
    say(f"precision, diverged of those flagged: {_share(report.precision)}")
    if report.brier is not None:
        say(f"Brier score {report.brier:.4f}, calibration error {report.calibration_error:.4f}")
        bars = Table("predicted", "answers", "mean", "observed", "", box=None, pad_edge=False)
        for one in report.reliability:
            bar = _bar(one)
            bars.add_row(
                f"{one.low:.1f} to {one.high:.1f}",
                str(one.observed.of),
                f"{one.predicted:.3f}",
                _share(one.observed),
                Text(bar),
            )
        console.print(bars)
    for hit in report.wrong:
        where = "" if hit.step is None else f" at step {hit.step}"
        chance = "" if hit.verdict.probability is None else f", p {hit.verdict.probability:.3g}"
        say(f"{hit.wrong}: {hit.key[:12]} {hit.prompt!r:.40}: {hit.verdict.status}{chance}; {hit.outcome}{where}")


def _share(share: Share) -> str:
    if share.value is None:
        return "none to tell"
    return f"{share.count} of {share.of}, {share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _bar(one: Bin, width: int = 30) -> str:
    """Return what was observed as a bar, with a mark where it was predicted."""
    filled = round((one.observed.value or 0.0) * width)
    bar = list("#" * filled + "." * (width - filled))
    bar[min(width - 1, int(one.predicted * width))] = "|"
    return "".join(bar)
