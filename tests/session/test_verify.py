"""Verification and repair: what a fresh run gives, found in one pass over the cached answer.

Every fresh record is held against the generation of a client that knows nothing, bit for bit. The divergences are real
(an answer of `native` in bfloat16, under `invariant` in float32) or planted (a token edited, an answer cut, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from support import client, near_tie, numerics, request, small_directory, untraced, with_token

from stablegen.core.answer import Completion, Verification
from stablegen.core.record import Composition, Record
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import NO_ANSWERS, Answers, Generated
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.regenerate import regenerate
from stablegen.errors import InvalidRequestError, NonFiniteScoresError, PromiseWarning, RecordNotFoundError
from stablegen.guard.verdicts import NEGLIGIBLE_RISK

PROMPTS = [f"{opening} {subject}" for opening in ("What is", "Tell me about", "I never") for subject in ("music", "it")]
NEW = 24

pytestmark = pytest.mark.filterwarnings("ignore::stablegen.errors.MarginWarning")


def fresh(folder: Path, prompts: Sequence[str] = PROMPTS, **changes: Any) -> list[Completion]:
    """Return what a client that knows nothing generates under `invariant`."""
    with client(folder, policy="invariant", **changes) as asking:
        return asking.complete(prompts, max_new_tokens=NEW)


def same(one: Record, other: Record) -> bool:
    """Return whether two records hold the same answer, bit for bit, under the same numerics."""
    return (one.trace, one.text, one.finish_reason, one.numerics) == (
        other.trace,
        other.text,
        other.finish_reason,
        other.numerics,
    )


def assert_true(verified: Verification, truth: Record) -> None:
    """Hold a verification against a fresh generation."""
    assert verified.fresh is not None
    assert same(verified.fresh, truth)
    mine, theirs = verified.record.token_ids, truth.token_ids
    steps = [step for step, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]]
    verdict = verified.verdict
    if mine == theirs:
        assert verdict.status in ("exact", "stable")
        assert verified.continuations == ((), ())
        return
    assert verdict.status == "diverged"
    step = steps[0] if steps else min(len(mine), len(theirs))
    assert verdict.step == step
    assert verified.continuations == (mine[step:], theirs[step:])
    assert verdict.token == (mine[step] if step < len(mine) else None)
    assert verdict.runner_up == (theirs[step] if step < len(theirs) else None)


@pytest.mark.slow
def test_answers_of_other_numerics_are_settled_in_one_pass(tmp_path: Path) -> None:
    truth = fresh(tmp_path / "truth")
    with client(tmp_path / "old", policy="native", dtype="bfloat16") as asking:
        asking.complete(PROMPTS, max_new_tokens=NEW)
    with client(tmp_path / "old", policy="invariant") as later:
        before = [later.inspect(done.key) for done in truth]
        found = later.verify([done.key for done in truth])
        for verified, done, old in zip(found, truth, before, strict=True):
            assert verified.record == old
            assert_true(verified, done.record)
            assert verified.verdict.reason.startswith("computed in one pass")
            assert later.inspect(done.key) == old  # looking changes nothing
    statuses = {verified.verdict.status for verified in found}
    assert statuses == {"stable", "diverged"}, "the two dtypes should part somewhere, and not everywhere"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unaltered_answer_is_exact(tmp_path: Path, dtype: str) -> None:
    fresh(tmp_path / "cache", dtype=dtype)
    with client(tmp_path / "cache", policy="invariant", dtype=dtype) as later:
        for verified in later.verify(later.complete(PROMPTS, max_new_tokens=NEW)):
            assert verified.verdict.status == "exact"
            assert verified.verdict.basis == "verified"
            assert verified.fresh is not None
            assert same(verified.fresh, verified.record)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Return one answer as it is generated."""
    return fresh(tmp_path_factory.mktemp("truth"), ["Tell me about music"])[0].record


