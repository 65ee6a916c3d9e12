"""Answers teacher-forced through a session's engine: calibrations, and full score rows."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from stablegen.core.answer import Completion
from stablegen.core.calibration import Calibration
from stablegen.core.policy import Batch
from stablegen.core.record import Record
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Engine, Observer
from stablegen.errors import CalibrationError, InvalidRequestError, ParameterError
from stablegen.guard.calibration import fit
from stablegen.guard.judge import numerics_for
from stablegen.session.call import Progress
from stablegen.session.intake import Intake
from stablegen.session.session import Session

if TYPE_CHECKING:
    import torch

CALIBRATION_SIZES = (2, 8, 32)
"""Batch sizes whose noise is measured under a policy that promises nothing."""

log = logging.getLogger("stablegen")


def teacher_force(
    session: Session,
    engine: Engine,
    intake: Intake,
    records: Sequence[Record],
    sizes: Sequence[int],
    observe: Observer | None = None,
) -> Generator[tuple[Record, Trace], None, None]:
    """Teacher-force the answers of records; yield each record with the trace of the engine's own choices.

    ``sizes``: of the batches, under a policy that promises nothing. ``observe`` is called with each step's score row.
    """
    policy = session.parts.policy
    by_key = {record.key: record for record in records}
    requests = [intake.validate(record.request) for record in records]
    answers = {request: by_key[request.key].token_ids for request in requests}
    if policy.promises:
        batches = [(batch, 0) for batch in policy.plan(requests, engine.limits)]
    else:
        batches = [batch for size in sizes for batch in _full_batches(requests, size)]
    for batch, seen_before in batches:
        repeated = {request.key for slot, request in batch.requests if slot < seen_before}
        with closing(engine.follow(batch, answers, observe)) as followed:
            for generated in followed:
                if generated.request.key not in repeated:
                    yield by_key[generated.request.key], generated.trace


def calibrate(
    session: Session,
    answers: Iterable[str | Record | Completion],
    *,
    sizes: Sequence[int] = CALIBRATION_SIZES,
    progress: Progress | None = None,
) -> list[Calibration]:
    """Return calibrations from the numerics of answers to the session's, one for each numerics with enough steps."""
    if any(size < 1 for size in sizes):
        raise ParameterError(f"sizes={tuple(sizes)!r} is not valid", accepted="batch sizes of at least 1")
    state = session.refresh()
    groups: dict[str, dict[str, Record]] = {}
    for record in map(session.record_of, answers):
        state.intake.validate(record.request)
        if record.trace and not record.request.continuation:
            groups.setdefault(record.numerics.digest, {})[record.key] = record
    rounds = 1 if session.parts.policy.promises else len(sizes)
    total, done = rounds * sum(map(len, groups.values())), 0
    failure = CalibrationError("no answer with a trace to calibrate from", hint="Generate some first")
    if not groups:
        raise failure
    found = []
    with session.busy(), session.engine(state) as (engine, now):
        for group in map(list, map(dict.values, groups.values())):
            pairs = []
            with closing(teacher_force(session, engine, now.intake, group, sizes)) as forced:
                for old, trace in forced:
                    assert old.trace is not None
                    pairs.append((old.trace, trace))
                    done += 1
                    if progress is not None:
                        progress(done, total)
            recorded, current = group[0].numerics, numerics_for(group[0].request, now.numerics)
            try:
                made = fit(now.intake.identity, recorded, current, pairs, prompts=len(group))
            except CalibrationError as error:
                failure = error
                log.info("no calibration from answers of %s: %s", recorded.summary(), error)
                continue
            session.parts.cache.put_calibration(made)
            session.parts.judge.learn_calibration(made)
            found.append(made)
    if not found:
        raise failure
    return found


def calibrate_from(
    session: Session, source: Session, prompts: Sequence[str], max_new_tokens: int, progress: Progress | None = None
) -> list[Calibration]:
    """Let ``source``, another session of the same model, answer prompts, and calibrate from its answers."""
    total = 2 * len(prompts)

    def report(count: int) -> None:
        if progress is not None:
            progress(count, total)

    arguments = {"max_new_tokens": max_new_tokens}
    if source.parts.policy.promises:
        answers = source.complete(prompts, arguments, lambda count, _: report(count))
    else:
        answers = []
        for prompt in prompts:  # one after the other: the effect of batches is for the other session to measure
            answers += source.complete(prompt, arguments, None)
            report(len(answers))
    return calibrate(session, answers, progress=lambda count, of: report(len(prompts) * (of + count) // of))


def score_rows(session: Session, completions: Iterable[Completion]) -> dict[str, list[torch.Tensor]]:
    """Return each answer's full score rows by its key: for each step the model's [V] float32, on the device."""
    state = session.refresh()
    records = list({one.key: one.record for one in completions}.values())
    if any(record.request.continuation for record in records):
        raise InvalidRequestError("score_rows() was given a scored continuation", accepted="generated answers")
    rows: dict[Request, list[torch.Tensor]] = {}
    sizes = () if session.parts.policy.promises else (len(records),)

    def observe(request: Request, row: torch.Tensor) -> None:
        rows.setdefault(request, []).append(row.clone())

    if not records:
        return {}
    with (
        session.busy(),
        session.engine(state) as (engine, now),
        closing(teacher_force(session, engine, now.intake, records, sizes, observe)) as forced,
    ):
        for _ in forced:
            pass
    return {request.key: own for request, own in rows.items()}


def _full_batches(requests: Sequence[Request], size: int) -> Iterator[tuple[Batch, int]]:
    """Yield batches of ``size`` rows, each with how many of its first rows were in the batch before.

    The last batch repeats earlier rows to reach the size, because noise depends on it; it is smaller only where there
    are fewer requests in all.
    """
    for start in range(0, len(requests), size):
        first = max(0, min(start, len(requests) - size))
        yield Batch(tuple(requests[first : first + size])), start - first
