"""One call: look up, judge, compute what is missing, record, and return the results in the order requested."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import compress

from stablegen.core.answer import Completion
from stablegen.core.caller import warn
from stablegen.core.record import Record
from stablegen.core.request import Request
from stablegen.core.verdict import FlaggedHit, SelfCheck, Verdict
from stablegen.engine.base import Generated, Listener
from stablegen.engine.planner import Planner
from stablegen.engine.regenerate import regenerate
from stablegen.errors import (
    CacheWriteError,
    DeviceError,
    DivergenceRiskError,
    EngineError,
    MarginWarning,
    PromiseWarning,
    StablegenError,
)
from stablegen.guard.judge import numerics_for
from stablegen.session.parts import Parts, State

Progress = Callable[[int, int], None]
"""Called with how many distinct requests of a call are done, and how many there are."""
KEEP_EVERY = 5.0
"""Seconds after which a batch's finished rows are written, at the next row to finish, while others still run."""
ONE_PASS = "computed in one pass over the cached answer, and generated from the first step that differs"

log = logging.getLogger("stablegen")


class Call:
    """The state of one call.

    ``pending``: the requests still to be computed, by key; ``hits``: the cached records of those that have one;
    ``results``: the completions so far. ``proves``: whether hits may be verified in one pass over them. ``keeps``:
    whether results are cached. ``listen`` is called with the tokens that are generated.
    """

    __slots__ = (
        *("parts", "state", "proves", "keeps", "pending", "hits", "results", "failure"),
        *("_flagged", "_listen", "_progress", "_total"),
    )

    def __init__(
        self,
        parts: Parts,
        state: State,
        *,
        proves: bool = False,
        keeps: bool = True,
        listen: Listener | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.parts = parts
        self.state = state
        self.proves = proves
        self.keeps = keeps
        self.pending: dict[str, Request] = {}
        self.hits: dict[str, Record] = {}
        self.results: dict[str, Completion] = {}
        self.failure: StablegenError | None = None
        self._flagged: list[FlaggedHit] = []
        self._listen = listen
        self._progress = progress
        self._total = 0

    # -- what the cache holds --------------------------------------------------------------------------------------

    def look_up(self, asked: Sequence[tuple[str, Request]]) -> None:
        """Add the cached answers that may be served to the results; the rest is pending."""
        on_risk, cache, judge = self.parts.on_risk, self.parts.cache, self.parts.judge
        for key, request in asked:
            if key in self.results or key in self.pending:
                continue
            record = cache.get(key)
            if record is None:
                self.pending[key] = request
                continue
            verdict = judge.judge(record, self.state.numerics)
            if verdict.flagged:
                self._flag(record, verdict)
                if on_risk == "raise":
                    self.fail(self._risk(record, verdict))
                    continue
                if on_risk in ("verify", "recompute"):
                    self.pending[key], self.hits[key] = request, record
                    continue
            self.results[key] = Completion(record, cached=True, verdict=verdict)
        if self._flagged:
            self._write_flags()

    def look_up_anew(self, asked: Sequence[tuple[str, Request]], state: State) -> None:
        """Look everything up again, because the engine's numerics differ from those that hits were judged under."""
        self.state, self.failure = state, None
        self.pending, self.hits, self.results = {}, {}, {}
        self.look_up(asked)

    def look_up_pending(self) -> None:
        """Look up the pending requests again: another call may have computed them since."""
        asked = list(self.pending.items())
        self.pending, self.hits = {}, {}
        self.look_up(asked)

    def _risk(self, record: Record, verdict: Verdict) -> DivergenceRiskError:
        return DivergenceRiskError(
            f"the cached answer to {_shown(record)} is {verdict.status}: {self._describe(verdict)}",
            key=record.key,
            verdict=verdict,
            hint="Recompute it with on_risk='recompute', or accept it with on_risk='serve'",
        )

    # -- what is computed ------------------------------------------------------------------------------------------

    def compute(self, planner: Planner) -> None:
        """Compute the pending requests, in the batches that the policy plans."""
        self._total = len(self.results) + len(self.pending)
        for requests, check in planner.groups(list(self.pending.values())):
            missing = requests
            if self.proves and check.passed and planner.engine.limits.prefill_equals_decode:
                # one pass over an answer shows what a fresh run gives; scoring a continuation is one pass anyway
                proves = [request.key in self.hits and not request.continuation for request in requests]
                self._prove(planner, list(compress(requests, proves)))
                missing = [request for request, proved in zip(requests, proves, strict=True) if not proved]
            for batch in planner.plan(missing, check):
                self._collect(planner.engine.generate(batch, None, self._listen))

    def _prove(self, planner: Planner, requests: Sequence[Request]) -> None:
        """Verify the hits of requests in one pass over each, and compute what follows where they diverge."""
        if not requests:
            return
        from stablegen.engine.stopping import stopper_for  # loads torch

        answers = {request: self.hits[request.key].token_ids for request in requests}
        stopper_of = partial(stopper_for, tokenizer=self.parts.source.tokenizer)
        self._collect(regenerate(planner.engine, answers, stopper_of), how=ONE_PASS)

    def keep_check(self, check: SelfCheck) -> None:
        """Keep a self-check made for this call; warn where it failed."""
        identity, policy = self.state.intake.identity, self.parts.policy
        self.parts.judge.learn(identity, check)
        if not policy.promises:
            return
        try:
            self.parts.cache.put_self_check(identity, check)
        except CacheWriteError as error:
            self.fail(error)
        if not check.passed:
            warn(
                f"policy {policy} does not keep its promise on this machine, so nothing is judged exact under it: "
                f"{check.checks}. `stablegen doctor` shows the details",
                PromiseWarning,
            )

    def _collect(self, finishing: Generator[Generated, None, None], *, how: str = "recomputed") -> None:
        """Record requests as they finish; where some fail, or the call is interrupted, keep the finished ones."""
        fresh: list[Record] = []
        kept = time.monotonic()
        try:
            for generated in finishing:
                fresh.append(self._record(generated))
                if self._progress is not None:
                    self._progress(len(self.results) + len(fresh), self._total)
                if time.monotonic() - kept > KEEP_EVERY:
                    self._keep(fresh, how)
                    fresh, kept = [], time.monotonic()
        except (EngineError, DeviceError) as error:
            self.fail(error)
        finally:
            finishing.close()  # the traceback of a kept error would keep it alive
            self._keep(fresh, how)

    def _record(self, generated: Generated) -> Record:
        request = generated.request
        record = Record(
            key=request.key,
            request=request,
            text=self.parts.source.tokenizer.decode(request.continuation or generated.trace.tokens),
            finish_reason=generated.finish_reason,
            trace=generated.trace,
            numerics=numerics_for(request, self.state.numerics),
            composition=generated.composition,
            created=time.time(),
            seconds=generated.seconds,
            logprobs=generated.logprobs,
            app=self.parts.app,
        )
        return record.superseding(self.hits.get(record.key))

    def _keep(self, fresh: list[Record], how: str) -> None:
        judge = self.parts.judge
        for record in fresh:
            old = self.hits.get(record.key)
            if old is None:
                verdict, confirmed = judge.judge(record, self.state.numerics), False
            else:
                verdict = judge.compare(old, record, how=how)
                if verdict.flagged or judge.judge(old, self.state.numerics).flagged:
                    self._flagged.append(self._hit(old, verdict))
                confirmed = self.parts.on_risk == "verify" and not verdict.flagged
            self.results[record.key] = Completion(record, cached=confirmed, verdict=verdict)
        self._write_flags()
        try:
            if fresh and self.keeps:
                self.parts.cache.put(fresh)
                self.parts.runner.completed += 1
        except CacheWriteError as error:
            self.fail(error)

    # -- failures and flags ----------------------------------------------------------------------------------------

    def fail(self, error: StablegenError) -> None:
        """Remember the first failure; it is raised once everything else is done."""
        self.failure = self.failure or error

    def check(self) -> None:
        """Raise the first failure, if any, with the completions so far."""
        if self.failure is not None:
            self.failure.completions = tuple(self.results.values())
            raise self.failure

    def _flag(self, record: Record, verdict: Verdict) -> None:
        text = f"the cached answer to {_shown(record)} is {verdict.status}: {self._describe(verdict)}"
        log.info("%s (key %s)", text, record.key)
        seen = record.key, self.state.numerics.digest
        if seen not in self.parts.flagged:
            self._flagged.append(self._hit(record, verdict))
            self.parts.flagged[seen] = True
        if self.parts.on_risk != "serve":
            warn(text, MarginWarning)

    def _hit(self, record: Record, verdict: Verdict) -> FlaggedHit:
        """Return a flagged hit as the cache stores it, with the two tokens as text."""
        tokenizer, current = self.parts.source.tokenizer, numerics_for(record.request, self.state.numerics)
        return FlaggedHit(
            key=record.key,
            app=self.parts.app,
            prompt=record.request.prompt or tokenizer.decode(record.request.prompt_ids),
            verdict=verdict,
            token=None if verdict.token is None else tokenizer.token(verdict.token),
            runner_up=None if verdict.runner_up is None else tokenizer.token(verdict.runner_up),
            recorded=record.numerics.summary(),
            recorded_digest=record.numerics.digest,
            current=current.summary(),
            current_digest=current.digest,
            seen=time.time(),
        )

    def _write_flags(self) -> None:
        try:
            if self._flagged:
                self.parts.cache.flag(self._flagged)
        except CacheWriteError as error:
            self.fail(error)
        self._flagged.clear()

    def _describe(self, verdict: Verdict) -> str:
        if verdict.step is None or verdict.token is None or verdict.runner_up is None:
            return verdict.reason
        token = self.parts.source.tokenizer.token
        chance = "" if verdict.probability is None else f", probability of divergence {verdict.probability:.3g}"
        margin = "" if verdict.margin is None else f", margin {verdict.margin:.3g}"
        return (
            f"step {verdict.step}, {token(verdict.token)!r} against {token(verdict.runner_up)!r}{margin}{chance} "
            f"({verdict.basis}); {verdict.reason}"
        )


def _shown(record: Record) -> str:
    return f"{record.request.prompt!r:.60}" if record.request.prompt else f"{record.key[:12]}"
