"""The audit: cached answers generated anew in full, and held against what the guard says of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from stablegen.frozen import Frozen
from stablegen.numerics import Numerics
from stablegen.record import Record, Verdict, Verification

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Client, Progress

Outcome = Literal["bits", "tokens", "diverged"]
"""What came of computing an answer anew: every score row's bits, the same tokens, or others."""
OUTCOMES: tuple[Outcome, ...] = ("bits", "tokens", "diverged")
CONFIDENCE = 0.95
BINS = 10
CURVE_POINTS = 100
OTHER_MODEL = "of another model or tokenizer"


class Share(Frozen):
    """How many of how many; ``low`` and ``high`` bound the share with 95 % confidence (Clopper and Pearson, exact)."""

    count: int
    of: int
    value: float | None
    low: float
    high: float

    @classmethod
    def over(cls, count: int, of: int) -> Share:
        """Return the share; of none it is unknown, and may be anything."""
        if not of:
            return cls(count=0, of=0, value=None, low=0.0, high=1.0)
        from scipy.stats import binomtest  # heavy, and wanted here alone

        bounds = binomtest(count, of).proportion_ci(CONFIDENCE, method="exact")
        return cls(count=count, of=of, value=count / of, low=float(bounds.low), high=float(bounds.high))


class Bin(Frozen):
    """Answers whose predicted probability of diverging lies between two bounds; ``predicted`` is their mean."""

    low: float
    high: float
    predicted: float
    observed: Share


class AuditedHit(Frozen):
    """One cached answer: what the guard said of it, and what came of computing it anew.

    ``step`` is the first that differs.
    """

    key: str
    prompt: str
    verdict: Verdict
    outcome: Outcome
    step: int | None = None

    @property
    def wrong(self) -> str | None:
        """Return what was wrong with the verdict; None where it was right."""
        if self.verdict.status == "exact" and self.outcome != "bits":
            return "not exact"
        if self.verdict.status == "stable" and self.outcome == "diverged":
            return "missed"
        if self.verdict.flagged and self.outcome != "diverged":
            return "false alarm"
        return None


class Threshold(Frozen):
    """What flagging answers of at least a predicted probability would have come to.

    ``flagged``: the share of all. ``precision``: of the flagged, the share that diverged. ``recall``: of those that
    diverged, the share flagged; None where none did.
    """

    threshold: float
    flagged: float
    precision: float
    recall: float | None


class AuditReport(Frozen):
    """What an audit found.

    ``audited`` answers of ``records`` in the cache, ``skipped`` by reason. ``table``: verdict -> outcome -> answers.
    ``recall``: of the answers that diverged, those flagged; ``precision``: of the flagged, those that diverged.
    ``brier``: mean squared error of the predicted probabilities; ``calibration_error``: their distance from what was
    observed, a mean over ``reliability``'s bins by size. ``exact``: of the answers called so, those with equal bits.
    ``curve``: precision and recall from the highest threshold to the lowest. ``made`` is Unix time.
    """

    model: str
    numerics: Numerics
    app: str | None
    accepted_risk: float
    records: int
    audited: int
    skipped: dict[str, int]
    table: dict[str, dict[str, int]]
    exact: Share
    recall: Share
    precision: Share
    reliability: list[Bin]
    curve: list[Threshold]
    brier: float | None
    calibration_error: float | None
    wrong: list[AuditedHit]
    made: float
    seconds: float

    @property
    def broken(self) -> bool:
        """Return whether an answer that was called ``exact`` was not."""
        return self.exact.count < self.exact.of


