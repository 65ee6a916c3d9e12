"""Regenerate answers that exist already, in one forward pass over each where it is still right.

Where prefill equals decode, an answer's tokens, given all at once, get the scores that decoding them one by one would
give. By induction an answer whose every token is chosen again is what a fresh run gives; any other is so up to the
first step that differs, and decoding goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from stablegen.core.policy import Batch
from stablegen.core.record import Composition, FinishReason
from stablegen.core.request import Request
from stablegen.core.trace import Trace, first_difference
from stablegen.engine.base import Answers, Engine, Generated, Stopper
from stablegen.errors import NonFiniteScoresError


def regenerate(
    engine: Engine, answers: Answers, stopper_of: Callable[[Request], Stopper | None]
) -> Generator[Generated, None, None]:
    """Yield what a fresh run gives for each request, bit for bit; ``composition.slot`` is its place in ``answers``.

    Takes an engine whose ``limits.prefill_equals_decode``. ``stopper_of``: what ends a request's answer besides its end
    tokens and its length. Raises as ``Engine.generate`` does, after all others were yielded.
    """
    started = time.perf_counter()
    failure: NonFiniteScoresError | None = None
    places = {request: place for place, request in enumerate(answers)}

    def finish(request: Request, trace: Trace, reason: FinishReason) -> Generated:
        composition = Composition(len(answers), len(answers), places[request])
        return Generated(request, trace, reason, composition, time.perf_counter() - started)

    confirmed = {request: Trace(b"") for request, tokens in answers.items() if not tokens}
    given = Batch(tuple(request for request in answers if request not in confirmed))
    try:
        with closing(engine.follow(given, answers)) as followed:
            for one in followed:
                request = one.request
                trace, reason = confirm(request, answers[request], one.trace, stopper_of(request))
                if reason is None:
                    confirmed[request] = trace
                else:
                    yield finish(request, trace, reason)
    except NonFiniteScoresError as error:
        failure = error
    if confirmed:
        begun = {request: trace.tokens for request, trace in confirmed.items()}
        try:
            with closing(engine.generate(Batch(tuple(confirmed)), begun=begun)) as finishing:
                for generated in finishing:
                    trace = confirmed[generated.request] + generated.trace
                    yield finish(generated.request, trace, generated.finish_reason)
        except NonFiniteScoresError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def confirm(
    request: Request, tokens: Sequence[int], followed: Trace, stops: Stopper | None = None
) -> tuple[Trace, FinishReason | None]:
    """Return the steps of a teacher-forced answer that a fresh run shares, and how that run ends with them.

    The first step that differs is included. The reason is None where a fresh run goes on.
    """
    budget, ends = request.params.max_new_tokens, frozenset(request.params.eos_token_ids)
    diverged = first_difference(tokens, followed.tokens)
    steps = min(budget, len(followed) if diverged is None else diverged + 1)
    chosen = followed.tokens[:steps]
    for step, token in enumerate(chosen):
        if token in ends or (stops is not None and stops(chosen[: step + 1])):
            return followed.upto(step + 1), "stop"
    return followed.upto(steps), "length" if steps == budget else None
