"""Why a request missed: the nearest stored request, and the parts of the key in which the two differ."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stablegen.core.record import Record
from stablegen.core.request import Request

_COMPARED = 50
"""How many candidates, nearest by the cheap measure, are compared character by character."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The nearest stored record, and the parts of the key that differ: name -> (requested, stored)."""

    nearest: Record
    differences: dict[str, tuple[Any, Any]]


def explain_miss(request: Request, records: Iterable[Record]) -> Explanation | None:
    """Return the stored request nearest to ``request``; None where the store is empty."""
    nearest = heapq.nlargest(_COMPARED, records, key=lambda record: _rough(request, record.request))
    if not nearest:
        return None
    best = max(nearest, key=lambda record: _fine(request, record.request))
    return Explanation(best, _differences(request, best.request))


def _differences(asked: Request, stored: Request) -> dict[str, tuple[Any, Any]]:
    parts: dict[str, tuple[Any, Any]] = {}
    if asked.prompt_ids != stored.prompt_ids:
        same_text = asked.prompt is not None and asked.prompt == stored.prompt
        name = "prompt tokens" if same_text or asked.prompt is None or stored.prompt is None else "prompt"
        parts[name] = (asked.prompt, stored.prompt) if name == "prompt" else (asked.prompt_ids, stored.prompt_ids)
    for field in type(asked.params).model_fields:
        values = getattr(asked.params, field), getattr(stored.params, field)
        if values[0] != values[1]:
            parts[field] = values
    if asked.model.identity != stored.model.identity:
        parts["model"] = (_model(asked), _model(stored))
    if asked.tokenizer != stored.tokenizer:
        parts["tokenizer"] = (asked.tokenizer[:12], stored.tokenizer[:12])
    return parts


def _model(request: Request) -> str:
    return f"{request.model.name} ({' '.join(request.model.identity.values())[:40]})"


def _rough(asked: Request, stored: Request) -> tuple[int, int]:
    same = zip(asked.prompt_ids, stored.prompt_ids, strict=False)
    common = next((i for i, (a, b) in enumerate(same) if a != b), min(len(asked.prompt_ids), len(stored.prompt_ids)))
    return 2 * common - max(len(asked.prompt_ids), len(stored.prompt_ids)), _equal_parts(asked, stored)


def _fine(asked: Request, stored: Request) -> tuple[float, int]:
    if asked.prompt is not None and stored.prompt is not None:
        ratio = difflib.SequenceMatcher(None, asked.prompt, stored.prompt, autojunk=False).ratio()
    else:
        ratio = difflib.SequenceMatcher(None, asked.prompt_ids, stored.prompt_ids, autojunk=False).ratio()
    return ratio, _equal_parts(asked, stored)


def _equal_parts(asked: Request, stored: Request) -> int:
    return (
        (asked.params == stored.params)
        + 2 * (asked.tokenizer == stored.tokenizer)
        + 2 * (asked.model.identity == stored.model.identity)
    )
