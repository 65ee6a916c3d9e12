"""The guard: pure, never `exact` without proof, and a probability that means what it says."""

from __future__ import annotations

from math import erfc, prod, sqrt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import numerics, passed, record, trace, untraced, with_token

from stablegen.core.policy import Shape
from stablegen.core.record import Composition, Record
from stablegen.core.trace import Trace
from stablegen.core.verdict import DEFAULT_ACCEPTED_RISK, SelfCheck
from stablegen.guard.verdicts import NEGLIGIBLE_RISK, compare, flip_probabilities, fragile_steps, judge

HERE = numerics()
ELSEWHERE = numerics(torch="0.0.1")
margins = st.lists(st.floats(0, 8, width=32), min_size=1, max_size=20)
dtypes = st.sampled_from(["float32", "float16", "bfloat16"])


def failed(under: Any) -> SelfCheck:
    return SelfCheck(numerics=under, passed=False, checks={"beside other rows": "differ at step 1"})


def test_exact_needs_equal_numerics_and_a_passed_check() -> None:
    verdict = judge(record(margins=[0.0]), HERE, check=passed(HERE))
    assert (verdict.status, verdict.probability, verdict.basis) == ("exact", 0.0, "numerics")


@pytest.mark.parametrize(
    ("made", "now", "check", "reason"),
    [
        (record(), HERE, None, "has not been self-checked"),
        (record(), HERE, failed(HERE), "failed its self-check"),
        (record(), ELSEWHERE, passed(ELSEWHERE), "torch 2.13.0 -> 0.0.1"),
        (record(), ELSEWHERE, passed(HERE), "other numerics"),
        (record(numerics=numerics(policy="native")), numerics(policy="native"), None, "promises nothing"),
        (record(numerics=numerics(policy="native")), numerics(policy="native"), failed(HERE), "promises nothing"),
    ],
)
def test_never_exact_without_proof(made: Record, now: Any, check: SelfCheck | None, reason: str) -> None:
    verdict = judge(made, now, check=check)
    assert verdict.status == "stable"
    assert verdict.basis == "prior"
    assert reason in verdict.reason


def test_native_is_never_exact_whatever_a_check_says() -> None:
    control = numerics(policy="native")
    assert judge(record(numerics=control), control, check=passed(control)).status != "exact"


def test_a_check_of_other_numerics_proves_nothing() -> None:
    assert judge(record(), HERE, check=passed(ELSEWHERE)).status != "exact"


def flips(made: Trace, recorded: str, now: str, device: str = "cuda") -> list[float]:
    """Return the prior's probabilities between two dtypes on one kind of device."""
    found = flip_probabilities(made, numerics(dtype=recorded, device=device), numerics(dtype=now, device=device))
    assert found is not None
    return found


def test_unknown_without_a_trace() -> None:
    verdict = judge(untraced(), ELSEWHERE, check=passed(ELSEWHERE))
    assert (verdict.status, verdict.probability, verdict.step, verdict.basis) == ("unknown", None, None, "none")
    assert judge(untraced(), HERE, check=passed(HERE)).status == "exact"


@given(margins, dtypes, dtypes, st.floats(0, 1))
def test_the_accepted_risk_divides_stable_from_at_risk(
    gaps: list[float], recorded: str, now: str, accepted: float
) -> None:
    made = record(margins=gaps, numerics=numerics(dtype=recorded))
    assert made.trace is not None
    verdict = judge(made, numerics(dtype=now, torch="0.0.1"), check=None, accepted_risk=accepted)
    risks = flips(made.trace, recorded, now, "cpu")
    expected = 1 - prod(1 - risk for risk in risks)
    assert verdict.probability is not None
    assert verdict.probability == pytest.approx(expected, abs=1e-12)
    assert verdict.status == ("at_risk" if verdict.probability > accepted else "stable")


