"""The audit: generate cached answers again in full, and compare the results with the guard's verdicts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stablegen.core.answer import Verification
from stablegen.core.audit import OUTCOMES, AuditedHit, AuditReport, Bin, Outcome, Share, Threshold
from stablegen.core.record import Record
from stablegen.core.verdict import Verdict

if TYPE_CHECKING:
    from stablegen.client import Client
    from stablegen.session.call import Progress

BINS = 10
CURVE_POINTS = 100
OTHER_MODEL = "of another model or tokenizer"


def audit(
    client: Client,
    *,
    sample: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AuditReport:
    """Generate cached answers again from scratch, and compare the results with the guard's verdicts.

    ``sample``: how many answers, chosen at random by ``seed``; None: all. Answers of other models are left out. No
    record is changed. Raises what ``Client.verify`` raises.
    """
    started = clock()
    chosen: list[Record] = []
    skipped: dict[str, int] = {}
    count = 0
    for record in client.cache.records():
        count += 1
        if client.answers_for(record):
            chosen.append(record)
        else:
            skipped[OTHER_MODEL] = skipped.get(OTHER_MODEL, 0) + 1
    if sample is not None and sample < len(chosen):
        skipped["not in the sample"] = len(chosen) - sample
        chosen = random.Random(seed).sample(chosen, sample)
    verdicts = [client.judge(record) for record in chosen]
    found = client.verify(chosen, from_scratch=True, progress=progress)
    hits = [_audited(*pair) for pair in zip(found, verdicts, strict=True)]
    return AuditReport(
        model=client.identity.name,
        numerics=client.numerics,
        app=client.app,
        accepted_risk=client.accepted_risk,
        records=count,
        skipped=skipped,
        made=time.time(),
        seconds=clock() - started,
        **_measured(hits),
    )


def keep(report: AuditReport, client: Client) -> None:
    """Store a client's audit in its cache, replacing an earlier one of the same model under the same numerics.

    Raises ``CacheWriteError``.
    """
    client.cache.put_audit(client.source.identity, report)


def _audited(found: Verification, verdict: Verdict) -> AuditedHit:
    old, fresh = found.record, found.fresh
    assert fresh is not None  # from scratch, every answer is recomputed
    outcome: Outcome = "tokens"
    if found.verdict.status == "diverged":
        outcome = "diverged"
    elif old.trace is not None and fresh.trace is not None and old.trace.score_hash == fresh.trace.score_hash:
        outcome = "bits"
    prompt = old.request.prompt or f"{len(old.request.prompt_ids)} tokens"
    return AuditedHit(key=old.key, prompt=prompt, verdict=verdict, outcome=outcome, step=found.verdict.step)


def _measured(hits: Sequence[AuditedHit]) -> dict[str, Any]:
    """Return the statistics of hits' verdicts and outcomes, as fields of a report."""
    table: dict[str, dict[str, int]] = {}
    for hit in hits:
        row = table.setdefault(hit.verdict.status, dict.fromkeys(OUTCOMES, 0))
        row[hit.outcome] += 1
    diverged = [hit for hit in hits if hit.outcome == "diverged"]
    flagged = [hit for hit in hits if hit.verdict.flagged]
    exact = [hit for hit in hits if hit.verdict.status == "exact"]
    predicted = [(hit.verdict.probability, hit.outcome == "diverged") for hit in hits]
    told = [(probability, parted) for probability, parted in predicted if probability is not None]
    bins = reliability(told)
    return {
        "audited": len(hits),
        "table": table,
        "exact": Share.over(sum(hit.outcome == "bits" for hit in exact), len(exact)),
        "recall": Share.over(sum(hit.verdict.flagged for hit in diverged), len(diverged)),
        "precision": Share.over(sum(hit.outcome == "diverged" for hit in flagged), len(flagged)),
        "reliability": bins,
        "curve": curve(told),
        "brier": brier(told) if told else None,
        "calibration_error": calibration_error(bins) if told else None,
        "wrong": [hit for hit in hits if hit.wrong],
    }


def reliability(told: Sequence[tuple[float, bool]]) -> list[Bin]:
    """Return predicted probabilities and observed shares, in ``BINS`` bins of equal width; empty ones are left out."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, parted in told:
        bins.setdefault(min(int(probability * BINS), BINS - 1), []).append((probability, parted))
    return [
        Bin(
            low=index / BINS,
            high=(index + 1) / BINS,
            predicted=sum(probability for probability, _ in members) / len(members),
            observed=Share.over(sum(parted for _, parted in members), len(members)),
        )
        for index, members in sorted(bins.items())
    ]


def curve(told: Sequence[tuple[float, bool]]) -> list[Threshold]:
    """Return precision and recall at every predicted probability, highest first; at most ``CURVE_POINTS`` of them."""
    ranked = sorted(told, reverse=True)
    total = sum(parted for _, parted in told)
    found, caught = [], 0
    for count, (probability, parted) in enumerate(ranked, 1):
        caught += parted
        if count < len(ranked) and ranked[count][0] == probability:
            continue  # equal ones are flagged together
        recall = caught / total if total else None
        found.append(
            Threshold(threshold=probability, flagged=count / len(ranked), precision=caught / count, recall=recall)
        )
    if len(found) <= CURVE_POINTS:
        return found
    return [found[round(place * (len(found) - 1) / (CURVE_POINTS - 1))] for place in range(CURVE_POINTS)]


def brier(told: Sequence[tuple[float, bool]]) -> float:
    """Return the mean squared difference between predicted probabilities and outcomes (0 or 1)."""
    return sum((probability - parted) ** 2 for probability, parted in told) / len(told)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance between predicted and observed shares, weighted by the answers in each bin."""
    total = sum(one.observed.of for one in bins)
    return sum(one.observed.of * abs(one.predicted - (one.observed.value or 0.0)) for one in bins) / total
