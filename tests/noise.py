"""Traces made up, and what another run would have given along them: noise on every margin."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from stablegen.core.trace import Trace

Noise = Callable[[float, float], float]


def traces(seed: int, count: int, steps: int = 64, grid: float | None = None, reach: float = 2.0) -> list[Trace]:
    """Return traces whose margins are half of a normal distribution's, and whose scores lie between 2 and 60."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        scores = [draw.uniform(2, 60) for _ in range(steps)]
        margins = [abs(draw.gauss(0, reach)) for _ in range(steps)]
        if grid is not None:
            scores, margins = ([round(value / grid) * grid for value in column] for column in (scores, margins))
        tokens, rivals = ([draw.randrange(50000) for _ in range(steps)] for _ in range(2))
        seconds = [score - margin for score, margin in zip(scores, margins, strict=True)]
        found.append(Trace.of(tokens, rivals, scores, seconds, range(steps)))
    return found


def shaken(old: Trace, noise: Noise, grid: float | None = None) -> Trace:
    """Return what another run would choose along a trace, its margins moved by noise."""
    columns: list[tuple[Any, ...]] = []
    for token, rival, best, second in zip(old.tokens, old.runner_ups, old.scores, old.runner_up_scores, strict=True):
        margin = best - second
        margin += noise(best, margin)
        if grid is not None:
            margin = round(margin / grid) * grid
        stays = margin > 0 or (margin == 0 and token < rival)
        columns.append((token, rival, best, best - margin) if stays else (rival, token, best, best + margin))
    tokens, rivals, scores, seconds = zip(*columns, strict=True)
    return Trace.of(tokens, rivals, scores, seconds, range(len(old)))


def steady(draw: random.Random, size: float) -> Noise:
    return lambda score, margin: draw.gauss(0, size)


def growing(draw: random.Random, size: float) -> Noise:
    """Noise that doubles with the binade of the score."""
    return lambda score, margin: draw.gauss(0, size) * 2.0 ** (len(bin(int(abs(score)))) - 3)


def heavy(draw: random.Random, size: float) -> Noise:
    return lambda score, margin: size * draw.gauss(0, 1) / max(draw.gauss(0, 1) ** 2, 0.05)


def quieter_where_it_is_close(draw: random.Random, size: float) -> Noise:
    """Noise that is a tenth as large where margins are narrow."""
    return lambda score, margin: draw.gauss(0, size if margin > 3 * size else size / 10)
