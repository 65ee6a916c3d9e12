"""The report on the whole cache: its answers' verdicts and margins, and the verdicts under other policies.

Nothing is recomputed and nothing is written; neither torch nor transformers is imported.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import fsum, inf, isfinite
from typing import Literal, get_args

from pydantic import Field

from stablegen.client import Client
from stablegen.core.audit import AuditReport
from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.policy import typical_policies
from stablegen.core.record import Record
from stablegen.core.verdict import Basis, FlaggedHit, Status, Verdict
from stablegen.errors import PolicyError
from stablegen.machine.plan import processed
from stablegen.session.call import Progress

STATUSES: tuple[Status, ...] = get_args(Status)
EDGES = tuple(10.0 ** (third / 3) for third in range(-18, 7))
"""Bounds of the bins of margins: three a decade, from a millionth to a hundred."""
NO_APP = "(no app)"
Kept = Literal["passed", "failed", "none", "no promise"]
"""What is known of a policy's promise: the result of its self-checks under the numerics, or that it makes none."""


class Margins(Frozen):
    """How many margins lie between each two neighbours of ``EDGES``, ``below`` the first, and ``beyond`` the last."""

    below: int
    counts: list[int]
    beyond: int

    @classmethod
    def of(cls, places: Counter[int]) -> Margins:
        """Return the distribution of margins by the place of each among ``EDGES``; infinite ones lie beyond."""
        counts = [places[place] for place in range(1, len(EDGES))]
        return cls(below=places[0], counts=counts, beyond=places[len(EDGES)])

    @property
    def total(self) -> int:
        """Return how many margins there are."""
        return self.below + sum(self.counts) + self.beyond


class Flag(Frozen):
    """One flagged hit of an answer: its app, its verdict, the numerics it was judged under, and when."""

    app: str | None
    status: Status
    basis: Basis
    probability: float | None
    current: str
    seen: float


class Answer(Frozen):
    """One cached answer as the table of a report shows it.

    ``apps``: the app that computed it and those it was flagged for. ``mine``: whether the client's model and tokenizer
    made it. ``verdict``: the guard's under the client's numerics, or that of a later run under them. ``step``: the most
    fragile one, or that of smallest margin where no probability is known, with the texts of its two tokens.
    """

    key: str
    apps: tuple[str, ...]
    prompt: str
    text: str
    tokens: int
    model: str
    mine: bool
    scored: bool
    policy: str
    dtype: str
    numerics: str
    created: float
    verdict: Verdict
    step: int | None
    token: str | None
    runner_up: str | None
    margin: float | None
    superseded: bool
    flagged: list[Flag]


class WhatIf(Frozen):
    """How the cache's answers would be judged if misses ran under another policy, on the same device and dtype.

    ``expected``: how many would diverge, the sum of their probabilities. ``unchecked``: answers of the same numerics,
    which will be ``exact`` once a self-check has passed and are judged by their margins until then. ``prior`` and
    ``calibrated``: how many verdicts rest on either. ``problem``: why this model cannot run under the policy.
    """

    policy: str
    numerics: Numerics | None = None
    problem: str | None = None
    current: bool = False
    self_check: Kept = "none"
    verdicts: dict[Status, int] = Field(default_factory=dict)
    expected: float = 0.0
    unchecked: int = 0
    prior: int = 0
    calibrated: int = 0


class CacheReport(Frozen):
    """What a cache holds, as judged by a client.

    ``records``: entries that could be read; ``corrupt``: those that could not; ``others``: records of another model or
    tokenizer, which ``what_if`` leaves out. ``by_app``, ``by_model``, ``by_numerics``: name -> verdict -> answers; an
    answer of several apps counts for each. ``expected``: divergences, if all were recomputed now. ``smallest``: each
    answer's smallest margin; ``all``: the margins of all steps. ``answers``: the most fragile first. ``audit``: the
    newest stored one, of this model and numerics if there is any.
    """

    path: str
    model: str
    numerics: Numerics
    app: str | None
    accepted_risk: float
    made: float
    size: int
    records: int
    corrupt: int
    others: int
    verdicts: dict[Status, int]
    by_app: dict[str, dict[Status, int]]
    by_model: dict[str, dict[Status, int]]
    by_numerics: dict[str, dict[Status, int]]
    expected: float
    smallest: Margins
    all: Margins
    what_if: list[WhatIf]
    audit: AuditReport | None
    answers: list[Answer]


