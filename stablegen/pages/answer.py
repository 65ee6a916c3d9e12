"""The page of one answer: how easily each token flips, and where other runs diverge from it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stablegen.lab.reports.wording import DeviceNames
from stablegen.pages.render import number, one_line, write_page
from stablegen.reports.answer import Inspection, Step

LEVELS = (1e-6, 1e-4, 1e-2, 1e-1)
"""Probabilities of a flip at which a token's colour changes to the next class."""
LEVEL_NAMES = ("below 10⁻⁶", "to 10⁻⁴", "to 1 %", "to 10 %", "above 10 %")


def write_answer(found: Inspection, file: Path) -> None:
    """Write the page of an inspection to ``file``."""
    steps = [_shown(step) for step in found.steps]
    fragile = found.fragile
    risks = [step.probability or 0.0 for step in found.steps]
    margins = [step.margin for step in found.steps if step.margin is not None]
    mine, now = found.recorded.model_dump(), found.current.model_dump()
    write_page(
        "answer.html.j2",
        file,
        machine=found.current.device_model,
        found=found,
        devices=_devices(found),
        steps=steps,
        fragile=fragile,
        first=risks.index(max(risks)) if risks else 0,
        smallest=min(margins, default=None),
        smallest_at=_place(found, min(margins, default=None)),
        levels=LEVEL_NAMES,
        names=[name for name in mine if mine[name] is not None or now[name] is not None],
        mine=mine,
        now=now,
        differing=list(found.recorded.differences(found.current)),
        computed=f"{datetime.fromtimestamp(found.created, UTC):%Y-%m-%d %H:%M:%S} UTC",
        seen=[f"{datetime.fromtimestamp(hit.seen, UTC):%Y-%m-%d %H:%M}" for hit in found.flagged],
    )


def _devices(found: Inspection) -> DeviceNames:
    """Return short names for the numerics of other runs and of flagged hits."""
    names = [name for one in found.divergences for name in (one.older_numerics, one.newer_numerics)]
    names += [name for hit in found.flagged for name in (hit.recorded, hit.current)]
    return DeviceNames.of(names if found.superseded_numerics is None else [*names, found.superseded_numerics])


def level(probability: float | None) -> int:
    """Return the class, 0 to 4, of a probability of a flip; 0 for none."""
    return sum((probability or 0.0) >= one for one in LEVELS)


def _place(found: Inspection, margin: float | None) -> int | None:
    return None if margin is None else [step.margin for step in found.steps].index(margin)


def _shown(step: Step) -> dict[str, Any]:
    """Return a step's token and details as the page shows them."""
    return {
        "text": _token(step.token, step.text),
        "breaks": step.text is not None and step.text.endswith("\n"),
        "level": level(step.probability),
        "runner_up": "" if step.runner_up is None else _token(step.runner_up, step.runner_up_text),
        "best": "" if step.best is None else _token(step.best, step.best_text),
        "margin": "none" if step.margin is None else number(step.margin, 4),
        "score": number(step.score, 6),
        "probability": number(step.probability),
        "logprob": number(step.logprob, 5),
        "traced": step.probability is not None,
    }


def _token(token: int, text: str | None) -> str:
    """Return a token's text, or its id where the text is unknown or empty."""
    return one_line(text) if text else f"[{token}]"