@given(margins, st.integers(0, 19), st.floats(0.001, 4), dtypes, dtypes)
def test_a_wider_margin_is_never_riskier(gaps: list[float], step: int, wider: float, recorded: str, now: str) -> None:
    better = list(gaps)
    better[step % len(gaps)] += wider
    risk, less = (
        judge(record(margins=each, numerics=numerics(dtype=recorded)), numerics(dtype=now, torch="0"), check=None)
        for each in (gaps, better)
    )
    assert risk.probability is not None
    assert less.probability is not None
    assert less.probability <= risk.probability + 1e-12


@given(margins, dtypes)
def test_a_flip_is_at_worst_even(gaps: list[float], dtype: str) -> None:
    assert all(0 <= risk <= 0.5 for risk in flips(trace(gaps), dtype, dtype))
    assert flips(trace([0.0]), dtype, dtype) == [0.5]


@pytest.mark.parametrize(
    ("recorded", "now", "device", "sigma"),
    [
        ("bfloat16", "bfloat16", "cuda", 0.6 * 2**-3),
        ("bfloat16", "bfloat16", "cpu", 1.6 * 2**-3),
        ("float16", "float16", "cuda", 0.9 * 2**-6),
        ("float32", "float32", "cuda", 140 * 2**-19),
        ("float32", "float32", "cpu", 140 * 2**-19),
        ("float32", "bfloat16", "cuda", 2.2 * 2**-3),
        ("bfloat16", "float32", "cpu", 2.2 * 2**-3),
        ("float16", "float32", "cuda", 2.2 * 2**-6),
    ],
)
@pytest.mark.parametrize("score", [20.0, -20.0])
def test_the_noise_of_the_prior(recorded: str, now: str, device: str, sigma: float, score: float) -> None:
    # scores from 16 to 32: one unit in the last place of bfloat16 is 2 ** (4 - 7)
    made = Trace.of([1], [2], [score], [score - sigma], [0])
    margin = score - made.runner_up_scores[0]
    assert flips(made, recorded, now, device) == [pytest.approx(0.5 * erfc(margin / sigma / sqrt(2)))]


def test_the_noise_is_a_cpus_where_either_is() -> None:
    here, there = numerics(device="cuda", dtype="bfloat16"), numerics(device="cpu", dtype="bfloat16")
    made = trace([0.1])
    assert flip_probabilities(made, here, there) == flip_probabilities(made, there, there)
    assert flip_probabilities(made, here, here) != flip_probabilities(made, there, there)


def test_the_noise_grows_with_the_score_and_not_below_one() -> None:
    small, one, large = (flips(trace([0.01], score=s), "bfloat16", "bfloat16")[0] for s in (0.1, 1.9, 100))
    assert small == pytest.approx(one, rel=1e-4)
    assert large > one


@pytest.mark.parametrize(("dtype", "measured"), [("bfloat16", 0.30), ("float16", 0.07)])
def test_the_prior_gives_the_measured_divergence(dtype: str, measured: float) -> None:
    # the basis of the prior: 5 % of all margins lie under 0.125, evenly; scores from 16 to 32; answers of 64 tokens
    bins = 4000
    risks = flips(trace([0.125 * (place + 0.5) / bins for place in range(bins)]), dtype, dtype)
    per_step = 0.05 * sum(risks) / bins
    assert measured / 2 < 1 - (1 - per_step) ** 64 < measured * 2


def test_float32_margins_are_not_cried_over() -> None:
    # none of 96 answers diverged in float32; a margin of 0.001 at a score of 20 is no risk there
    assert judge(record(margins=[0.001] * 64), ELSEWHERE, check=None, accepted_risk=0.01).status == "stable"
    assert judge(record(margins=[0.002] * 64), ELSEWHERE, check=None).status == "stable"


@pytest.mark.parametrize(("gaps", "step"), [([1.0, 1e-6, 0.0], 2), ([1.0, 0.0, 0.0], 1), ([0.5] * 3 + [0.4, 0.5], 3)])
def test_the_step_named_is_the_most_fragile(gaps: list[float], step: int) -> None:
    made = record(margins=gaps, numerics=numerics(dtype="bfloat16"))
    verdict = judge(made, numerics(dtype="bfloat16", torch="0.0.1"), check=None)
    assert (verdict.step, verdict.token, verdict.runner_up) == (step, step, 1000 + step)
    assert verdict.margin == pytest.approx(gaps[step], abs=2e-6)


