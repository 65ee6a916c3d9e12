"""The one orchestrator: prompts become requests, hits are judged, the rest is run, recorded and returned."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import compress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, get_args, overload

from stablegen.core.answer import Completion, Score, SelfCheck, Verdict, Verification
from stablegen.core.calibration import Calibration
from stablegen.core.flagged import FlaggedHit
from stablegen.core.numerics import Numerics
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, ExecutionPolicy, Invariant, Shape, load_policy
from stablegen.core.record import Record
from stablegen.core.request import ModelIdentity, Request, check_fits, check_prompt
from stablegen.core.trace import Trace
from stablegen.engine.base import Engine, FollowingEngine, ForcingEngine, Generated
from stablegen.engine.invariant.architectures import check_invariant
from stablegen.engine.repair import regenerate
from stablegen.errors import (
    CacheWriteError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    DeviceError,
    DivergenceRiskError,
    EngineError,
    InvalidRequestError,
    MarginWarning,
    ModelError,
    ParameterError,
    PromiseWarning,
    PromptError,
    RecordNotFoundError,
    StablegenError,
    UncachedWarning,
)
from stablegen.guard.calibration import fit
from stablegen.guard.verdicts import DEFAULT_ACCEPTED_RISK, OnRisk, compare, flip_probabilities, fragile_steps, judge
from stablegen.machine.digests import DigestMemory
from stablegen.machine.plan import allows_static_cache, find_device, numerics_on, processed
from stablegen.sources.checkpoint import open_checkpoint
from stablegen.store.base import Store
from stablegen.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from stablegen.config import Effective

Progress = Callable[[int, int], None]
"""Called with how many distinct requests of a call are done, and how many there are."""
Listener = Callable[[str, int, Sequence[int]], None]
"""Hears the token ids of what is generated as they are known: the request's key, the step of the first, and the ids."""

RowObserver = Callable[[str, "torch.Tensor"], None]
"""Sees each step of each request: its key, and the full score row [V] in float32."""

log = logging.getLogger("stablegen")
_NOTHING: Mapping[str, Any] = MappingProxyType({})
NO_SEED = (
    "a sampled request has no seed: its answer is drawn anew every time and not cached. Give a seed, and it is a "
    "function of the request"
)
ONE_PASS = "computed in one pass over the cached answer, anew from where it parts"
CALIBRATION_SIZES = (2, 8, 32)
"""Batch sizes whose noise is measured where a policy promises nothing of it."""
KEEP_EVERY = 5.0
"""Seconds after which the next row to finish has its batch's finished rows written, though others of it go on."""


