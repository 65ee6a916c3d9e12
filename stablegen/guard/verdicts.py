"""The guard: whether a cached answer would come out the same if it were computed now. Pure; no I/O.

Equal ``Numerics`` under a policy whose promise was checked here mean ``exact``. Anything else is judged by the
margins of the record's steps: a step flips if the noise between two numerics exceeds its margin, and an answer
diverges if any step flips, ``1 - prod(1 - p_t)``.

**Calibration** (``calibration.py``) measures, for a model and two numerics, how far margins move. Where there is none,
**the prior** is used: the noise on a margin is taken as normal, with its standard deviation in units in the last place
(ulp) of the winning score: ``NOISE[device][dtype]`` between numerics of one dtype, ``CROSS_DTYPE_NOISE`` ulp of the
coarser dtype otherwise. Verdicts that rest on it say so (``basis="prior"``).

The figures are the upper ends of what ``tests/benchmarks/margin_noise.py`` measured, for the two trained models of this
project, batch size 1 against 2, 8 and 32, 64 greedy tokens a prompt (results beside it). Standard deviations in ulp:

- H100, 24 prompts: 4-138 in float32 (the model with the smaller vocabulary moves 20 times as far), 0.3-0.6 in bfloat16,
  0.6-0.9 in float16.
- CPU with AVX-512, 48 prompts: 3-111 in float32, 0.7-1.6 in bfloat16 (taken for float16 too), and 1.1-2.2 between
  float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import erfc, frexp, ldexp, sqrt
from typing import TypeVar

from stablegen.core.calibration import Calibration
from stablegen.core.numerics import Numerics
from stablegen.core.policy import keeps_bits
from stablegen.core.record import Record
from stablegen.core.trace import Trace, first_difference
from stablegen.core.verdict import DEFAULT_ACCEPTED_RISK, SelfCheck, Verdict

_T = TypeVar("_T")
NEGLIGIBLE_RISK = 1e-4
"""The probability of divergence up to which verification skips the remaining steps, where it decodes step by step."""
MANTISSA_BITS = {"float32": 23, "float16": 10, "bfloat16": 7}
NOISE = {
    "cuda": {"float32": 140.0, "float16": 0.9, "bfloat16": 0.6},
    "cpu": {"float32": 140.0, "float16": 1.6, "bfloat16": 1.6},
}
"""Standard deviation of the noise between two numerics of one dtype, in ulp; the CPU's where either is on a CPU."""
CROSS_DTYPE_NOISE = 2.2
"""Standard deviation of the noise between two dtypes, in ulp of the coarser one."""

EXACT = Verdict(
    status="exact", probability=0.0, basis="numerics", reason="same numerics, and the policy keeps its bits"
)


def judge(
    record: Record,
    numerics: Numerics,
    *,
    check: SelfCheck | None,
    accepted_risk: float = DEFAULT_ACCEPTED_RISK,
    calibration: Calibration | None = None,
) -> Verdict:
    """Return the verdict on a hit if it were recomputed under ``numerics``.

    ``calibration``: of the record's model, from its numerics to these; without one the prior is used.
    ``check`` is the self-check of those numerics with the record's model, None if there was none; without a passed
    one nothing is ``exact``. ``accepted_risk`` is the probability of divergence up to which a hit is ``stable``. The
    verdict's step is the most fragile one, the first where several are equally fragile.
    """
    same = record.numerics.digest == numerics.digest
    if same and _kept(check, record):
        return EXACT
    if record.trace is None:
        return Verdict(status="unknown", reason="the record has no trace, so it cannot be judged")
    risks = flip_probabilities(record.trace, record.numerics, numerics, calibration)
    if risks is None:
        dtypes = " and ".join(sorted({record.numerics.dtype, numerics.dtype} - MANTISSA_BITS.keys()))
        return Verdict(status="unknown", reason=f"no calibration, and no prior for how far margins move in {dtypes}")
    survival = 1.0
    for risk in risks:
        survival *= 1.0 - risk
    probability = 1.0 - survival
    step = max(range(len(risks)), key=risks.__getitem__)
    best, second = record.trace.scores[step], record.trace.runner_up_scores[step]
    return Verdict(
        status="at_risk" if probability > accepted_risk else "stable",
        probability=probability,
        step=step,
        token=record.trace.tokens[step],
        runner_up=record.trace.runner_ups[step],
        margin=best - second,
        basis="prior" if calibration is None else "calibrated",
        reason=_reason(record, numerics, same=same, check=check)
        + ("" if calibration is None else f"; {calibration.basis}"),
    )


