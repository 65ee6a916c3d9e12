"""One cached answer on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stablegen.reports.answer import Inspection

if TYPE_CHECKING:
    from rich.console import Console


def render(found: Inspection, console: Console) -> None:
    """Print an inspection: what is known of the record, where others part from it, and its steps."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    verdict = found.verdict
    facts = {
        "key": found.key,
        "app": found.app,
        "prompt": repr(found.prompt or found.prompt_ids),
        "answer": repr(found.text),
        "model": f"{found.model} {found.identity[:40]}",
        "computed": f"{datetime.fromtimestamp(found.created, UTC):%Y-%m-%d %H:%M:%S} UTC",
        "numerics": found.recorded.summary(),
        "batch": ", ".join(f"{name} {value}" for name, value in found.composition.items()),
        "verdict": f"{verdict.status} ({verdict.basis}): {verdict.reason}",
        "p(divergence)": "unknown" if verdict.probability is None else f"{verdict.probability:.3g}",
        "superseded": None if found.superseded is None else f"{found.superseded!r} by {found.superseded_numerics}",
        "verified": None if found.verification is None else f"{found.verification.status}: {found.verification.reason}",
    }
    for name, value in facts.items():
        if value is not None:
            console.print(f"{name:>13}  {value}", markup=False, highlight=False)
    for one in found.partings:
        ends = [_said(one.older_text, one.older), _said(one.newer_text, one.newer)]
        rest = "" if one.whole else " (no more of it is known)"
        for name, value in (
            ("parts", f"at step {one.step}, {one.source}; shared: {_said(one.shared_text, one.shared)}"),
            ("", f"{ends[0]} by {one.older_numerics}"),
            ("", f"{ends[1]} by {one.newer_numerics}{rest}"),
        ):
            console.print(f"{name:>13}  {value}", markup=False, highlight=False)
    if not found.traced:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "token", "runner-up", "margin", "p(flip)", ""):
        table.add_column(column, justify="right" if column in ("step", "margin", "p(flip)") else "left")
    fragile = set(found.fragile)
    for place, step in enumerate(found.steps):
        best = (step.token, step.text) if step.best is None else (step.best, step.best_text)
        table.add_row(
            str(place),
            Text(_token(*best)),
            Text(_token(step.runner_up, step.runner_up_text)),
            "inf" if step.margin is None else f"{step.margin:.6g}",
            f"{step.probability:.2e}",
            "fragile" if place in fragile else "",
        )
    console.print(table)


def _said(text: str | None, ids: Sequence[int]) -> str:
    return repr(text) if text is not None else " ".join(map(str, ids)) or "nothing"


def _token(token: int | None, text: str | None) -> str:
    return repr(text) if text is not None else str(token)
