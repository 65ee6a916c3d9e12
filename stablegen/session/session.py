"""A client's session: it detects changes of the model, makes requests, and takes each call through all stages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from stablegen.core.answer import Completion, Score
from stablegen.core.bounded import Bounded
from stablegen.core.calibration import Calibration
from stablegen.core.numerics import Numerics
from stablegen.core.policy import ExecutionPolicy
from stablegen.core.record import Record
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.verdict import OnRisk, SelfCheck, Verdict
from stablegen.engine.base import Engine, Listener
from stablegen.engine.planner import Planner
from stablegen.errors import CacheError, ClientClosedError, InvalidRequestError, RecordNotFoundError, StablegenError
from stablegen.guard.judge import Judge, numerics_for
from stablegen.session.call import Call, Progress
from stablegen.session.intake import CallersOwn, Intake, check_seeded
from stablegen.session.parts import KNOWN_FLAGS, Parts, State
from stablegen.session.runner import Runner
from stablegen.sources.base import Source
from stablegen.store.cache import Cache

log = logging.getLogger("stablegen")


class Session:
    """The working parts of one client around a source and a cache; threads may share it.

    ``policy``, ``dtype`` and ``device`` are what misses run under, ``on_risk`` and ``accepted_risk`` what happens to
    flagged hits and which hits are flagged, ``app`` the name under which answers and flags are stored. The session owns
    source and cache: ``close`` closes both. Raises ``PolicyError`` where the source cannot run under the policy.
    """

    def __init__(
        self,
        source: Source,
        cache: Cache,
        *,
        policy: ExecutionPolicy,
        dtype: str,
        device: str,
        on_risk: OnRisk,
        accepted_risk: float,
        app: str | None = None,
    ) -> None:
        source.check(policy)
        self.dtype = dtype
        self.device = device
        self.own = CallersOwn()
        self.parts = Parts(
            source,
            cache,
            Judge(cache, accepted_risk),
            Runner(source),
            policy,
            on_risk,
            app,
            Bounded(KNOWN_FLAGS),
        )
        planned = source.plan(policy, dtype, device)
        self._state = State(Intake(source, source.identity, self.own), planned, planned)
        self._changing = threading.Lock()
        self._closed = False
        self._calls: dict[int, int] = {}  # those that run now, by thread; a callback may call again
        self._counting = threading.Lock()
        self._ended = threading.Condition(self._counting)
        self._closed_by: int | None = None

    @property
    def source(self) -> Source:
        """Return the model's source."""
        return self.parts.source

    @property
    def cache(self) -> Cache:
        """Return the typed cache; raise ``ClientClosedError`` after ``close``."""
        self.check_open()
        return self.parts.cache

    @property
    def identity(self) -> ModelIdentity:
        """Return the identity of the model, as of the last call."""
        return self._state.intake.identity

    @property
    def numerics(self) -> Numerics:
        """Return the numerics under which misses run; once the engine is loaded, its own."""
        return self._state.numerics

    # -- what the model is now -------------------------------------------------------------------------------------

    def refresh(self) -> State:
        """Return the model's present state; a changed model has other keys, or other numerics.

        Raises ``ClientClosedError`` after ``close``.
        """
        if self._closed:
            self.check_open()
        identity, planned = self._describe_source()
        state = self._state
        if identity is state.intake.identity and planned is state.planned:
            return state
        with self._changing:
            # again: another thread may have seen a newer model meanwhile
            identity, planned = self._describe_source()
            source, state = self.parts.source, self._state
            if identity is not state.intake.identity:
                state = state._replace(intake=Intake(source, identity, self.own))
            if planned != state.planned:
                state = state._replace(planned=planned, numerics=planned)
            self._state = state
            return state

    def _describe_source(self) -> tuple[ModelIdentity, Numerics]:
        source = self.parts.source
        return source.identity, source.plan(self.parts.policy, self.dtype, self.device)

    def numerics_for(self, request: Request) -> Numerics:
        """Return the numerics under which a request would be answered."""
        return numerics_for(request, self.numerics)

    def plan(self, policy: ExecutionPolicy) -> Numerics:
        """Return the numerics of another policy on this device and dtype; raise ``PolicyError`` if it cannot run."""
        return self.source.plan(policy, self.numerics.dtype, self.device)

    @contextmanager
    def engine(self, state: State) -> Iterator[tuple[Engine, State]]:
        """Lend the engine for a state, with the state updated to the engine's numerics."""
        with self.parts.runner.engine(state.intake.identity, state.planned) as engine:
            if engine.numerics != state.numerics:
                log.warning(
                    "the engine has other numerics than planned: %s", state.numerics.differences(engine.numerics)
                )
                state = state._replace(numerics=engine.numerics)
                with self._changing:
                    if self._state.planned is state.planned:
                        self._state = self._state._replace(numerics=engine.numerics)
            yield engine, state

    def planner(self, engine: Engine, call: Call) -> Planner:
        """Return the planner of the engine's batches; the call keeps the self-checks that it makes."""
        identity = call.state.intake.identity
        return Planner(
            engine,
            self.parts.policy,
            self.source.vocabulary,
            find=lambda numerics, shape: self.parts.judge.check(identity, numerics, shape),
            keep=call.keep_check,
        )

    # -- one call's way --------------------------------------------------------------------------------------------

    def run(
        self,
        asked: Sequence[tuple[str, Request]],
        state: State,
        *,
        progress: Progress | None = None,
        cached: bool = True,
        listen: Listener | None = None,
    ) -> list[Completion]:
        """Return the completions of requests, each given with its key, in their order.

        ``cached=False``: the cache is neither read nor written. What other calls have computed while this one waited
        for the engine is taken from the cache.
        """
        call = Call(
            self.parts,
            state,
            proves=cached and self.parts.on_risk == "verify",
            keeps=cached,
            listen=listen,
            progress=progress,
        )
        completed = self.parts.runner.completed
        if cached:
            try:
                call.look_up(asked)
            except CacheError:
                self.check_open()  # closed by another thread while it read: hits take no lock
                raise
        else:
            call.pending = dict(asked)
        if call.pending:
            with self.busy():
                self._compute(call, asked, completed, cached=cached)
        if call.failure is not None:
            call.check()
        return [call.results[key] for key, _ in asked]

    def _compute(self, call: Call, asked: Sequence[tuple[str, Request]], completed: int, *, cached: bool) -> None:
        """Compute what a call is missing; ``completed``: the runner's count when the call looked it up."""
        try:
            with self.engine(call.state) as (engine, found):
                if found is not call.state and cached:
                    call.look_up_anew(asked, found)
                elif self.parts.runner.completed != completed and cached:
                    call.look_up_pending()
                call.state = found
                call.compute(self.planner(engine, call))
        except StablegenError as error:
            call.fail(error)

    def complete(
        self, prompts: str | Sequence[str], arguments: Mapping[str, Any], progress: Progress | None
    ) -> list[Completion]:
        """Return the completions of one prompt or of several."""
        state = self.refresh()
        intake = state.intake
        if isinstance(prompts, str):
            params, seeded = intake.seeded(intake.params(arguments))
            return self.run([intake.ask(prompts, params)], state, progress=progress, cached=seeded)
        asked, seeded = intake.ask_many(prompts, arguments)
        return self.run(asked, state, progress=progress, cached=seeded)

    def score(self, prompts: Any, continuations: Any, progress: Progress | None) -> list[Score]:
        """Return the scores of continuations after their prompts, two lists of equal length."""
        state = self.refresh()
        asked = [(request.key, request) for request in state.intake.pairs(prompts, continuations)]
        found = self.run(asked, state, progress=progress)
        return [Score(one.record, one.cached, one.verdict) for one in found]

    def request(self, prompt: str, arguments: Mapping[str, Any]) -> Request:
        """Return the request that ``complete`` would make for a prompt."""
        intake = self.refresh().intake
        return intake.ask(prompt, check_seeded(intake.params(arguments)))[1]

    def run_requests(
        self,
        requests: Iterable[Request],
        *,
        progress: Progress | None = None,
        cached: bool = True,
        listen: Listener | None = None,
    ) -> list[Completion]:
        """Return the completions of requests that this session has made."""
        state = self.refresh()
        fitting = [state.intake.validate(request) for request in requests]
        asked = [(request.key, request) for request in fitting]
        return self.run(asked, state, progress=progress, cached=cached, listen=listen)

    def make_request(
        self,
        prompt_ids: Sequence[int],
        arguments: Mapping[str, Any],
        logits_processors: Mapping[str, Any],
        stopping_criteria: Mapping[str, Callable[[int], Any]],
    ) -> Request:
        """Return the request for prompt token ids and a caller's generation arguments."""
        intake = self.refresh().intake
        return intake.make_request(
            prompt_ids, arguments, logits_processors=logits_processors, stopping_criteria=stopping_criteria
        )

    # -- records ---------------------------------------------------------------------------------------------------

    def record(self, key: str) -> Record:
        """Return the record under a key; raise ``RecordNotFoundError`` where there is none."""
        found = self.cache.get(key)
        if found is None:
            raise RecordNotFoundError(
                f"no record under the key {key!r} in {self.cache.where}",
                accepted="a completion's key, 64 hexadecimal digits",
                hint="`stablegen cache export` lists all of them",
            )
        return found

    def find_key(self, start: str) -> str:
        """Return the one key that begins with ``start``; raise ``RecordNotFoundError`` where none or several do."""
        found = self.cache.keys(start)
        if len(found) != 1:
            raise RecordNotFoundError(
                f"{len(found) or 'no'} record(s) in {self.cache.where} have a key that begins with {start!r}",
                accepted="a completion's key, or enough of its first digits to identify it",
                hint="`stablegen cache export` lists all of them",
            )
        return found[0]

    def record_of(self, answer: str | Record | Completion) -> Record:
        """Return the record of a key, a record or a completion."""
        if isinstance(answer, Completion):
            return answer.record
        return answer if isinstance(answer, Record) else self.record(answer)

    def judge(self, record: Record) -> Verdict:
        """Return the guard's verdict on a record under the session's numerics."""
        self.check_open()
        return self.parts.judge.judge(record, self.numerics)

    def calibration(self, record: Record) -> Calibration | None:
        """Return the calibration from a record's numerics to the session's for its model; None where there is none."""
        self.check_open()
        return self.parts.judge.calibration(record, self.numerics_for(record.request))

    def answers_for(self, record: Record) -> bool:
        """Return whether this session's model and tokenizer could answer a record's request."""
        try:
            self._state.intake.validate(record.request)
        except InvalidRequestError:
            return False
        return True

    def self_check(self) -> SelfCheck:
        """Load the engine, and measure whether the policy keeps its promise in its smallest shape."""
        with self.busy(), self.engine(self.refresh()) as (engine, state):
            call = Call(self.parts, state)
            check = self.planner(engine, call).measure(self.parts.policy.shape(1, 1, engine.limits))
            call.check()
            return check

    # -- closing ---------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise ``ClientClosedError`` after ``close``."""
        if self._closed:
            raise ClientClosedError("this client was closed", hint="Make a new one, or use it inside its with block")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep cache and engine open for a call, though the session is closed meanwhile."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Begin a call; raise ``ClientClosedError`` after ``close``."""
        thread, calls = get_ident(), self._calls
        with self._counting:
            if thread in calls:
                calls[thread] += 1
                return
            if self._closed:
                self.check_open()
            calls[thread] = 1

    def leave(self) -> None:
        """End a call; one that closed the session itself releases what it holds."""
        thread, calls = get_ident(), self._calls
        with self._counting:
            if calls[thread] > 1:
                calls[thread] -= 1
                return
            del calls[thread]
            if not self._closed:
                return
            self._ended.notify_all()
        if self._closed_by == thread:
            self._release()

    def close(self) -> None:
        """Release engine, source and cache, once the calls of other threads have ended.

        Closed from a callback of a call of its own, that call ends first.
        """
        thread = get_ident()
        with self._counting:
            if self._closed:
                return
            self._closed, self._closed_by = True, thread
            self._ended.wait_for(lambda: not self._calls.keys() - {thread})
            is_idle = not self._calls
        if is_idle:
            self._release()

    def _release(self) -> None:
        self.parts.runner.close()
        self.source.close()
        self.parts.cache.close()