@dataclass(slots=True)
class _Tally:
    """The counts for one policy, updated with each record."""

    what_if: WhatIf
    verdicts: Counter[Status] = field(default_factory=Counter)
    risks: list[float] = field(default_factory=list)
    bases: Counter[Basis] = field(default_factory=Counter)
    unchecked: int = 0

    def add(self, record: Record, verdict: Verdict) -> None:
        self.verdicts[verdict.status] += 1
        self.bases[verdict.basis] += 1
        if verdict.probability is not None:
            self.risks.append(verdict.probability)
        same = self.what_if.numerics is not None and record.numerics.policy == self.what_if.policy
        if same and verdict.status != "exact" and self.what_if.self_check == "none":
            assert self.what_if.numerics is not None
            wanted = self.what_if.numerics
            wanted = processed(wanted) if record.request.params.processed else wanted
            self.unchecked += record.numerics.digest == wanted.digest

    def result(self) -> WhatIf:
        if self.what_if.problem is not None:
            return self.what_if
        return self.what_if.model_copy(
            update={
                "verdicts": {status: self.verdicts[status] for status in STATUSES},
                "expected": fsum(self.risks),
                "unchecked": self.unchecked,
                "prior": self.bases["prior"],
                "calibrated": self.bases["calibrated"],
            }
        )


def survey(client: Client, *, progress: Progress | None = None, clock: Callable[[], float] = time.time) -> CacheReport:
    """Return what a client's cache holds, each answer judged under the client's numerics.

    An entry that cannot be read is reported (``CacheEntryWarning``) and counted.
    """
    cache = client.cache
    flagged: dict[str, list[FlaggedHit]] = {}
    for hit in cache.flagged():
        flagged.setdefault(hit.key, []).append(hit)
    judge = client.session.parts.judge
    tallies = [_Tally(one) for one in _what_if(client)]
    keys = cache.keys()
    records = corrupt = others = 0
    answers: list[tuple[Answer, str, str]] = []
    smallest: Counter[int] = Counter()
    margins: Counter[int] = Counter()
    for count, key in enumerate(keys, 1):
        record = cache.get(key)
        if record is None:
            corrupt += 1
            continue
        records += 1
        mine = client.answers_for(record)
        others += not mine
        verdict = client.judge(record)
        if record.trace is not None and len(record.trace):
            places = [bisect_right(EDGES, margin) for margin in record.trace.margins]
            margins.update(places)
            smallest[min(places)] += 1
        for tally in tallies if mine else ():
            numerics = tally.what_if.numerics
            if numerics is not None:
                tally.add(record, verdict if tally.what_if.current else judge.judge(record, numerics))
        identity = " ".join(record.request.model.identity.values())
        answer = _answer(client, record, verdict, flagged.get(key, []), mine=mine)
        answers.append((answer, identity, record.numerics.summary()))
        if progress is not None and count % 50 == 0:
            progress(count, len(keys))
    told = _named(answers)
    return CacheReport(
        path=cache.where,
        model=client.identity.name,
        numerics=client.numerics,
        app=client.app,
        accepted_risk=client.accepted_risk,
        made=clock(),
        size=cache.stats().size,
        records=records,
        corrupt=corrupt,
        others=others,
        verdicts=_verdicts(told),
        by_app=_grouped(told, lambda one: one.apps or (NO_APP,)),
        by_model=_grouped(told, lambda one: (one.model,)),
        by_numerics=_grouped(told, lambda one: (one.numerics,)),
        expected=fsum(one.verdict.probability or 0.0 for one in told),
        smallest=Margins.of(smallest),
        all=Margins.of(margins),
        what_if=[tally.result() for tally in tallies],
        audit=_audit(client),
        answers=sorted(told, key=fragility),
    )


def fragility(answer: Answer) -> tuple[int, float, float]:
    """Return the sort key from the most fragile to the safest answer: verdict, then probability, then margin."""
    rank = ("diverged", "at_risk", "unknown", "stable", "exact").index(answer.verdict.status)
    return rank, -(answer.verdict.probability or 0.0), inf if answer.margin is None else answer.margin


def proven(record: Record, flagged: Iterable[FlaggedHit], current: Numerics) -> Verdict | None:
    """Return the verdict of the newest run under ``current`` that verified this answer; None where there is none."""
    proofs = [
        hit
        for hit in flagged
        if hit.verdict.basis == "verified"
        and hit.recorded_digest == record.numerics.digest
        and hit.current_digest == current.digest
        and hit.seen >= record.created
    ]
    return max(proofs, key=lambda hit: hit.seen).verdict if proofs else None