def test_the_default_accepted_risk() -> None:
    made = record(margins=[5e-5])
    probability = judge(made, ELSEWHERE, check=None).probability
    assert judge(made, ELSEWHERE, check=None) == judge(made, ELSEWHERE, check=None, accepted_risk=DEFAULT_ACCEPTED_RISK)
    assert probability is not None


def test_judging_is_pure() -> None:
    made = record(margins=[0.001, 0.5])
    once = judge(made, ELSEWHERE, check=None)
    assert judge(made, ELSEWHERE, check=None) == once
    assert made == record(margins=[0.001, 0.5])


# -- after a recomputation ---------------------------------------------------------------------------------------


def test_compare_equal_bits() -> None:
    verdict = compare(record(numerics=ELSEWHERE), record(), check=passed(HERE))
    assert (verdict.status, verdict.probability, verdict.basis) == ("exact", 0.0, "verified")


@pytest.mark.parametrize("policy", ["native", "single"])
def test_equal_bits_promise_nothing_without_a_kept_promise(policy: str) -> None:
    now = numerics(policy=policy)
    for check in (None, SelfCheck(numerics=now, passed=policy == "native")):
        assert compare(record(), record(numerics=now), check=check).status == "stable"


@pytest.mark.parametrize(("slot", "slot_free", "exact"), [(0, False, True), (1, False, False), (1, True, True)])
def test_a_slot_that_matters_has_to_be_the_first(slot: int, slot_free: bool, exact: bool) -> None:
    now = numerics(policy="padded:2")
    check = SelfCheck(numerics=now, shape=Shape(64), passed=True, slot_free=slot_free)
    made = record(numerics=now, composition=Composition(2, 1, slot, Shape(64)))
    assert (judge(made, now, check=check).status == "exact") == exact


def test_compare_equal_tokens_other_scores() -> None:
    old = record()
    assert old.trace is not None
    columns = (old.trace.tokens, old.trace.runner_ups, old.trace.scores, old.trace.runner_up_scores)
    verdict = compare(old, record(traced=Trace.of(*columns, [1, 2])), check=passed(HERE))
    assert (verdict.status, verdict.probability, verdict.basis) == ("stable", 0.0, "verified")


@pytest.mark.parametrize("step", [0, 1])
def test_compare_other_tokens(step: int) -> None:
    fresh = record(margins=[0.5, 0.25])
    verdict = compare(with_token(fresh, step, 77), fresh, check=passed(HERE))
    assert (verdict.status, verdict.probability, verdict.basis) == ("diverged", 1.0, "verified")
    assert (verdict.step, verdict.token, verdict.runner_up) == (step, 77, step)
    assert verdict.margin == [0.5, 0.25][step]


def test_compare_a_longer_answer() -> None:
    verdict = compare(record(margins=[0.5]), record(margins=[0.5, 0.25]), check=passed(HERE))
    assert (verdict.status, verdict.step, verdict.token, verdict.runner_up) == ("diverged", 1, None, 1)


@pytest.mark.parametrize(("tokens", "status"), [((0, 1), "stable"), ((0, 2), "diverged"), ((0,), "diverged")])
def test_compare_without_a_trace(tokens: tuple[int, ...], status: str) -> None:
    verdict = compare(untraced(tokens), record(), check=passed(HERE))
    assert (verdict.status, verdict.basis) == (status, "verified")


def test_the_rest_is_left_to_its_margins_only_where_it_is_negligible_together() -> None:
    assert fragile_steps([0.5, 0.0, 0.0]) == (1, 0.0)
    assert fragile_steps([0.0, 0.0]) == (0, 0.0)
    assert fragile_steps([]) == (0, 0.0)
    assert fragile_steps([0.0, 1.0])[0] == 2
    # many small risks add up
    count, rest = fragile_steps([NEGLIGIBLE_RISK / 10] * 30)
    assert 19 <= count <= 21
    assert 0.9 * NEGLIGIBLE_RISK < rest <= NEGLIGIBLE_RISK