class ModelSource(Protocol):
    """A model that can be asked about without being loaded."""

    @property
    def identity(self) -> ModelIdentity:
        """Return which weights these are."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the model's configuration."""
        ...

    @property
    def context(self) -> int:
        """Return the longest sequence in tokens."""
        ...

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer unless the caller names others."""
        ...


@dataclass(slots=True)
class _Work:
    """What one call has still to compute, and what stood in the cache for it.

    ``proves``: whether what stood there may be held against one pass over it. ``keeps``: whether results are cached.
    ``flagged``: hits to be noted in the store. ``listen`` hears what is generated.
    """

    requests: dict[str, Request] = field(default_factory=dict)
    hits: dict[str, Record] = field(default_factory=dict)
    proves: bool = False
    keeps: bool = True
    listen: Listener | None = None
    failure: StablegenError | None = None
    flagged: list[FlaggedHit] = field(default_factory=list)

    def fail(self, error: StablegenError) -> None:
        """Remember the first failure; it is raised when all else is done."""
        self.failure = self.failure or error

    def check(self, results: Mapping[str, Completion]) -> None:
        """Raise the first failure, if any; it carries what is done."""
        if self.failure is not None:
            self.failure.completions = tuple(results.values())
            raise self.failure


class Client:
    """A cached generation client with a determinism guard.

    Made by ``Client.from_pretrained``, ``Client.for_app``, or around a transformers model already loaded:
    ``Client(model, tokenizer)``. ``policy`` is how misses run, ``on_risk`` what happens to a flagged hit,
    ``accepted_risk`` the probability of divergence up to which a hit counts as stable, ``cache_dir`` the folder of
    the cache (None: the user's), ``size_limit`` its size in bytes (None: nothing is ever evicted), ``kv_cache_size``
    the bytes that keys and values may take under ``invariant`` (None: 2 GiB on a GPU, 1 GiB on a CPU).

    Threads may share a client: what several ask for at once is computed once. The model is loaded at the first miss.
    Raises a subclass of ``StablegenError`` for anything it cannot do.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        policy: str | ExecutionPolicy = "single",
        on_risk: OnRisk = "warn",
        accepted_risk: float = DEFAULT_ACCEPTED_RISK,
        cache_dir: str | Path | None = None,
        size_limit: int | None = None,
        kv_cache_size: int | None = None,
        app: str | None = None,
    ) -> None:
        from stablegen.sources.live import LoadedModel

        loaded = LoadedModel(model)
        chosen = load_policy(policy)
        check_size("kv_cache_size", kv_cache_size)

        def plan() -> Numerics:
            device = find_device(loaded.device, loaded.dtype)
            return numerics_on(
                device,
                chosen,
                loaded.dtype,
                attention=loaded.attention,
                alignment=loaded.alignment,
                static_cache=device.is_cuda and allows_static_cache(loaded.config),
            )

        own = Tokenizer.from_object(tokenizer)
        store = open_store(cache_dir, size_limit)
        try:
            self._set_up(
                loaded,
                lambda numerics: loaded.start(numerics, kv_cache_size, own),
                own,
                plan,
                on_risk=on_risk,
                accepted_risk=accepted_risk,
                store=store,
                app=app,
            )
        except BaseException:
            store.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        policy: str | ExecutionPolicy | None = None,
        dtype: str | None = None,
        device: str | None = None,
        cache_dir: str | Path | None = None,
        on_risk: OnRisk | None = None,
        accepted_risk: float | None = None,
        size_limit: int | None = None,
        kv_cache_size: int | None = None,
        app: str | None = None,
    ) -> Client:
        """Return a client for a hub name, a local directory, or (None) the embedded ``tiny-gpt2``.

        What is left None comes from the environment (``STABLEGEN_POLICY`` ...), the app's settings, the defaults of
        the configuration file, and last from here: ``policy="invariant"``, ``dtype="float32"``, ``device="auto"``,
        ``on_risk="warn"``, ``accepted_risk=0.005``.
        """
        from stablegen.config import load_settings

        given: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "policy": policy,
            "dtype": dtype,
            "device": device,
            "cache_dir": cache_dir,
            "on_risk": on_risk,
            "accepted_risk": accepted_risk,
            "size_limit": size_limit,
            "kv_cache_size": kv_cache_size,
        }
        return cls.from_settings(load_settings(app, **{k: v for k, v in given.items() if v is not None}))

    @classmethod
    def for_app(cls, app: str) -> Client:
        """Return a client with the settings of an app from the configuration."""
        return cls.from_pretrained(app=app)

    @classmethod
    def from_settings(cls, effective: Effective) -> Client:
        """Return a client with settings already resolved."""
        settings = effective.settings
        store = open_store(settings.cache_dir, settings.size_limit)
        try:
            memory = DigestMemory(store.path / "digests.json")
            checkpoint = open_checkpoint(settings.model, settings.revision, memory)
            tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file, memory)
            device = find_device(settings.device, settings.dtype)

            numerics = numerics_on(
                device,
                load_policy(settings.policy),
                settings.dtype,
                static_cache=allows_static_cache(checkpoint.config),
            )

            def start(numerics: Numerics) -> Engine:
                from stablegen.engine.loading import load_engine

                engine = load_engine(checkpoint, numerics, device.name, settings.kv_cache_size, tokenizer)
                if checkpoint.identity.source == "digest":
                    now = open_checkpoint(checkpoint.directory, None, memory).identity
                    if now.identity != checkpoint.identity.identity:
                        raise CheckpointError(
                            f"the model in {checkpoint.directory} was changed since this client was made",
                            hint="Make a new client",
                        )
                return engine

            client = cls.__new__(cls)
            client._set_up(
                checkpoint,
                start,
                tokenizer,
                lambda: numerics,
                on_risk=settings.on_risk,
                accepted_risk=settings.accepted_risk,
                store=store,
                app=effective.app,
            )
        except BaseException:
            store.close()
            raise
        return client

    def _set_up(
        self,
        source: ModelSource,
        start: Callable[[Numerics], Engine],
        tokenizer: Tokenizer,
        plan: Callable[[], Numerics],
        *,
        on_risk: OnRisk,
        accepted_risk: float,
        store: Store,
        app: str | None,
    ) -> None:
        if on_risk not in get_args(OnRisk):
            raise ConfigError(f"on_risk={on_risk!r}", accepted=", ".join(get_args(OnRisk)))
        if not 0.0 <= accepted_risk <= 1.0:
            raise ConfigError(f"accepted_risk={accepted_risk!r}", accepted="a probability from 0 to 1")
        self._plan = plan
        self._planned = self.numerics = plan()
        self.policy = load_policy(self.numerics.policy)
        if isinstance(self.policy, Invariant):
            check_invariant(source.config)
        self.tokenizer = tokenizer
        self.on_risk = on_risk
        self.accepted_risk = accepted_risk
        self.app = app
        self.store = store
        self._source = source
        self._start_engine = start
        self._identity = source.identity
        self._engine: Engine | None = None
        self._checks: dict[tuple[str, str, Shape], SelfCheck] = {}
        self._calibrations: dict[tuple[str, str], Calibration | None] = {}
        self._kept: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        self._times_kept = 0
        # the caller's own processors and criteria by their cache keys: a stored request knows the keys alone
        self._processors: dict[str, Any] = {}
        self._criteria: dict[str, Callable[[int], Any]] = {}
        self._told: set[str] = set()
        self.passthrough: Any = None
        """The transformers model of a client by name, where a call was handed to it."""
        self._asked = lru_cache(maxsize=65536)(self._ask)
        self._budgets: dict[tuple[int, tuple[int, ...]], GenerationParams] = {}

    # -- asking ------------------------------------------------------------------------------------------------

    @overload
    def complete(self, prompts: str, *, progress: Progress | None = None, **params: Any) -> Completion: ...
    @overload
    def complete(
        self, prompts: Sequence[str], *, progress: Progress | None = None, **params: Any
    ) -> list[Completion]: ...

    def complete(
        self, prompts: str | Sequence[str], *, progress: Progress | None = None, **params: Any
    ) -> Completion | list[Completion]:
        """Return the completion of a prompt, or those of several in their order; equal ones are computed once.

        ``params``: ``max_new_tokens`` (tokens, 64 unless given), ``eos_token_id`` (the model's unless given), and what
        else ``stablegen.core.params.SUPPORTED`` names, with transformers' meaning. With ``do_sample=True`` a ``seed``, or
        one for each prompt, makes an answer a function of the request; without one it is drawn and nothing is cached.
        ``sample_index`` tells several samples of one prompt and seed apart.
        Bad input raises before anything runs. Where a part fails later, or a hit may not be served
        (``on_risk="raise"``), the rest is done and cached first; the error's ``completions`` hold it.
        """
        self._notice_changes()
        if isinstance(prompts, str):
            parameters, seeded = self._seeded(self._params(params))
            return self._run([self._asked(check_prompt(prompts), parameters)], progress, cached=seeded)[0]
        items: Any = prompts
        if not isinstance(items, Sequence) or isinstance(items, bytes):
            check_prompt(items)
        seeds = params.get("seed")
        if isinstance(seeds, Sequence):
            check_seeds(seeds, len(prompts))
            drawn = [(check_seeded(self._params(params | {"seed": seed})), True) for seed in seeds]
        else:
            shared = self._params(params)
            drawn = [self._seeded(shared) for _ in prompts]
        asked = [
            self._asked(check_prompt(prompt), parameters)
            for prompt, (parameters, _) in zip(prompts, drawn, strict=True)
        ]
        return self._run(asked, progress, cached=all(seeded for _, seeded in drawn))

    @overload  # a text is a sequence of texts too, and is told apart first
    def score(  # type: ignore[overload-overlap]
        self, prompts: str, continuations: str, *, progress: Progress | None = None
    ) -> Score: ...
    @overload
    def score(
        self,
        prompts: Sequence[str | Sequence[int]],
        continuations: Sequence[str | Sequence[int]],
        *,
        progress: Progress | None = None,
    ) -> list[Score]: ...

    def score(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        continuations: str | Sequence[str | Sequence[int]],
        *,
        progress: Progress | None = None,
    ) -> Score | list[Score]:
        """Return how probable a continuation is after its prompt, or those of several pairs in their order.

        Pairs are texts, which are tokenized together, or lists of token ids. Log-probabilities are natural and
        float32, computed by the client's policy, and cached; equal pairs are computed once. A prompt has at least one
        token, prompt and continuation at most one more than the model's context. Raises as ``complete`` does.
        """
        self._notice_changes()
        if isinstance(prompts, str):
            if not isinstance(continuations, str):
                raise PromptError("score was given one prompt and no one text to continue it", accepted="two texts")
            return self.score([prompts], [continuations], progress=progress)[0]
        if not all(isinstance(given, Sequence) and not isinstance(given, str) for given in (prompts, continuations)):
            raise PromptError("score was given what is no list", accepted="two texts, or two lists of as many")
        if len(prompts) != len(continuations):
            raise PromptError(
                f"score was given {len(prompts)} prompts and {len(continuations)} continuations", accepted="as many"
            )
        requests = [self._pair(*pair) for pair in zip(prompts, continuations, strict=True)]
        found = self._run([(request.key, request) for request in requests], progress)
        return [Score(one.record, one.cached, one.verdict) for one in found]

    def _pair(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Request:
        """Return the request to score a continuation."""
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise PromptError("a prompt and its continuation are of two kinds", accepted="two texts, or two lists")
        if isinstance(prompt, str):
            ids = self.tokenizer.split(check_prompt(prompt), check_prompt(continuation))
        else:
            ids = check_ids(prompt), check_ids(continuation)
        if not ids[1]:
            raise PromptError("a continuation has no tokens", accepted="at least one token")
        params = GenerationParams(max_new_tokens=len(ids[1]))
        request = Request(ids[0], params, self._identity, self.tokenizer.digest, text, ids[1])
        return check_fits(request, self._source.context, self._source.vocabulary)

    def request(self, prompt: str, **params: Any) -> Request:
        """Return the request that ``complete`` would make of a prompt; raise the same errors for bad input."""
        self._notice_changes()
        parameters = self._params(params)
        return self._asked(check_prompt(prompt), check_seeded(parameters))[1]

    def run(
        self,
        requests: Iterable[Request],
        *,
        progress: Progress | None = None,
        cached: bool = True,
        listen: Listener | None = None,
    ) -> list[Completion]:
        """Return the completions of requests made by ``request`` or ``make_request``, in their order.

        ``cached=False``: nothing is read from the cache nor kept. ``listen`` hears what is generated. Raises
        ``InvalidRequestError`` for a request that was made for another model or tokenizer.
        """
        self._notice_changes()
        fitting = [self.check_mine(request) for request in requests]
        return self._run([(request.key, request) for request in fitting], progress, cached=cached, listen=listen)

    @overload  # a record is a tuple, and is told apart first
    def verify(  # type: ignore[overload-overlap]
        self,
        answers: str | Record | Completion,
        *,
        repair: bool = False,
        from_scratch: bool = False,
        progress: Progress | None = None,
    ) -> Verification: ...
    @overload
    def verify(
        self,
        answers: Sequence[str | Record | Completion],
        *,
        repair: bool = False,
        from_scratch: bool = False,
        progress: Progress | None = None,
    ) -> list[Verification]: ...

    def verify(
        self,
        answers: str | Record | Completion | Sequence[str | Record | Completion],
        *,
        repair: bool = False,
        from_scratch: bool = False,
        progress: Progress | None = None,
    ) -> Verification | list[Verification]:
        """Hold a cached answer, or several, against what a run gives today; ``repair`` puts that in their place.

        ``answers``: keys, records or completions. Under ``invariant`` one pass over prompt and answer settles it, all
        answers together, and only what follows the first differing step is generated anew. Under ``single`` and
        ``padded:N`` an answer of other numerics is replayed up to its last step whose risk is not negligible, and
        recomputed where it parts before. Otherwise, and with ``repair`` or ``from_scratch``, answers are recomputed.
        The fresh record equals a fresh generation's bit for bit. Raises
        ``RecordNotFoundError`` for an unknown key, ``InvalidRequestError`` for another model's answer, and what
        ``complete`` raises.
        """
        self._notice_changes()
        if isinstance(answers, (str, Record, Completion)):
            return self.verify([answers], repair=repair, from_scratch=from_scratch, progress=progress)[0]
        records = [self._record_of(answer) for answer in answers]
        hits = {record.key: record for record in records}
        requests = {key: self.check_mine(record.request) for key, record in hits.items()}
        work = _Work(requests, hits, proves=not from_scratch, keeps=repair)
        results: dict[str, Completion] = {}
        settled: dict[str, Verdict] = {}
        with self._lock:
            try:
                self._start()
                if work.proves and not repair and self.policy.promises and not isinstance(self._engine, ForcingEngine):
                    settled = self._replay(work)
                    work.requests = {key: asked for key, asked in work.requests.items() if key not in settled}
                self._compute(work, results, progress)
            except StablegenError as error:
                work.fail(error)
        work.check(results)
        found = []
        for record in records:
            if record is hits[record.key] and record.key in settled:
                found.append(Verification(record, None, settled[record.key]))
                continue
            done, verdict = results[record.key], results[record.key].verdict
            if record is not hits[record.key]:  # another answer to the same request
                check = self._check(self._identity, done.record.numerics, done.record.composition.shape)
                verdict = compare(record, done.record, check=check)
            found.append(Verification(record, done.record, verdict))
        return found

    def calibrate(
        self,
        answers: Sequence[str | Record | Completion],
        *,
        sizes: Sequence[int] = CALIBRATION_SIZES,
        progress: Progress | None = None,
    ) -> list[Calibration]:
        """Measure how far margins move from the numerics of these answers to this client's; judge by it from then on.

        ``answers``: keys, records or completions, whose tokens are scored again as they stand. Under ``native`` they
        are run in batches of each of the ``sizes``, for it promises nothing of any. Returns a calibration for each
        numerics among the answers that has steps enough; the cache keeps them. Raises ``CalibrationError`` where none
        has, and what ``verify`` raises.
        """
        self._notice_changes()
        groups: dict[str, dict[str, Record]] = {}
        for record in map(self._record_of, answers):
            self.check_mine(record.request)
            if record.trace and not record.request.continuation:
                groups.setdefault(record.numerics.digest, {})[record.key] = record
        rounds = 1 if self.policy.promises else len(sizes)
        total, done = rounds * sum(map(len, groups.values())), 0
        failure = CalibrationError("no answer with a trace to calibrate by", hint="Generate some first")
        if not groups:
            raise failure
        found = []
        with self._lock:
            self._start()
            for group in map(list, map(dict.values, groups.values())):
                pairs = []
                with closing(self._led_along(group, sizes)) as led:
                    for old, trace in led:
                        assert old.trace is not None
                        pairs.append((old.trace, trace))
                        done += 1
                        if progress is not None:
                            progress(done, total)
                recorded, current = group[0].numerics, self.numerics_for(group[0].request)
                try:
                    made = fit(self._identity, recorded, current, pairs, prompts=len(group))
                except CalibrationError as error:
                    failure = error
                    log.info("answers of %s do not calibrate: %s", recorded.summary(), error)
                    continue
                name = calibration_name(self._identity, recorded, current)
                self.store.put_calibration(name, made)
                self._calibrations[self._identity.canonical, recorded.digest] = made
                found.append(made)
        if not found:
            raise failure
        return found

    def calibrate_from(
        self, source: Client, prompts: Sequence[str], *, max_new_tokens: int, progress: Progress | None = None
    ) -> list[Calibration]:
        """Let ``source``, another client of the same model, answer prompts, and ``calibrate`` by its answers.

        A source that promises nothing answers one prompt after the other: what company does is this client's to show.
        """
        total = 2 * len(prompts)

        def report(count: int) -> None:
            if progress is not None:
                progress(count, total)

        if source.policy.promises:
            answers = source.complete(prompts, progress=lambda count, _: report(count), max_new_tokens=max_new_tokens)
        else:
            answers = []
            for prompt in prompts:
                answers.append(source.complete(prompt, max_new_tokens=max_new_tokens))
                report(len(answers))
        return self.calibrate(answers, progress=lambda count, of: report(len(prompts) * (of + count) // of))

    def _led_along(
        self, records: Sequence[Record], sizes: Sequence[int], observe: RowObserver | None = None
    ) -> Generator[tuple[Record, Trace], None, None]:
        """Yield records, each with what this client's engine would have chosen at each of its steps.

        ``observe`` sees the score row of each step.
        """
        engine = self._engine
        if isinstance(engine, ForcingEngine):
            answers = [(self.check_mine(record.request), record.token_ids) for record in records]
            seen = None if observe is None else lambda slot, row: observe(records[slot].key, row)
            with closing(engine.force(answers, seen)) as forced:
                for place, trace in forced:
                    yield records[place], trace
            return
        assert isinstance(engine, FollowingEngine)
        by_key = {record.key: record for record in records}
        requests = [self.check_mine(record.request) for record in records]
        if self.policy.promises:
            batches = [(batch, 0) for batch in self.policy.plan(requests, engine.limits)]
        else:
            batches = [batch for size in sizes for batch in _full_batches(requests, size)]
        for batch, known in batches:
            along = {slot: by_key[request.key].token_ids for slot, request in batch.requests}
            company = {request.key for slot, request in batch.requests if slot < known}
            keys = {slot: request.key for slot, request in batch.requests}
            seen = None if observe is None else lambda slot, row, keys=keys: observe(keys[slot], row)
            with closing(engine.follow(batch, along, seen)) as followed:
                for generated in followed:
                    if generated.request.key not in company:
                        yield by_key[generated.request.key], generated.trace

    def score_rows(self, completions: Iterable[Completion]) -> dict[str, list[torch.Tensor]]:
        """Return each answer's full score rows by its key: of each step the model's own [V] float32, on the device.

        They are not cached, but computed along the answer under the client's numerics.
        """
        self._notice_changes()
        records = list({one.key: one.record for one in completions}.values())
        if any(record.request.continuation for record in records):
            raise InvalidRequestError("score rows of a scored continuation", accepted="those of generated answers")
        rows: dict[str, list[torch.Tensor]] = {record.key: [] for record in records}
        with self._lock:
            self._start()
            sizes = () if self.policy.promises else (len(records),)
            with closing(self._led_along(records, sizes, lambda key, row: rows[key].append(row.clone()))) as led:
                for _ in led:
                    pass
        return rows

    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **arguments: Any) -> Any:
        """Generate as transformers' ``model.generate`` does, with the same arguments and the same kinds of result.

        Besides them: ``seed`` (one, or one a row) and ``sample_index`` for sampling, and ``unsupported``: what happens
        to arguments whose answers no policy makes stable, ``"raise"`` ``UnsupportedParameterError`` (the default) or
        ``"passthrough"``, which hands the call to transformers, uncached. README lists every argument. An output asked
        for by ``return_dict_in_generate`` has ``completions``, which carry records and verdicts.
        """
        from stablegen.hf.generate import generate

        self._notice_changes()
        return generate(self, inputs, generation_config, **arguments)

    def make_request(
        self,
        prompt_ids: Sequence[int],
        arguments: Mapping[str, Any],
        *,
        logits_processors: Mapping[str, Any] = _NOTHING,
        stopping_criteria: Mapping[str, Callable[[int], Any]] = _NOTHING,
    ) -> Request:
        """Return the request for prompt token ids and a caller's generation arguments.

        ``logits_processors`` and ``stopping_criteria``: the caller's own by their cache keys, the latter as what makes
        one for a prompt of so many tokens.
        """
        self._processors |= logits_processors
        self._criteria |= stopping_criteria
        own = {"logits_processors": tuple(logits_processors), "stopping_criteria": tuple(stopping_criteria)}
        params = self._params({**arguments, **{name: keys for name, keys in own.items() if keys}})
        return Request(
            tuple(prompt_ids),
            params,
            self._identity,
            self.tokenizer.digest,
            logits_processors=tuple(logits_processors.values()),
            stopping_criteria=tuple(stopping_criteria.values()),
        )

    def tell_once(self, subject: str, message: str) -> None:
        """Warn that something is not cached, once of each subject."""
        if subject not in self._told:
            self._told.add(subject)
            warnings.warn(message, UncachedWarning, stacklevel=4)

    @property
    def source(self) -> ModelSource:
        """Return the model as it can be asked about."""
        return self._source

    # -- looking -----------------------------------------------------------------------------------------------

    def inspect(self, key: str) -> Record:
        """Return the record under a key; raise ``RecordNotFoundError`` where there is none."""
        record = self.store.get(key)
        if record is None:
            raise RecordNotFoundError(
                f"no record under the key {key!r} in {self.store.path}",
                accepted="a completion's key, 64 hexadecimal digits",
                hint="`stablegen cache export` lists all of them",
            )
        return record

    def find_key(self, start: str) -> str:
        """Return the one key that begins with ``start``; raise ``RecordNotFoundError`` where none or several do."""
        found = self.store.keys(start)
        if len(found) != 1:
            raise RecordNotFoundError(
                f"{len(found) or 'no'} record(s) under keys that begin with {start!r} in {self.store.path}",
                accepted="a completion's key, or enough of its first digits",
                hint="`stablegen cache export` lists all of them",
            )
        return found[0]

    def token_text(self, record: Record) -> Callable[[int], str]:
        """Return how to show a record's token ids: as text where this client has the record's tokenizer."""
        if record.request.tokenizer == self.tokenizer.digest:
            return lambda token: repr(self.tokenizer.token(token))
        return str

    def judge(self, record: Record) -> Verdict:
        """Return the guard's verdict on a record under this client's numerics."""
        check, calibration, current = None, None, self.numerics_for(record.request)
        if record.numerics.digest == current.digest:  # of others no promise is asked
            check = self._check(record.request.model, current, record.composition.shape)
        if check is None or not check.passed or record.composition.slot:
            calibration = self.calibration(record)
        return judge(record, current, check=check, accepted_risk=self.accepted_risk, calibration=calibration)

    def numerics_for(self, request: Request) -> Numerics:
        """Return the numerics under which this client would answer a request."""
        return processed(self.numerics) if request.params.processed else self.numerics

    def calibration(self, record: Record) -> Calibration | None:
        """Return what was measured of the noise between a record's numerics and this client's, with its model."""
        pair = record.request.model.canonical, record.numerics.digest
        try:
            return self._calibrations[pair]
        except KeyError:
            name = calibration_name(record.request.model, record.numerics, self.numerics_for(record.request))
            found = self._calibrations[pair] = self.store.get_calibration(name)
            return found

    def warnings(self) -> list[FlaggedHit]:
        """Return the hits that were flagged, oldest first."""
        return self.store.flagged()

    def self_check(self) -> SelfCheck:
        """Load the engine and return what its policy keeps of its promise here, measured now.

        Every shape is measured when it is first used; this measures the smallest.
        """
        with self._lock:
            self._start()
            assert self._engine is not None
            work = _Work()
            check = self._measure(self.numerics, self.policy.shape(1, 1, self._engine.limits), work)
            if work.failure is not None:
                raise work.failure
            return check

    def close(self) -> None:
        """Release the cache and the model."""
        self._engine = None
        self.store.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled: a copy would go on with the engine and the files of this one."""
        raise ModelError(
            "a client, and with it a stabilized model, cannot be copied or pickled",
            hint="Make a client of its own for the copy; of a model, call stablegen.restore(model) first",
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record_of(self, answer: str | Record | Completion) -> Record:
        if isinstance(answer, Completion):
            return answer.record
        return answer if isinstance(answer, Record) else self.inspect(answer)

    @property
    def model_name(self) -> str:
        """Return what the caller called the model."""
        return self._identity.name

    def answers_for(self, record: Record) -> bool:
        """Return whether a record's request is one that this client, with its model and tokenizer, could answer."""
        try:
            self.check_mine(record.request)
        except InvalidRequestError:
            return False
        return True

    def check_mine(self, request: Request) -> Request:
        """Return a request; raise ``InvalidRequestError`` where it does not fit, or was made for another model."""
        check_fits(request, self._source.context, self._source.vocabulary)
        check_seeded(request.params)
        if request.model.identity != self._identity.identity or request.tokenizer != self.tokenizer.digest:
            raise InvalidRequestError(
                f"a request was made for {request.model.name!r}, not for {self._identity.name!r} as it is now",
                accepted="requests made by this client's request() or make_request()",
            )
        return request if request.complete else self._completed(request)

    def _completed(self, request: Request) -> Request:
        """Return a stored request with the caller's own processors and criteria that its parameters name."""
        params = request.params
        unknown = [key for key in params.logits_processors if key not in self._processors]
        unknown += [key for key in params.stopping_criteria if key not in self._criteria]
        if unknown:
            raise InvalidRequestError(
                f"a request was made with processors or criteria of the caller's own, by their cache keys "
                f"{', '.join(unknown)}, which this client has not seen",
                hint="Generate with them once, then it knows them",
            )
        return replace(
            request,
            logits_processors=tuple(self._processors[key] for key in params.logits_processors),
            stopping_criteria=tuple(self._criteria[key] for key in params.stopping_criteria),
        )

    # -- one request's way -------------------------------------------------------------------------------------

    def _notice_changes(self) -> None:
        """Take a model object that was changed or moved for another: other keys or numerics, a new engine."""
        identity, planned = self._source.identity, self._plan()
        if identity is not self._identity:
            self._identity, self._engine = identity, None
            self._asked.cache_clear()
        if planned is not self._planned and planned != self._planned:
            self._planned = self.numerics = planned
            self._engine = None
            self._checks.clear()
            self._calibrations.clear()

    def _params(self, arguments: dict[str, Any]) -> GenerationParams:
        budget, ends = arguments.get("max_new_tokens"), self._source.eos_token_ids
        if len(arguments) != 1 or type(budget) is not int:
            made = GenerationParams.from_arguments(arguments, eos_token_ids=ends)
            if made.stop_strings:
                self.tokenizer.check_texts()
            return made
        params = self._budgets.get((budget, ends))
        if params is None:
            params = GenerationParams.from_arguments(arguments, eos_token_ids=ends)
            self._budgets[budget, ends] = params
        return params

    def _seeded(self, params: GenerationParams) -> tuple[GenerationParams, bool]:
        """Return parameters with a seed where they want one, and whether the caller gave it."""
        if not params.do_sample or params.seed is not None:
            return params, True
        self.tell_once("seed", NO_SEED)
        return params.model_copy(update={"seed": secrets.randbits(63)}), False

    def _ask(self, prompt: str, params: GenerationParams) -> tuple[str, Request]:
        request = Request(self.tokenizer.encode(prompt), params, self._identity, self.tokenizer.digest, prompt)
        check_fits(request, self._source.context, self._source.vocabulary)
        return request.key, request

    def _run(
        self,
        asked: list[tuple[str, Request]],
        progress: Progress | None,
        *,
        cached: bool = True,
        listen: Listener | None = None,
    ) -> list[Completion]:
        results: dict[str, Completion] = {}
        kept = self._times_kept
        work = self._look_up(asked, results) if cached else _Work(dict(asked), keeps=False)
        if work.requests:
            with self._lock:
                try:
                    if self._start() and cached:
                        # the device is not what its metadata said: what was judged has to be judged again
                        results.clear()
                        work = self._look_up(asked, results)
                    elif self._times_kept != kept and cached:
                        # another thread has computed meanwhile, and maybe what is missing here
                        before = work
                        work = self._look_up([(key, request) for key, request in before.requests.items()], results)
                        work.failure = before.failure or work.failure
                    work.listen = listen
                    self._compute(work, results, progress)
                except StablegenError as error:
                    work.fail(error)
        work.check(results)
        return [results[key] for key, _ in asked]

    def _look_up(self, asked: list[tuple[str, Request]], results: dict[str, Completion]) -> _Work:
        work = _Work(proves=self.on_risk == "verify")
        for key, request in asked:
            if key in results or key in work.requests:
                continue
            record = self.store.get(key)
            if record is None:
                work.requests[key] = request
                continue
            verdict = self.judge(record)
            if verdict.flagged:
                self._flag(record, verdict, work)
                if self.on_risk == "raise":
                    work.fail(
                        DivergenceRiskError(
                            f"the cached answer of {_shown(record)} is {verdict.status}: {self._describe(verdict)}",
                            key=key,
                            verdict=verdict,
                            hint="Recompute it with on_risk='recompute', or accept it with on_risk='serve'",
                        )
                    )
                    continue
                if self.on_risk in ("verify", "recompute"):
                    work.requests[key], work.hits[key] = request, record
                    continue
            results[key] = Completion(record, cached=True, verdict=verdict)
        self._note(work)
        return work

    def _compute(self, work: _Work, results: dict[str, Completion], progress: Progress | None) -> None:
        assert self._engine is not None
        total = len(results) + len(work.requests)
        report = None if progress is None else lambda count: progress(count, total)
        for requests, check in self._by_shape(work):
            missing = requests
            if work.proves and check.passed and isinstance(self._engine, ForcingEngine):
                # one pass over an answer says what a fresh run gives; a continuation is one pass as it is
                proves = [request.key in work.hits and not request.continuation for request in requests]
                there = list(compress(requests, proves))
                answers = [(request, work.hits[request.key].token_ids) for request in there]
                self._collect(regenerate(self._engine, answers), work, results, report, how=ONE_PASS)
                missing = [request for request, proved in zip(requests, proves, strict=True) if not proved]
            for batch in self.policy.plan(missing, replace(self._engine.limits, slot_free=check.slot_free)):
                self._collect(self._engine.generate(batch, None, _heard(work.listen, batch)), work, results, report)

    def _by_shape(self, work: _Work) -> Iterator[tuple[list[Request], SelfCheck]]:
        """Yield what is to be computed by the shape in which it runs, each measured before."""
        assert self._engine is not None
        limits = self._engine.limits
        shapes: dict[tuple[bool, Shape], list[Request]] = {}
        for request in work.requests.values():
            kind = request.params.processed, self.policy.shape_of(request, limits)
            shapes.setdefault(kind, []).append(request)
        for (_, shape), requests in shapes.items():
            numerics = self.numerics_for(requests[0])
            yield requests, self._check(self._identity, numerics, shape) or self._measure(numerics, shape, work)

    def _replay(self, work: _Work) -> dict[str, Verdict]:
        """Return a verdict for each hit whose fragile steps, decoded again in their own shapes, gave its tokens."""
        assert self._engine is not None
        steps: dict[str, tuple[int, float]] = {}
        for key, hit in work.hits.items():
            current = self.numerics_for(hit.request)
            if hit.request.continuation or not hit.whole:
                continue
            if hit.trace and hit.numerics.digest != current.digest:
                risks = flip_probabilities(hit.trace, hit.numerics, current, self.calibration(hit))
                count, rest = fragile_steps(risks)
                if count < len(hit.trace):
                    steps[key] = max(count, 1), rest
        settled: dict[str, Verdict] = {}
        for requests, check in self._by_shape(work):
            short = [request for request in requests if request.key in steps]
            for batch in self.policy.plan(short, replace(self._engine.limits, slot_free=check.slot_free)):
                rows = tuple(None if row is None else row.limited_to(steps[row.key][0]) for row in batch.rows)
                for generated in self._engine.generate(replace(batch, rows=rows)):
                    asked = batch.rows[generated.composition.slot]
                    assert asked is not None
                    count, rest = steps[asked.key]
                    if generated.trace.tokens == work.hits[asked.key].token_ids[:count]:
                        settled[asked.key] = Verdict(
                            status="stable",
                            probability=rest,
                            basis="verified",
                            reason=f"replayed up to step {count - 1}: same tokens; no margin beyond is narrow enough",
                        )
        return settled

    def _collect(
        self,
        finishing: Generator[Generated, None, None],
        work: _Work,
        results: dict[str, Completion],
        report: Callable[[int], None] | None,
        *,
        how: str = "recomputed",
    ) -> None:
        """Record requests as they finish; where some fail, or all is interrupted, keep what is finished."""
        fresh: list[Record] = []
        kept = time.monotonic()
        try:
            for generated in finishing:
                fresh.append(self._record(generated, work))
                if report is not None:
                    report(len(results) + len(fresh))
                if time.monotonic() - kept > KEEP_EVERY:
                    self._keep(fresh, work, results, how)
                    fresh, kept = [], time.monotonic()
        except (EngineError, DeviceError) as error:
            work.fail(error)
        finally:
            finishing.close()  # an error that is kept keeps it alive
            self._keep(fresh, work, results, how)

    def _record(self, generated: Generated, work: _Work) -> Record:
        request = generated.request
        record = Record(
            key=request.key,
            request=request,
            text=self.tokenizer.decode(request.continuation or generated.trace.tokens),
            finish_reason=generated.finish_reason,
            trace=generated.trace,
            numerics=self.numerics_for(request),
            composition=generated.composition,
            created=time.time(),
            seconds=generated.seconds,
            logprobs=generated.logprobs,
            app=self.app,
        )
        return record.superseding(work.hits.get(record.key))

    def _keep(self, fresh: list[Record], work: _Work, results: dict[str, Completion], how: str) -> None:
        for record in fresh:
            old = work.hits.get(record.key)
            if old is None:
                verdict, stands = self.judge(record), False
            else:
                check = self._check(self._identity, record.numerics, record.composition.shape)
                verdict = compare(old, record, check=check, how=how)
                if verdict.flagged or self.judge(old).flagged:
                    work.flagged.append(self._hit(old, verdict))
                stands = self.on_risk == "verify" and not verdict.flagged
            results[record.key] = Completion(record, cached=stands, verdict=verdict)
        self._note(work)
        try:
            if fresh and work.keeps:
                self.store.put(fresh)
                self._times_kept += 1
        except CacheWriteError as error:
            work.fail(error)

    # -- engine and promise ------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Load the engine if need be; return whether its numerics are other than planned."""
        if self._engine is None:
            self._engine = self._start_engine(self.numerics)
            if self._engine.numerics != self.numerics:
                log.warning("numerics are not as planned: %s", self.numerics.differences(self._engine.numerics))
                self.numerics = self._engine.numerics
                self._checks.clear()
                self._calibrations.clear()
                return True
        return False

    def _check(self, model: ModelIdentity, numerics: Numerics, shape: Shape) -> SelfCheck | None:
        """Return what is known of the policy's promise under numerics of the client's with a model."""
        place = model.canonical, numerics.digest, shape
        check = self._checks.get(place)
        if check is None:
            check = self.store.get_check(check_name(model, numerics, shape))
            if check is not None:
                self._checks[place] = check
        return check

    def _measure(self, numerics: Numerics, shape: Shape, work: _Work) -> SelfCheck:
        from stablegen.engine.self_check import self_check

        assert self._engine is not None
        check = self_check(self._engine, self._source.vocabulary, *shape, processed=numerics is not self.numerics)
        if self.policy.promises:
            try:
                self.store.put_check(check_name(self._identity, numerics, shape), check)
            except CacheWriteError as error:
                work.fail(error)
            if not check.passed:
                warnings.warn(
                    f"policy {self.policy} does not keep its promise on this machine, so nothing is judged exact "
                    f"under it: {check.checks}. `stablegen doctor` shows the details",
                    PromiseWarning,
                    stacklevel=2,
                )
        self._checks[self._identity.canonical, numerics.digest, shape] = check
        return check

    # -- flagged hits ------------------------------------------------------------------------------------------

    def _flag(self, record: Record, verdict: Verdict, work: _Work) -> None:
        text = f"cached answer of {_shown(record)} is {verdict.status}: {self._describe(verdict)}"
        log.info("%s (key %s)", text, record.key)
        seen = record.key, self.numerics.digest
        if seen not in self._kept:
            work.flagged.append(self._hit(record, verdict))
            self._kept.add(seen)
        if self.on_risk != "serve":
            warnings.warn(text, MarginWarning, stacklevel=5)

    def _hit(self, record: Record, verdict: Verdict) -> FlaggedHit:
        """Return a flagged hit as the store keeps it, with the two tokens as text."""
        current = self.numerics_for(record.request)
        return FlaggedHit(
            key=record.key,
            app=self.app,
            prompt=record.request.prompt or self.tokenizer.decode(record.request.prompt_ids),
            verdict=verdict,
            token=None if verdict.token is None else self.tokenizer.token(verdict.token),
            runner_up=None if verdict.runner_up is None else self.tokenizer.token(verdict.runner_up),
            recorded=record.numerics.summary(),
            recorded_digest=record.numerics.digest,
            current=current.summary(),
            current_digest=current.digest,
            seen=time.time(),
        )

    def _note(self, work: _Work) -> None:
        """Keep the flagged hits of a call in the store."""
        try:
            if work.flagged:
                self.store.flag(work.flagged)
        except CacheWriteError as error:
            work.fail(error)
        work.flagged.clear()

    def _describe(self, verdict: Verdict) -> str:
        if verdict.step is None or verdict.token is None or verdict.runner_up is None:
            return verdict.reason
        first, second = self.tokenizer.token(verdict.token), self.tokenizer.token(verdict.runner_up)
        chance = "" if verdict.probability is None else f", probability of divergence {verdict.probability:.3g}"
        margin = "" if verdict.margin is None else f", margin {verdict.margin:.3g}"
        return f"step {verdict.step}, {first!r} against {second!r}{margin}{chance} ({verdict.basis}); {verdict.reason}"


def _full_batches(requests: Sequence[Request], size: int) -> Iterator[tuple[Batch, int]]:
    """Yield batches of a size, each with how many of its first rows were in the batch before.

    What is left over at the end is a batch of that size too, for noise depends on it; fewer only where there are fewer.
    """
    for start in range(0, len(requests), size):
        first = max(0, min(start, len(requests) - size))
        yield Batch(tuple(requests[first : first + size])), start - first


def _heard(listen: Listener | None, batch: Batch) -> Callable[[int, int, Sequence[int]], None] | None:
    """Return what hears a batch by slot, for one that hears by key."""
    if listen is None:
        return None
    keys = {slot: request.key for slot, request in batch.requests}
    return lambda slot, step, tokens: listen(keys[slot], step, tokens)


def check_name(model: ModelIdentity, numerics: Numerics, shape: Shape) -> str:
    """Return under which name the store keeps the self-check of a shape."""
    scored = [] if shape.scored is None else ["scored", str(shape.scored)]
    capacity = [] if shape.capacity is None else [str(shape.capacity)]
    return ":".join((numerics.digest, *model.identity.values(), str(shape.width), *capacity, *scored))


def calibration_name(model: ModelIdentity, recorded: Numerics, current: Numerics) -> str:
    """Return under which name the store keeps what was measured between two numerics."""
    return ":".join((*model.identity.values(), recorded.digest, current.digest))


def _shown(record: Record) -> str:
    return f"{record.request.prompt!r:.60}" if record.request.prompt else f"{record.key[:12]}"


def check_ids(ids: Any) -> tuple[int, ...]:
    """Return token ids as a tuple; raise ``PromptError`` for anything but whole numbers."""
    if not isinstance(ids, Sequence) or not all(
        isinstance(index, int) and not isinstance(index, bool) for index in ids
    ):
        raise PromptError(f"token ids are {ids!r:.80}", accepted="a list of whole numbers")
    return tuple(ids)


def check_seeded(params: GenerationParams) -> GenerationParams:
    """Return parameters; raise ``ParameterError`` where they sample without a seed."""
    if params.do_sample and params.seed is None:
        raise ParameterError("a sampled request has no seed", accepted="do_sample=True with a seed")
    return params


def check_seeds(seeds: Sequence[Any], rows: int) -> None:
    """Raise ``ParameterError`` where seeds given one by one are not as many as what they are for."""
    if isinstance(seeds, str) or len(seeds) != rows:
        raise ParameterError(f"seed={seeds!r:.60} for {rows} rows", accepted="one seed, or one for each row")


def open_store(cache_dir: str | Path | None, size_limit: int | None) -> Store:
    """Return the store in a directory; None means the user's own cache folder."""
    check_size("size_limit", size_limit)
    from stablegen.store.disk import DiskStore

    return DiskStore(cache_path(cache_dir), size_limit=size_limit)


def cache_path(cache_dir: str | Path | None) -> Path:
    """Return the cache's directory; None means the user's own cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("stablegen")


def check_size(name: str, size: int | None) -> None:
    """Raise ``ConfigError`` for a number of bytes that is none."""
    if size is not None and (isinstance(size, bool) or size < 1):
        raise ConfigError(f"{name}={size!r}", accepted="a positive number of bytes, or None for the default")
