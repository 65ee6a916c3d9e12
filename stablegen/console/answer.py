"""One cached answer on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stablegen.console.tables import say, sheet
from stablegen.lab.reports.wording import DeviceNames
from stablegen.reports.answer import Divergence, Inspection

if TYPE_CHECKING:
    from rich.console import Console


def render(found: Inspection, console: Console) -> None:
    """Print an inspection: the record and its verdict, where other runs diverge from it, and its steps."""
    verdict = found.verdict
    names = _names(found)
    superseded = found.superseded_numerics
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
        "superseded": None if superseded is None else f"{found.superseded!r} by {names.short[superseded]}",
        "verified": None if found.verification is None else f"{found.verification.status}: {found.verification.reason}",
        "devices": names.legend if names.several else None,
    }
    for name, value in facts.items():
        if value is not None:
            _say_fact(name, value, console)
    for one in found.divergences:
        _render_divergence(one, names, console)
    if found.traced:
        _render_steps(found, console)


def _names(found: Inspection) -> DeviceNames:
    """Return short names for all numerics that are printed."""
    others = [name for one in found.divergences for name in (one.older_numerics, one.newer_numerics)]
    superseded = [] if found.superseded_numerics is None else [found.superseded_numerics]
    return DeviceNames.of([found.recorded.summary(), *superseded, *others])


def _say_fact(name: str, value: str, console: Console) -> None:
    say(console, f"{name:>13}  {value}")


def _render_divergence(one: Divergence, names: DeviceNames, console: Console) -> None:
    older, newer = _shown(one.older_text, one.older), _shown(one.newer_text, one.newer)
    rest = "" if one.whole else " (the rest is not known)"
    _say_fact("diverges", f"at step {one.step}, {one.source}; shared: {_shown(one.shared_text, one.shared)}", console)
    _say_fact("", f"{older} by {names.short[one.older_numerics]}", console)
    _say_fact("", f"{newer} by {names.short[one.newer_numerics]}{rest}", console)


def _render_steps(found: Inspection, console: Console) -> None:
    from rich.text import Text

    table = sheet("step", "token", "runner-up", "margin", "p(flip)", "", left=("token", "runner-up", ""))
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


def _shown(text: str | None, ids: Sequence[int]) -> str:
    return repr(text) if text is not None else " ".join(map(str, ids)) or "nothing"


def _token(token: int | None, text: str | None) -> str:
    return repr(text) if text is not None else str(token)