def cut(old: Record, length: int) -> Record:
    assert old.trace is not None
    return old._replace(trace=old.trace.upto(length))


def lengthened(old: Record) -> Record:
    assert old.trace is not None
    return old._replace(trace=old.trace + old.trace.upto(3))


@pytest.mark.parametrize(
    "planted",
    [
        *(pytest.param(lambda old, i=i: with_token(old, i, 7), id=f"edited at {i}") for i in (0, 1, 11, NEW - 1)),
        pytest.param(lambda old: with_token(with_token(old, 5, 7), 9, 8), id="edited twice"),
        pytest.param(lambda old: with_token(old, 6, 0), id="an end token in the middle"),
        pytest.param(lambda old: cut(old, 10), id="cut"),
        pytest.param(lambda old: cut(old, 0), id="empty"),
        pytest.param(lengthened, id="too long"),
        pytest.param(lambda old: untraced(old.token_ids, asked=old.request), id="without a trace"),
        pytest.param(lambda old: untraced((), asked=old.request), id="without anything"),
    ],
)
def test_planted_divergences_are_found_and_repaired(tmp_path: Path, truth: Record, planted: Any) -> None:
    old = planted(truth)
    with client(tmp_path / "cache", policy="invariant") as asking:
        asking.cache.put([old])
        verified = asking.verify(asking.inspect(old.key))
        assert_true(verified, truth)
        assert asking.inspect(old.key).superseded is None
        repaired = asking.verify(old.key, repair=True).fresh
        assert_true(Verification(old, repaired, verified.verdict), truth)
        assert same(asking.inspect(old.key), truth)
        superseded = asking.inspect(old.key).superseded
        assert superseded is not None
        assert superseded.token_ids == old.token_ids
        assert asking.verify(old.key).verdict.status == "exact"


def test_an_answer_that_ends_itself_is_followed_no_further(tmp_path: Path, truth: Record) -> None:
    ends = truth.token_ids[9]
    with client(tmp_path / "one", policy="invariant") as asking:
        done = asking.complete("Tell me about music", max_new_tokens=NEW, eos_token_id=ends)
        assert done.record.finish_reason == "stop"
        length = len(done.token_ids)
        assert asking.verify(done).verdict.status == "exact"
        for step in (length - 1, 0):  # the end itself, and one that an end follows
            asking.cache.put([with_token(done.record, step, 7)])
            verified = asking.verify(done.key)
            assert_true(verified, done.record)


@pytest.mark.slow
def test_flagged_hits_are_settled_without_a_step_of_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = fresh(tmp_path / "truth")
    with client(tmp_path / "old", policy="native", dtype="bfloat16") as asking:
        asking.complete(PROMPTS, max_new_tokens=NEW)
    decoded: list[int] = []
    generate = InvariantEngine.generate

    def watched(engine: Any, batch: Any, *rest: Any, begun: Answers = NO_ANSWERS) -> Any:
        asked = [request for _, request in batch.requests if request.model.digest != "self-check"]
        assert all(request in begun for request in asked), "decoded from its first step"
        decoded.extend(request.params.max_new_tokens - len(begun[request]) for request in asked)
        return generate(engine, batch, *rest, begun=begun)

    monkeypatch.setattr(InvariantEngine, "generate", watched)
    with client(tmp_path / "old", policy="invariant", on_risk="verify", accepted_risk=0.0) as later:
        found = later.complete(PROMPTS, max_new_tokens=NEW)
        for done, true in zip(found, truth, strict=True):
            assert same(done.record, true.record)
            assert done.cached is (done.verdict.status != "diverged")
            assert done.verdict.basis == "verified"
            assert done.record.superseded is not None
        parted = [done.verdict.step for done in found if done.verdict.status == "diverged"]
        # only what follows the step at which an answer parts is decoded
        assert sorted(decoded) == sorted(NEW - step - 1 for step in parted if step is not None)
        assert 0 < len(parted) < len(PROMPTS)
        assert [done.verdict.status for done in later.complete(PROMPTS, max_new_tokens=NEW)] == ["exact"] * len(PROMPTS)
        assert len(later.warnings()) >= len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["single", "padded:3"])