def audit(
    client: Client,
    *,
    sample: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AuditReport:
    """Compute cached answers anew from scratch, and hold the guard's verdicts against what comes of it.

    ``sample``: so many of them, chosen at random by ``seed``; None: all. Answers of other models are left out. No
    record is changed. Raises what ``Client.verify`` raises.
    """
    started = clock()
    chosen: list[Record] = []
    skipped: dict[str, int] = {}
    count = 0
    for record in client.store.records():
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
        model=client.model_name,
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
    """Keep a client's audit in its cache, in place of an earlier one of the same model under the same numerics.

    Raises ``CacheWriteError``.
    """
    model = client.source.identity
    client.store.put_audit(":".join((*model.identity.values(), report.numerics.digest)), report)


def _audited(found: Verification, verdict: Verdict) -> AuditedHit:
    old, fresh = found.record, found.fresh
    assert fresh is not None  # nothing is left to margins here
    outcome: Outcome = "tokens"
    if found.verdict.status == "diverged":
        outcome = "diverged"
    elif old.trace is not None and fresh.trace is not None and old.trace.score_hash == fresh.trace.score_hash:
        outcome = "bits"
    prompt = old.request.prompt or f"{len(old.request.prompt_ids)} tokens"
    return AuditedHit(key=old.key, prompt=prompt, verdict=verdict, outcome=outcome, step=found.verdict.step)


def _measured(hits: Sequence[AuditedHit]) -> dict[str, Any]:
    """Return what the verdicts and outcomes of hits amount to, as fields of a report."""
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
    """Return predicted probabilities and what was observed, in ``BINS`` bins of equal width; empty ones left out."""
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
    """Return the mean squared difference of predicted probabilities and what was observed."""
    return sum((probability - parted) ** 2 for probability, parted in told) / len(told)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance of predicted and observed shares, weighted by the answers in each bin."""
    total = sum(one.observed.of for one in bins)
    return sum(one.observed.of * abs(one.predicted - (one.observed.value or 0.0)) for one in bins) / total


def render(report: AuditReport, console: Console) -> None:
    """Print a report: the confusion table, recall and precision, predicted against observed, and wrong verdicts."""
    from rich.table import Table
    from rich.text import Text

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(f"{report.model}, {report.numerics.summary()}, accepted risk {report.accepted_risk:g}")
    left_out = "".join(f", {count} {reason}" for reason, count in report.skipped.items())
    say(f"{report.audited} of {report.records} cached answers generated anew in {report.seconds:.1f} s{left_out}")
    if not report.audited:
        return
    table = Table("verdict", "same bits", "same tokens", "diverged", box=None, pad_edge=False)
    for status, row in report.table.items():
        table.add_row(status, *(str(row[outcome]) for outcome in OUTCOMES))
    console.print(table)
    say(f"exact and equal in bits: {_share(report.exact)}")
    say(f"recall, flagged of those that diverged: {_share(report.recall)}")
    say(f"precision, diverged of those flagged: {_share(report.precision)}")
    if report.brier is not None:
        say(f"Brier score {report.brier:.4f}, calibration error {report.calibration_error:.4f}")
        bars = Table("predicted", "answers", "mean", "observed", "", box=None, pad_edge=False)
        for one in report.reliability:
            bar = _bar(one)
            bars.add_row(
                f"{one.low:.1f} to {one.high:.1f}",
                str(one.observed.of),
                f"{one.predicted:.3f}",
                _share(one.observed),
                Text(bar),
            )
        console.print(bars)
    for hit in report.wrong:
        where = "" if hit.step is None else f" at step {hit.step}"
        chance = "" if hit.verdict.probability is None else f", p {hit.verdict.probability:.3g}"
        say(f"{hit.wrong}: {hit.key[:12]} {hit.prompt!r:.40}: {hit.verdict.status}{chance}; {hit.outcome}{where}")


def _share(share: Share) -> str:
    if share.value is None:
        return "none to tell"
    return f"{share.count} of {share.of}, {share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _bar(one: Bin, width: int = 30) -> str:
    """Return what was observed as a bar, with a mark where it was predicted."""
    filled = round((one.observed.value or 0.0) * width)
    bar = list("#" * filled + "." * (width - filled))
    bar[min(width - 1, int(one.predicted * width))] = "|"
    return "".join(bar)