def fragile_steps(risks: Sequence[float]) -> tuple[int, float]:
    """Return how many first steps must be decoded again for the risk of the rest to be negligible, and that risk."""
    survival = 1.0
    for count in range(len(risks), 0, -1):
        if survival * (1.0 - risks[count - 1]) < 1.0 - NEGLIGIBLE_RISK:
            return count, 1.0 - survival
        survival *= 1.0 - risks[count - 1]
    return 0, 1.0 - survival


def compare(old: Record, fresh: Record, *, check: SelfCheck | None, how: str = "recomputed") -> Verdict:
    """Return the verdict on a hit after it was recomputed: equal bits, equal tokens, or where they diverge.

    Equal bits are ``exact`` only if the next run will give them too, by the ``check`` of the fresh record's numerics.
    A ``diverged`` verdict names the old answer's token and the fresh one's at the first step that differs. ``how``, the
    way in which the fresh record was made, begins the reason.
    """
    step = first_difference(old.token_ids, fresh.token_ids)
    if step is not None:
        return Verdict(
            status="diverged",
            probability=1.0,
            step=step,
            token=_at(old.token_ids, step),
            runner_up=_at(fresh.token_ids, step),
            margin=None if old.trace is None else _at(old.trace.margins, step),
            basis="verified",
            reason=f"{how}: the fresh answer differs from step {step} on",
        )
    if old.trace is None or fresh.trace is None:
        bits, found = False, "no trace to compare"
    else:
        bits = old.trace.score_hash == fresh.trace.score_hash and old.logprobs == fresh.logprobs
        found = "every score row has the same bits" if bits else "same tokens, other scores"
    return Verdict(
        status="exact" if bits and _kept(check, fresh) else "stable",
        probability=0.0,
        basis="verified",
        reason=f"{how}: {found}",
    )


def _at(values: tuple[_T, ...], step: int) -> _T | None:
    return values[step] if step < len(values) else None


def _kept(check: SelfCheck | None, record: Record) -> bool:
    """Return whether the record's policy promises its bits, and a self-check found the promise kept for its slot."""
    if check is None or not check.passed or check.numerics.digest != record.numerics.digest:
        return False
    slot_matters = check.shape.width is not None and not check.slot_free
    return keeps_bits(record.numerics.policy) and not (slot_matters and record.composition.slot)


def flip_probabilities(
    trace: Trace, recorded: Numerics, current: Numerics, calibration: Calibration | None = None
) -> list[float] | None:
    """Return, for each step, the probability that its two best tokens swap places, by calibration or by the prior.

    None where there is no calibration, and no prior for a dtype.
    ``recorded`` are the numerics that computed the trace, ``current`` those that would recompute it.
    """
    if calibration is not None:
        return calibration.flip_probabilities(trace)
    if not {recorded.dtype, current.dtype} <= MANTISSA_BITS.keys():
        return None
    bits = min(MANTISSA_BITS[recorded.dtype], MANTISSA_BITS[current.dtype])
    if recorded.dtype == current.dtype:
        noise = NOISE["cuda" if recorded.device == current.device == "cuda" else "cpu"][current.dtype]
    else:
        noise = CROSS_DTYPE_NOISE
    risks = []
    for best, second in zip(trace.scores, trace.runner_up_scores, strict=True):
        # below 1 the noise of the layers underneath does not shrink with the score
        exponent = max(frexp(best)[1] - 1, 0)
        sigma = noise * ldexp(1.0, exponent - bits)
        risks.append(0.5 * erfc((best - second) / (sigma * sqrt(2.0))))
    return risks


def _reason(record: Record, numerics: Numerics, *, same: bool, check: SelfCheck | None) -> str:
    if same and not keeps_bits(numerics.policy):
        return f"policy {numerics.policy} promises nothing, even under equal numerics"
    if same and check is None:
        return f"policy {numerics.policy} has not been self-checked here"
    if same:
        return f"policy {numerics.policy} failed its self-check here"
    changed = ", ".join(
        f"{name} {before} -> {now}" for name, (before, now) in record.numerics.differences(numerics).items()
    )
    return f"other numerics: {changed}"
