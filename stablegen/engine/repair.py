"""What a fresh run gives for answers that are there already, computed in one pass where they are still right.

Under batch-invariant kernels an answer's tokens, given all at once, get the scores that decoding them one by one would
give. By induction an answer whose every token is chosen again is what a fresh run gives; any other is so up to the
first step that differs, and decoding goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing

from stablegen.core.record import Composition, FinishReason
from stablegen.core.request import Request
from stablegen.core.trace import Trace, first_difference
from stablegen.engine.base import Answer, ForcingEngine, Generated, Stopper
from stablegen.errors import NonFiniteScoresError


def regenerate(engine: ForcingEngine, answers: Sequence[Answer]) -> Generator[Generated, None, None]:
    """Yield what a fresh run gives for each request, bit for bit; ``composition.slot`` is its place in ``answers``.

    Raises as ``Engine.generate`` does, after all others were yielded.
    """
    started = time.perf_counter()
    failure: NonFiniteScoresError | None = None

    def done(place: int, trace: Trace, reason: FinishReason) -> Generated:
        where = Composition(len(answers), len(answers), place)
        return Generated(answers[place][0], trace, reason, where, time.perf_counter() - started)

    begun = {place: Trace(b"") for place, (_, tokens) in enumerate(answers) if not tokens}
    places = [place for place in range(len(answers)) if place not in begun]
    try:
        with closing(engine.force([answers[place] for place in places])) as read:
            for index, forced in read:
                place = places[index]
                request, tokens = answers[place]
                trace, reason = still_right(request, tokens, forced, engine.stopper(request))
                if reason is None:
                    begun[place] = trace
                else:
                    yield done(place, trace, reason)
    except NonFiniteScoresError as error:
        failure = error
    waiting = list(begun)
    if waiting:
        try:
            with closing(engine.resume([(answers[place][0], begun[place].tokens) for place in waiting])) as finishing:
                for generated in finishing:
                    place = waiting[generated.composition.slot]
                    yield done(place, begun[place] + generated.trace, generated.finish_reason)
        except NonFiniteScoresError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def still_right(
    request: Request, tokens: Sequence[int], forced: Trace, stops: Stopper | None = None
) -> tuple[Trace, FinishReason | None]:
    """Return the steps that a fresh run shares with a forced answer, the first that differs included, and their end.

    The reason is None where a fresh run goes on.
    """
    budget, ends = request.params.max_new_tokens, frozenset(request.params.eos_token_ids)
    parted = first_difference(tokens, forced.tokens)
    steps = min(budget, len(forced) if parted is None else parted + 1)
    chosen = forced.tokens[:steps]
    for step, token in enumerate(chosen):
        if token in ends or (stops is not None and stops(chosen[: step + 1])):
            return forced.upto(step + 1), "stop"
    return forced.upto(steps), "length" if steps == budget else None
