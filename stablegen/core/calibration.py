"""The measured noise between two numerics, and the probability that it flips a step."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import cached_property
from math import frexp, ldexp

from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.request import ModelIdentity
from stablegen.core.trace import Trace

VERSION = 2
NEGLIGIBLE = 1e-7
"""A step's probability of a flip below this counts as zero: a thousand such steps add less than 1e-4."""
_FAR = 1e12


class Calibration(Frozen):
    """The noise between two numerics of one model, measured over ``steps`` steps of ``prompts`` prompts.

    ``sizes``: absolute noise in units, ascending. ``above`` and ``from_on``: for each size, the share of all steps
    whose noise was larger, and at least as large; ``near_above`` and ``near_from_on``: the same among steps whose
    margins are about that size. ``grid``: whether noise takes few distinct values, as between scores of 16 bits.
    ``tail_from`` (units), ``tail_share``, ``tail_shape``, ``tail_scale``: the Pareto tail. ``ties`` and ``tie_flips``:
    steps of margin zero, and how many of them flipped; ``flips``: all steps that flipped.
    """

    version: int = VERSION
    model: ModelIdentity
    recorded: Numerics
    current: Numerics
    prompts: int
    steps: int
    flips: int
    ties: int
    tie_flips: int
    power: float
    grid: bool
    sizes: tuple[float, ...]
    above: tuple[float, ...]
    from_on: tuple[float, ...]
    near_above: tuple[float, ...]
    near_from_on: tuple[float, ...]
    tail_from: float
    tail_share: float
    tail_shape: float
    tail_scale: float

    @property
    def basis(self) -> str:
        """Return in words how much data it rests on."""
        return f"calibrated on {self.steps} steps of {self.prompts} prompts"

    def quantile(self, share: float, score: float = 16.0) -> float:
        """Return the noise that a ``share`` of the steps does not exceed where the best score is ``score``."""
        at = next((i for i, above in enumerate(self.above) if above <= 1.0 - share), len(self.sizes) - 1)
        return self.sizes[at] * unit(score, self.power)

    def flip_probabilities(self, trace: Trace) -> list[float]:
        """Return, for each step of a trace under ``recorded``, the probability that it flips under ``current``."""
        flip, reaches, units = self._tables
        found = []
        steps = zip(trace.scores, trace.runner_up_scores, trace.tokens, trace.runner_ups, strict=True)
        for best, second, token, runner_up in steps:
            exponent = frexp(best)[1]
            margin = best - second
            far = margin > reaches[exponent]
            found.append(0.0 if far else flip(margin / units[exponent], runner_up < token))
        return found

    def flip_probability(self, margin: float, score: float, *, rival_is_earlier: bool = False) -> float:
        """Return the probability that a step of this margin and best score flips.

        ``rival_is_earlier``: whether the runner-up has the lower id, so that it wins a tie.
        """
        return self._tables[0](margin / unit(score, self.power), rival_is_earlier)

    @cached_property
    def _tables(self) -> tuple[Callable[[float, bool], float], list[float], list[float]]:
        """Return the probability of a flip as a function of the margin in units and whether the rival has the lower id.

        With it two lists, indexed by ``frexp``'s exponent of the best score: the margin beyond which the probability
        is negligible, and the unit.
        """
        # noise of either sign is equally likely, hence the halves
        tied = (self.tie_flips + 0.5) / (self.ties + 1.0)
        sizes, above = self.sizes, [0.5 * share for share in self.near_above]
        from_on = [0.5 * share for share in self.near_from_on] if self.grid else above
        largest, tail = self.sizes[-1], (self.tail_from, 0.5 * self.tail_share, self.tail_shape, self.tail_scale)

        def flip(size: float, rival_is_earlier: bool) -> float:
            if size > largest:
                return beyond_tail(size, *tail)
            if size <= 0.0:
                return tied
            at = bisect.bisect_left(sizes, size)
            if sizes[at] == size:
                return from_on[at] if rival_is_earlier else above[at]
            if at == 0:
                return 0.5
            if self.grid:
                return above[at - 1]
            part = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
            return above[at - 1] + part * (above[at] - above[at - 1])

        reach = max(self.tail_from, self.tail_scale)
        while reach < _FAR and flip(reach, False) > NEGLIGIBLE:
            reach *= 1.1
        exponents = [*range(130), *range(-150, 0)]  # every float32's; negative ones index from the end
        units = [unit(ldexp(0.5, exponent), self.power) for exponent in exponents]
        return flip, [reach * one for one in units], units


def unit(score: float, power: float) -> float:
    """Return the unit in which noise is counted for a best score; below a score of 1 it shrinks no further."""
    return float(2.0 ** (power * max(frexp(score)[1] - 1, 0)))


def beyond_tail(size: float, start: float, share: float, shape: float, scale: float) -> float:
    """Return the share of noise larger than ``size``, by the Pareto tail that begins at ``start`` with ``share``."""
    return float(share * (1.0 + shape * (size - start) / scale) ** (-1.0 / shape))