def test_where_prefill_is_not_decoding_the_fragile_steps_are_replayed(tmp_path: Path, policy: str) -> None:
    with client(tmp_path, policy=policy, dtype="bfloat16") as asking:
        asking.complete(PROMPTS, max_new_tokens=NEW)
    with client(tmp_path, policy=policy) as later:
        hits = list(later.cache.records())
        truth = later.verify(hits, from_scratch=True)
        found = later.verify(hits)
        assert list(later.cache.records()) == hits
    for verified, true in zip(found, truth, strict=True):
        if verified.fresh is None:
            assert true.verdict.status == "stable"
            assert verified.verdict.status == "stable"
            assert verified.verdict.reason.startswith("replayed up to step")
            assert verified.verdict.probability is not None
            assert verified.verdict.probability <= NEGLIGIBLE_RISK
            assert verified.continuations == ((), ())
        else:
            assert true.fresh is not None
            assert_true(verified, true.fresh)
    assert {verified.verdict.status for verified in found} == {"stable", "diverged"}
    assert any(verified.fresh is None for verified in found)


def test_only_as_much_is_replayed_as_is_fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stablegen.engine.transformers.engine import TransformersEngine

    with client(tmp_path, policy="single") as asking:
        (done,) = asking.complete(["Tell me about music"], max_new_tokens=NEW)
        wide = near_tie(done.record, margin=1e-4, step=5)
        cut_short = near_tie(cut(done.record, 10), margin=1e-4, step=5)
        decoded: list[int] = []
        generate = TransformersEngine.generate

        def watched(engine: Any, batch: Any, *rest: Any, **named: Any) -> Any:
            decoded.extend(asked.params.max_new_tokens for _, asked in batch.requests)
            return generate(engine, batch, *rest, **named)

        monkeypatch.setattr(TransformersEngine, "generate", watched)
        assert asking.verify(wide).fresh is None
        assert decoded == [6]
        # an answer that ends where none may is recomputed, and so is one that parts
        assert asking.verify(cut_short).verdict.step == 10
        assert decoded == [6, NEW]
        assert asking.verify(with_token(wide, 2, 7)).verdict.step == 2
        assert decoded == [6, NEW, 6, NEW]
        assert asking.verify(wide, repair=True).fresh is not None
        assert decoded == [6, NEW, 6, NEW, NEW]


@pytest.mark.parametrize("policy", ["single", "native"])
def test_other_policies_recompute(tmp_path: Path, truth: Record, policy: str) -> None:
    with client(tmp_path / "cache", policy=policy) as asking:
        (done,) = asking.complete(["Tell me about music"], max_new_tokens=NEW)
        verified = asking.verify(done)
        assert verified.verdict.status == ("exact" if policy == "single" else "stable")
        assert verified.verdict.reason.startswith("recomputed")
        asking.cache.put([with_token(done.record, 3, 7)])
        found = asking.verify(done.key).verdict
        assert (found.status, found.step, found.token) == ("diverged", 3, 7)


@pytest.mark.fresh_checks
def test_a_policy_that_broke_its_promise_proves_nothing(tmp_path: Path, truth: Record, monkeypatch: Any) -> None:
    from stablegen.engine import self_check as module

    def broken(engine: Any, *shape: Any, **how: Any) -> Any:
        return check(engine, *shape, **how).model_copy(update={"passed": False, "checks": {"slot": "differs"}})

    check = module.self_check
    monkeypatch.setattr(module, "self_check", broken)
    with client(tmp_path / "cache", policy="invariant") as asking:
        asking.cache.put([truth])
        with pytest.warns(PromiseWarning, match="does not keep"):
            verdict = asking.verify(truth.key).verdict
    assert (verdict.status, verdict.reason.split(":")[0]) == ("stable", "recomputed")


