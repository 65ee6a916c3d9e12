"""How far margins move between two numerics, as measured: the probability that a step flips. Pure; no I/O.

Both numerics score the same tokens. A step's margin, the lead of the token chosen under the first numerics over its
best rival, moves by some noise; the step flips where it falls below zero. Noise grows with the size of the scores, so
it is counted in units of ``2 ** (power * exponent of the best score)``, with ``power`` fitted to the measured noise.

Within the measured range, the probability that noise exceeds a margin is the share of measured noise that did. It is
taken among the steps with the nearest margins, because noise may be smaller where margins are narrow, together with
the share among all steps, weighted as a few steps. Beyond that range it is a generalised Pareto tail, fitted to the
largest tenth of the noise, with a shape one standard error heavier than the fit, so that noise larger than any measured
is overestimated rather than underestimated. Margins of exactly zero, where rounding made two scores equal, are counted
apart: they flip as often as was measured.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from math import frexp, inf, log, sqrt

from stablegen.core.calibration import Calibration, beyond_tail, unit
from stablegen.core.numerics import Numerics
from stablegen.core.request import ModelIdentity
from stablegen.core.trace import Trace
from stablegen.errors import CalibrationError

LEAST_STEPS = 200
"""The fewest steps that are fitted."""
KNOTS = 512
"""The most sizes of noise that a calibration keeps."""
NEAR_STEPS, NEAR_SHARE = 300, 0.01
"""How many nearest steps are used for one margin: this number, or this share of all steps if it is larger."""
PRIOR_STEPS = 20
"""The weight, in steps, of the noise of all steps beside those."""
TAIL = 0.1
"""The share of steps, those of largest noise, to which the tail is fitted."""


def moved(recorded: Trace, current: Trace) -> list[tuple[float, float, float, bool]]:
    """Return, for each step that both have, margin, best score, how far the margin moved, and whether the step flipped.

    ``current`` must be teacher-forced along the tokens of ``recorded``.
    """
    found = []
    rows = zip(recorded.tokens, recorded.scores, recorded.margins, current.tokens, current.margins, strict=False)
    for token, score, margin, chosen, now in rows:
        if inf in (margin, now):
            continue  # only one token was left to sample from, so the distance to the next is unknown
        flipped = chosen != token
        # its token leads by `now`, or trails by it where the step flipped
        found.append((margin, score, (-now if flipped else now) - margin, flipped))
    return found


def fit(
    model: ModelIdentity,
    recorded: Numerics,
    current: Numerics,
    pairs: Sequence[tuple[Trace, Trace]],
    *,
    prompts: int,
) -> Calibration:
    """Return the calibration fitted to pairs of traces: one as recorded, one teacher-forced along its tokens.

    ``prompts``: how many there were; each may have been scored several times.
    Raises ``CalibrationError`` where there are fewer than ``LEAST_STEPS`` steps.
    """
    from scipy.stats import genpareto  # slow to import, and needed only here

    seen = [step for pair in pairs for step in moved(*pair)]
    if len(seen) < LEAST_STEPS:
        raise CalibrationError(
            f"{len(seen)} steps are too few to calibrate",
            accepted=f"at least {LEAST_STEPS} steps",
            hint="Use more prompts, or more tokens of each",
        )
    noise = [abs(size) for _, _, size, _ in seen]
    still = sum(size == 0.0 for size in noise) / len(noise)
    grid = still > 0.02 or len(set(noise)) < len(noise) // 4
    power = _power([score for _, score, _, _ in seen], noise)
    if grid:  # units of powers of two, so that equal noise stays equal
        power = float(round(power))
    sizes = sorted(size / unit(score, power) for size, (_, score, _, _) in zip(noise, seen, strict=True))
    knots = _knots(sizes)
    above = [1.0 - bisect.bisect_right(sizes, knot) / len(sizes) for knot in knots]
    from_on = [1.0 - bisect.bisect_left(sizes, knot) / len(sizes) for knot in knots]
    start = sizes[int(len(sizes) * (1.0 - TAIL))]
    excesses = [size - start for size in sizes if size > start]
    if len(excesses) >= 20:
        shape = genpareto.fit(excesses, floc=0.0)[0]
        shape = max(shape, 0.0) + (1.0 + max(shape, 0.0)) / sqrt(len(excesses))
        _, _, scale = genpareto.fit(excesses, f0=shape, floc=0.0)
    else:  # almost nothing moved: assume a wide tail at the scale of the largest noise
        shape, scale = 0.5, max(sizes[-1], min((size for size in sizes if size > 0.0), default=1e-6))
    share = max(len(excesses), 1) / len(sizes)
    beyond = [beyond_tail(knot, start, share, shape, scale) for knot in knots if knot > start]
    inside = len(knots) - len(beyond)
    units = [unit(score, power) for _, score, _, _ in seen]
    steps = sorted((margin / one, abs(size) / one) for (margin, _, size, _), one in zip(seen, units, strict=True))
    near_above, near_from_on = _near(steps, knots, above[:inside] + beyond, from_on[:inside] + beyond)
    ties = [flipped for margin, _, _, flipped in seen if margin == 0.0]
    return Calibration(
        model=model,
        recorded=recorded,
        current=current,
        prompts=prompts,
        steps=len(seen),
        flips=sum(flipped for *_, flipped in seen),
        ties=len(ties),
        tie_flips=sum(ties),
        power=power,
        grid=grid,
        sizes=tuple(knots),
        above=tuple(above),
        from_on=tuple(from_on),
        near_above=near_above,
        near_from_on=near_from_on,
        tail_from=start,
        tail_share=share,
        tail_shape=float(shape),
        tail_scale=float(scale),
    )


def _knots(sizes: Sequence[float]) -> list[float]:
    """Return the sizes to keep, ascending and distinct: all, or ``KNOTS`` evenly spaced quantiles."""
    distinct = sorted(set(sizes))
    if len(distinct) <= KNOTS:
        return distinct
    last = len(sizes) - 1
    return sorted({sizes[round(last * i / (KNOTS - 1))] for i in range(KNOTS)})


def _near(
    steps: Sequence[tuple[float, float]], knots: Sequence[float], above: Sequence[float], from_on: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ``above`` and ``from_on``, the shares of all noise beyond each knot, as estimated from the nearest steps.

    ``steps``: margin and noise of each, by margin. Neither result increases from one knot to the next.
    """
    found = []
    margins = [margin for margin, _ in steps]
    first = bisect.bisect_right(margins, 0.0)  # ties are a class of their own
    count = min(max(NEAR_STEPS, int(NEAR_SHARE * len(steps))), len(steps) - first)
    for knot, whole_above, whole_from_on in zip(knots, above, from_on, strict=True):
        begin = bisect.bisect_left(margins, knot) - count // 2
        begin = max(first, min(begin, len(steps) - count))
        near = [size for _, size in steps[begin : begin + count]]
        larger = sum(size > knot for size in near) + PRIOR_STEPS * whole_above
        least = sum(size >= knot for size in near) + PRIOR_STEPS * whole_from_on
        found.append((larger / (count + PRIOR_STEPS), least / (count + PRIOR_STEPS)))
    larger, least = above[-1], from_on[-1]  # where the tail goes on
    for at in range(len(found) - 1, -1, -1):
        larger, least = found[at] = (max(found[at][0], larger), max(found[at][1], least))
    return tuple(one for one, _ in found), tuple(one for _, one in found)


def _power(scores: Sequence[float], noise: Sequence[float]) -> float:
    """Return the power of the score's binade with which noise grows, from 0 (not at all) to 1."""
    from scipy.stats import linregress

    points = [
        (max(frexp(score)[1] - 1, 0), log(size, 2)) for score, size in zip(scores, noise, strict=True) if size > 0
    ]
    exponents = {exponent for exponent, _ in points}
    if len(exponents) < 2:
        return 1.0
    slope = linregress([x for x, _ in points], [y for _, y in points]).slope
    return float(min(max(slope, 0.0), 1.0))
