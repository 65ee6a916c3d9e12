"""What a fresh run gives for answers that exist already: confirmed in one pass, resumed where they diverge."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from engines import invariant_engine, make_ids, make_request, traces

from stablegen.core.policy import Batch, Limits
from stablegen.core.record import Composition
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import NO_ANSWERS, Answers, Engine, Generated, Listener, Observer, Stopper
from stablegen.engine.regenerate import confirm, regenerate
from stablegen.errors import NonFiniteScoresError

STEPS = 12


def no_stopper(_: Request) -> Stopper | None:
    return None


def edited(tokens: tuple[int, ...], step: int) -> tuple[int, ...]:
    return (*tokens[:step], (tokens[step] + 1) % 1031, *tokens[step + 1 :])


def test_every_answer_becomes_what_a_fresh_run_gives() -> None:
    engine = invariant_engine("random-gpt2", "float32")
    asked = [make_request(make_ids(seed, 5 + 9 * seed, 1031), STEPS) for seed in range(7)]
    fresh = traces(engine, Batch(tuple(asked)))
    told = [fresh[slot].tokens for slot in range(7)]
    damaged = [told[0], edited(told[1], 0), edited(told[2], 5), edited(told[3], 11), told[4][:6], (), told[6] + told[6]]
    engine.forget()
    answers = dict(zip(asked, damaged, strict=True))
    found = {done.composition.slot: done for done in regenerate(engine, answers, no_stopper)}
    assert len(found) == 7
    for slot, request in enumerate(asked):
        done = found[slot]
        assert done.request is request
        assert (done.trace, done.finish_reason) == (fresh[slot], "length")
        assert (done.composition.rows, done.composition.requests) == (7, 7)


def test_an_answer_ends_where_its_stopper_or_an_end_token_says() -> None:
    engine = invariant_engine("random-gpt2", "float32")
    plain = make_request(make_ids(1, 20, 1031), STEPS)
    fresh = traces(engine, Batch((plain,)))[0]
    step = next(at for at in range(3, STEPS) if fresh.tokens[at] not in fresh.tokens[:at])

    def stopper_of(_: Request) -> Stopper | None:
        return lambda tokens: len(tokens) == step + 1

    ending = make_request(plain.prompt_ids, STEPS)
    params = ending.params.model_copy(update={"eos_token_ids": (fresh.tokens[step],)})
    ending = Request(ending.prompt_ids, params, ending.model, ending.tokenizer)
    for request, stopper in ((plain, stopper_of), (ending, no_stopper)):
        (done,) = regenerate(engine, {request: fresh.tokens}, stopper)
        assert (done.trace, done.finish_reason) == (fresh.upto(step + 1), "stop")


def test_the_first_step_that_differs_is_the_last_that_is_confirmed() -> None:
    request = make_request((1, 2, 3), 4)
    followed = Trace.of([5, 6, 7, 8], [0] * 4, [2.0] * 4, [1.0] * 4, [9] * 4)
    assert confirm(request, (5, 6, 7, 8), followed) == (followed, "length")
    assert confirm(request, (5, 6, 9, 8), followed) == (followed.upto(3), None)
    assert confirm(request, (5, 6, 7), followed.upto(3)) == (followed.upto(3), None)
    assert confirm(request, (5, 6, 7, 8, 1), followed + followed.upto(1)) == (followed, "length")


class Failing(Engine):
    """An engine whose scores are no numbers along one answer, and which resumes none."""

    def __init__(self, bad: Request, numerics: Any) -> None:
        self.numerics = numerics
        self.limits = Limits(context=64, prefill_equals_decode=True)
        self._bad = bad

    def follow(
        self, batch: Batch, answers: Answers, observe: Observer | None = None
    ) -> Generator[Generated, None, None]:
        for slot, request in batch.requests:
            if request is not self._bad:
                steps = len(answers[request])
                trace = Trace.of(list(answers[request]), [0] * steps, [2.0] * steps, [1.0] * steps, [9] * steps)
                yield Generated(request, trace, "length", Composition(len(batch.rows), len(answers), slot), 0.0)
        raise NonFiniteScoresError("not finite")

    def generate(
        self,
        batch: Batch,
        observe: Observer | None = None,
        listen: Listener | None = None,
        *,
        begun: Answers = NO_ANSWERS,
    ) -> Generator[Generated, None, None]:
        raise AssertionError("nothing is left to be generated")


def test_answers_whose_scores_are_not_finite_fail_after_the_others() -> None:
    numerics = invariant_engine("random-gpt2", "float32").numerics
    bad, good = make_request((1, 2), 2), make_request((3, 4), 2)
    found: list[Generated] = []

    def collect() -> None:
        for done in regenerate(Failing(bad, numerics), {bad: (5, 6), good: (7, 8)}, no_stopper):
            found.append(done)

    with pytest.raises(NonFiniteScoresError, match="not finite"):
        collect()
    assert [(done.composition.slot, done.trace.tokens) for done in found] == [(1, (7, 8))]