def test_what_cannot_be_verified_is_named(tmp_path: Path, truth: Record) -> None:
    with client(tmp_path / "cache", policy="invariant", model=str(small_directory())) as asking:
        with pytest.raises(RecordNotFoundError, match="no record under the key 'abc'"):
            asking.verify(["abc"])
        with pytest.raises(InvalidRequestError, match="made for 'tiny-gpt2'"):
            asking.verify(truth)
        assert asking.verify([]) == []


def test_two_answers_to_one_request_are_told_apart(tmp_path: Path, truth: Record) -> None:
    with client(tmp_path / "cache", policy="invariant") as asking:
        first, second, third = asking.verify([with_token(truth, 4, 7), truth, with_token(truth, 9, 7)])
    assert [found.verdict.step for found in (first, second, third)] == [4, None, 9]
    assert second.verdict.status == "exact"
    for found in (first, second, third):
        assert_true(found, truth)


def test_of_many_answers_each_is_verified_once_and_progress_is_told(tmp_path: Path) -> None:
    truth = fresh(tmp_path / "cache")
    told: list[tuple[int, int]] = []
    with client(tmp_path / "cache", policy="invariant") as asking:
        found = asking.verify([*truth, truth[0].key, truth[1].record], progress=lambda *done: told.append(done))
    assert [verified.record.key for verified in found] == [*(done.key for done in truth), truth[0].key, truth[1].key]
    assert told[-1] == (len(PROMPTS), len(PROMPTS))


class Failing(FakeEngine):
    """Teacher-forces the answers it knows, then fails for the others."""

    def __init__(self, forced: dict[Request, Trace], error: NonFiniteScoresError) -> None:
        super().__init__(numerics())
        self.forced, self.error = forced, error

    def follow(self, batch: Any, answers: Any, observe: Any = None) -> Any:
        for asked, made in self.forced.items():
            yield Generated(asked, made, "length", Composition(len(batch.rows), len(answers), 0), 0.0)
        raise self.error


def test_answers_whose_scores_are_no_numbers_fail_after_the_others(truth: Record) -> None:
    assert truth.trace is not None
    engine = Failing({truth.request: truth.trace}, NonFiniteScoresError("not finite"))
    answers = {request(new=2): (5, 6), truth.request: truth.token_ids}
    found = []

    def collect() -> None:
        for generated in regenerate(engine, answers, lambda _: None):
            found.append(generated)

    with pytest.raises(NonFiniteScoresError, match="not finite"):
        collect()
    assert [(generated.composition.slot, generated.trace) for generated in found] == [(1, truth.trace)]
    assert engine.ran == []  # nothing was left to decode


def test_a_caller_who_fails_and_keeps_the_error_can_go_on(tmp_path: Path) -> None:
    def fail(*_: int) -> None:
        raise RuntimeError("no more")

    with client(tmp_path, policy="invariant") as asking:
        # of different lengths, so that some still run when the first is done
        made = [asking.complete(f"Tell me {at}", max_new_tokens=2 + 9 * at) for at in range(3)]
        with pytest.raises(RuntimeError, match="no more") as kept:
            asking.verify(made, from_scratch=True, progress=fail)
        assert len(asking.complete("And then", max_new_tokens=2).token_ids) == 2
        assert kept.tb is not None


def test_a_divergence_that_was_proved_is_kept_beside_the_judgement(tmp_path: Path, truth: Record) -> None:
    with client(tmp_path, policy="invariant") as asking:
        asking.cache.put([near_tie(with_token(truth, 4, 7))])
        asking.complete("Tell me about music", max_new_tokens=NEW)
        assert [hit.verdict.status for hit in asking.warnings()] == ["at_risk"]
        asking.verify(truth.key)
        assert [hit.verdict.status for hit in asking.warnings()] == ["at_risk", "diverged"]
