"""The report on one cached answer: its steps, its verdict, and where another run's answer diverges from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from stablegen.core.answer import Verification
from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.record import Record
from stablegen.core.trace import first_difference
from stablegen.core.verdict import FlaggedHit, Verdict
from stablegen.guard.verdicts import flip_probabilities

if TYPE_CHECKING:
    from stablegen.client import Client

Evidence = Literal["superseded", "verified", "flagged"]
"""How a divergence is known: one answer superseded the other, a run was made just now, or a hit was flagged before."""


class Step(Frozen):
    """One token of an answer; ``text`` and ``runner_up_text`` are None where another tokenizer made it.

    Without a trace only the token is known. ``margin`` is None also where no other token could follow.
    ``probability``: that the two tokens swap places. For a scored continuation, ``logprob`` is that of its token, and
    ``best`` the token of the highest score.
    """

    token: int
    text: str | None
    runner_up: int | None = None
    runner_up_text: str | None = None
    score: float | None = None
    margin: float | None = None
    probability: float | None = None
    logprob: float | None = None
    best: int | None = None
    best_text: str | None = None


class Divergence(Frozen):
    """Where two answers to one request diverge: token ids from ``step`` on, of the ``older`` and the ``newer`` one.

    ``shared``: those before. ``whole``: whether both are known to their ends, or only by their first differing token.
    Texts are None where another tokenizer made them.
    """

    source: Evidence
    step: int
    shared: tuple[int, ...]
    older: tuple[int, ...]
    newer: tuple[int, ...]
    shared_text: str | None
    older_text: str | None
    newer_text: str | None
    older_numerics: str
    newer_numerics: str
    whole: bool


class Inspection(Frozen):
    """The report on one record; ``verification``: the verdict of a fresh run, where one was made."""

    key: str
    app: str | None
    prompt: str | None
    prompt_ids: tuple[int, ...]
    text: str
    finish_reason: str
    scored: bool
    model: str
    identity: str
    params: dict[str, Any]
    created: float
    seconds: float
    composition: dict[str, Any]
    recorded: Numerics
    current: Numerics
    accepted_risk: float
    verdict: Verdict
    steps: list[Step]
    traced: bool
    superseded: str | None
    superseded_numerics: str | None
    divergences: list[Divergence]
    verification: Verdict | None
    flagged: list[FlaggedHit]

    @property
    def fragile(self) -> list[int]:
        """Return the steps whose probability of a flip is above the accepted risk."""
        found = enumerate(self.steps)
        return [step for step, one in found if one.probability is not None and one.probability > self.accepted_risk]


def inspect(client: Client, record: Record, found: Verification | None = None) -> Inspection:
    """Return the report on a record; ``found``: its verification, where it was verified just now."""
    mine = record.request.tokenizer == client.tokenizer.digest
    flagged = [hit for hit in client.cache.flagged() if hit.key == record.key]
    request, old = record.request, record.superseded
    return Inspection(
        key=record.key,
        app=record.app,
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        text=record.text,
        finish_reason=record.finish_reason,
        scored=bool(request.continuation),
        model=request.model.name,
        identity=" ".join(request.model.identity.values()),
        params=_non_default(request.params.for_display(), type(request.params)(max_new_tokens=1).for_display()),
        created=record.created,
        seconds=record.seconds,
        composition={name: value for name, value in record.composition.to_dict().items() if value is not None},
        recorded=record.numerics,
        current=client.numerics_for(request),
        accepted_risk=client.accepted_risk,
        verdict=client.judge(record),
        steps=_steps(client, record, client.tokenizer.token if mine else None),
        traced=record.trace is not None,
        superseded=None if old is None else old.text,
        superseded_numerics=None if old is None else old.numerics.summary(),
        divergences=divergences(record, flagged, found, client.tokenizer.decode if mine else None),
        verification=None if found is None else found.verdict,
        flagged=flagged,
    )


def divergences(
    record: Record,
    flagged: Sequence[FlaggedHit],
    found: Verification | None,
    decode: Callable[[Sequence[int]], str] | None,
) -> list[Divergence]:
    """Return every known divergence between the record's answer and others to the same request.

    The others are the fresh answer of ``found``, the one that the record superseded, and those of its ``flagged`` hits
    with verdict ``diverged``, whose first differing token alone is known; one answer for each numerics.
    """
    pairs: list[tuple[Evidence, Record, Record]] = []
    if found is not None and found.fresh is not None:
        pairs.append(("verified", record, found.fresh))
    if record.superseded is not None:
        pairs.append(("superseded", record.superseded, record))
    found_at = []
    for source, older, newer in pairs:
        step = first_difference(older.token_ids, newer.token_ids)
        if step is not None:
            # a scored continuation's tokens of highest score form no text beyond the first difference
            end = step + 1 if record.request.continuation else None
            ids = older.token_ids[:step], older.token_ids[step:end], newer.token_ids[step:end]
            names = older.numerics.summary(), newer.numerics.summary()
            found_at.append(_divergence(source, step, ids, names, decode, whole=end is None))
    told = {found.fresh.numerics.digest} if found is not None and found.fresh is not None else set()
    for hit in reversed(flagged):
        step, token, other = hit.verdict.step, hit.verdict.token, hit.verdict.runner_up
        mine = hit.verdict.status == "diverged" and hit.recorded_digest == record.numerics.digest
        if not mine or step is None or hit.current_digest in told or record.token_ids[step : step + 1] != _known(token):
            continue
        told.add(hit.current_digest)
        ids = record.token_ids[:step], _known(token), _known(other)
        found_at.append(_divergence("flagged", step, ids, (hit.recorded, hit.current), decode, whole=False))
    return found_at


def _divergence(
    source: Evidence,
    step: int,
    ids: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    names: tuple[str, str],
    decode: Callable[[Sequence[int]], str] | None,
    *,
    whole: bool,
) -> Divergence:
    texts = [None if decode is None else decode(part) for part in ids]
    return Divergence(
        source=source,
        step=step,
        shared=ids[0],
        older=ids[1],
        newer=ids[2],
        shared_text=texts[0],
        older_text=texts[1],
        newer_text=texts[2],
        older_numerics=names[0],
        newer_numerics=names[1],
        whole=whole,
    )


def _known(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def _non_default(given: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that are not at their default, and ``max_new_tokens``."""
    return {name: value for name, value in given.items() if name == "max_new_tokens" or value != usual[name]}


def _steps(client: Client, record: Record, text: Callable[[int], str] | None) -> list[Step]:
    def shown(token: int) -> str | None:
        return None if text is None else text(token)

    trace, continuation = record.trace, record.request.continuation
    if trace is None:
        return [Step(token=token, text=shown(token)) for token in continuation or record.token_ids]
    current = client.numerics_for(record.request)
    risks = flip_probabilities(trace, record.numerics, current, client.calibration(record))
    chances: Sequence[float | None] = [None] * len(trace) if risks is None else risks
    columns = (trace.tokens, trace.runner_ups, trace.scores, trace.margins, chances)
    found = []
    for place, (best, second, score, margin, risk) in enumerate(zip(*columns, strict=True)):
        token = continuation[place] if continuation else best
        scored: dict[str, Any] = {}
        if continuation:
            scored = {"logprob": _finite(record.logprobs[place]), "best": best, "best_text": shown(best)}
        found.append(
            Step(
                token=token,
                text=shown(token),
                runner_up=second,
                runner_up_text=shown(second),
                score=_finite(score),
                margin=_finite(margin),
                probability=risk,
                **scored,
            )
        )
    return found


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
