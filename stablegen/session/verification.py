"""Verify cached answers against a run made now: in one pass, replayed to their last fragile step, or in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

from stablegen.core.answer import Completion, Verification
from stablegen.core.record import Record
from stablegen.core.verdict import Verdict
from stablegen.engine.planner import Planner
from stablegen.errors import StablegenError
from stablegen.guard.judge import numerics_for
from stablegen.guard.verdicts import flip_probabilities, fragile_steps
from stablegen.session.call import Call, Progress
from stablegen.session.session import Session


class VerifyOptions(TypedDict, total=False):
    """How answers are verified.

    ``repair``: the fresh answers replace them in the cache. ``from_scratch``: all are recomputed in full.
    ``progress`` is called with how many are done, and how many there are.
    """

    repair: bool
    from_scratch: bool
    progress: Progress | None


def verify(
    session: Session,
    answers: Sequence[str | Record | Completion],
    *,
    repair: bool = False,
    from_scratch: bool = False,
    progress: Progress | None = None,
) -> list[Verification]:
    """Return the verifications of answers, in their order; with ``repair`` the fresh answers replace them."""
    with session.busy():
        state = session.refresh()
        records = [session.record_of(answer) for answer in answers]
        hits = {record.key: record for record in records}
        call = Call(session.parts, state, proves=not from_scratch, keeps=repair, progress=progress)
        call.pending = {key: state.intake.validate(record.request) for key, record in hits.items()}
        call.hits = hits
        settled: dict[str, Verdict] = {}
        try:
            with session.engine(state) as (engine, call.state):
                planner = session.planner(engine, call)
                can_replay = session.parts.policy.promises and not engine.limits.prefill_equals_decode
                if call.proves and can_replay and not repair:
                    settled = _replay(session, planner, call)
                    call.pending = {key: asked for key, asked in call.pending.items() if key not in settled}
                call.compute(planner)
        except StablegenError as error:
            call.fail(error)
        call.check()
        found = []
        for record in records:
            if record is hits[record.key] and record.key in settled:
                found.append(Verification(record, None, settled[record.key]))
                continue
            done, verdict = call.results[record.key], call.results[record.key].verdict
            if record is not hits[record.key]:  # another answer to the same request
                verdict = session.parts.judge.compare(record, done.record)
            found.append(Verification(record, done.record, verdict))
        return found


def _replay(session: Session, planner: Planner, call: Call) -> dict[str, Verdict]:
    """Return a verdict for each hit whose steps up to the last fragile one, decoded again, gave the same tokens."""
    steps: dict[str, tuple[int, float]] = {}
    for key, hit in call.hits.items():
        current = numerics_for(hit.request, call.state.numerics)
        if hit.request.continuation or not hit.whole:
            continue
        if hit.trace and hit.numerics.digest != current.digest:
            calibration = session.parts.judge.calibration(hit, current)
            risks = flip_probabilities(hit.trace, hit.numerics, current, calibration)
            if risks is None:
                continue
            count, rest = fragile_steps(risks)
            if count < len(hit.trace):
                steps[key] = max(count, 1), rest
    settled: dict[str, Verdict] = {}
    for requests, check in planner.groups(list(call.pending.values())):
        fragile = [request for request in requests if request.key in steps]
        for batch in planner.plan(fragile, check):
            # each shortened row keeps the slot and the shape of its full request
            rows = tuple(None if row is None else row.limited_to(steps[row.key][0]) for row in batch.rows)
            for generated in planner.engine.generate(replace(batch, rows=rows)):
                asked = batch.rows[generated.composition.slot]
                assert asked is not None
                count, rest = steps[asked.key]
                if generated.trace.tokens == call.hits[asked.key].token_ids[:count]:
                    settled[asked.key] = Verdict(
                        status="stable",
                        probability=rest,
                        basis="verified",
                        reason=f"replayed up to step {count - 1}: same tokens; later margins are too wide to flip",
                    )
    return settled