def _what_if(client: Client) -> list[WhatIf]:
    """Return the client's policy and one of each kind, with the numerics under which each would run here."""
    own, typical = client.policy, typical_policies()
    found = []
    for policy in typical if own in typical else (own, *typical):
        if policy == own:
            numerics = client.numerics
        else:
            try:
                numerics = client.session.plan(policy)
            except PolicyError as error:
                found.append(WhatIf(policy=policy.spec, problem=error.problem))
                continue
        kept: Kept = "no promise"
        if policy.promises:
            digests = {numerics.digest, processed(numerics).digest}
            checks = [check.passed for check in client.cache.self_checks() if check.numerics.digest in digests]
            kept = "none" if not checks else "passed" if all(checks) else "failed"
        found.append(WhatIf(policy=policy.spec, numerics=numerics, current=policy == own, self_check=kept))
    return found


def _answer(client: Client, record: Record, verdict: Verdict, flagged: list[FlaggedHit], *, mine: bool) -> Answer:
    request, trace = record.request, record.trace
    own = request.tokenizer == client.tokenizer.digest
    verdict = proven(record, flagged, client.numerics_for(request)) or verdict
    step, token, runner_up, margin = verdict.step, verdict.token, verdict.runner_up, verdict.margin
    if step is None and trace is not None and len(trace):
        step = min(range(len(trace)), key=trace.margins.__getitem__)
        token, runner_up, margin = trace.tokens[step], trace.runner_ups[step], trace.margins[step]
    prompt = request.prompt
    if prompt is None:
        ids = request.prompt_ids
        prompt = client.tokenizer.decode(ids) if own else f"{len(ids)} token ids"
    apps = dict.fromkeys(app for app in (record.app, *(hit.app for hit in flagged)) if app is not None)
    return Answer(
        key=record.key,
        apps=tuple(apps),
        prompt=prompt,
        text=record.text,
        tokens=len(record.token_ids),
        model=request.model.name,
        mine=mine,
        scored=bool(request.continuation),
        policy=record.numerics.policy,
        dtype=record.numerics.dtype,
        numerics=record.numerics.summary(),
        created=record.created,
        verdict=verdict,
        step=step,
        token=_text(client, token, own=own),
        runner_up=_text(client, runner_up, own=own),
        margin=margin if margin is not None and isfinite(margin) else None,
        superseded=record.superseded is not None,
        flagged=[
            Flag(
                app=hit.app,
                status=hit.verdict.status,
                basis=hit.verdict.basis,
                probability=hit.verdict.probability,
                current=hit.current,
                seen=hit.seen,
            )
            for hit in flagged
        ],
    )


def _text(client: Client, token: int | None, *, own: bool) -> str | None:
    if token is None:
        return None
    return client.tokenizer.token(token) if own else str(token)


def _named(answers: list[tuple[Answer, str, str]]) -> list[Answer]:
    """Return answers, with part of the identity added to names that several different models share."""
    identities: dict[str, set[str]] = {}
    for answer, identity, _ in answers:
        identities.setdefault(answer.model, set()).add(identity)
    return [
        answer
        if len(identities[answer.model]) == 1
        else answer.model_copy(update={"model": f"{answer.model} ({identity[:8]})"})
        for answer, identity, _ in answers
    ]


def _verdicts(answers: Iterable[Answer]) -> dict[Status, int]:
    counts = Counter(answer.verdict.status for answer in answers)
    return {status: counts[status] for status in STATUSES}


def _grouped(answers: list[Answer], names: Callable[[Answer], tuple[str, ...]]) -> dict[str, dict[Status, int]]:
    """Return name -> verdict -> answers, the largest group first."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        for name in names(answer):
            groups.setdefault(name, []).append(answer)
    return {name: _verdicts(group) for name, group in sorted(groups.items(), key=lambda item: -len(item[1]))}


def _audit(client: Client) -> AuditReport | None:
    """Return the newest audit of the client's model and numerics, or else of any; None where there is none."""
    kept = client.cache.audits()
    fitting = [
        one for one in kept if one.numerics.digest == client.numerics.digest and one.model == client.identity.name
    ]
    return (fitting or kept)[-1] if kept else None


def rests_on(one: WhatIf) -> str:
    """Return in words what the verdicts under a policy rest on."""
    parts = [f"{count} {name}" for name, count in (("calibrated", one.calibrated), ("prior", one.prior)) if count]
    if one.unchecked:
        parts.append(f"{one.unchecked} exact once a self-check has passed")
    return ", ".join(parts)
