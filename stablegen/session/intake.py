"""Turn the caller's input into requests, or refuse it with a named error."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from stablegen.core.bounded import Bounded
from stablegen.core.caller import warn
from stablegen.core.params import GenerationParams
from stablegen.core.request import ModelIdentity, Request, check_fits, check_prompt
from stablegen.errors import InvalidRequestError, ParameterError, PromptError, UncachedWarning
from stablegen.sources.base import Source

KNOWN_PROMPTS = 16384
"""The most requests that are kept in memory, by prompt and parameters."""
KNOWN_OBJECTS = 256
"""The most logits processors, and stopping criteria, of the caller's own that are kept, by cache key."""
NO_SEED = (
    "a sampled request has no seed: its answer is drawn anew every time and is not cached. Give a seed to make it "
    "repeatable and cached"
)
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class CallersOwn:
    """The caller's own processors and criteria by their cache keys, and the warnings already given.

    A stored request holds only the keys. The most recently used objects are kept.
    """

    def __init__(self) -> None:
        self.processors: Bounded[str, Any] = Bounded(KNOWN_OBJECTS)
        self.criteria: Bounded[str, Callable[[int], Any]] = Bounded(KNOWN_OBJECTS)
        self._warned: Bounded[str, bool] = Bounded(KNOWN_OBJECTS)

    def warn_once(self, subject: str, message: str) -> None:
        """Warn that something is not cached, once for each subject."""
        if subject not in self._warned:
            self._warned[subject] = True
            warn(message, UncachedWarning)


class Intake:
    """Makes requests for one state of a model; a changed model gets a new intake."""

    def __init__(self, source: Source, identity: ModelIdentity, own: CallersOwn) -> None:
        self.identity = identity
        self._source = source
        self._tokenizer = source.tokenizer
        self._own = own
        self._remembered = lru_cache(maxsize=KNOWN_PROMPTS)(self._make)
        self._budgets: Bounded[tuple[int, tuple[int, ...]], GenerationParams] = Bounded(KNOWN_OBJECTS)

    def ask(self, prompt: object, params: GenerationParams) -> tuple[str, Request]:
        """Return the key and the request for a text prompt."""
        return self._remembered(check_prompt(prompt), params)

    def forget_prompts(self) -> None:
        """Forget the requests that are remembered by their prompts."""
        self._remembered.cache_clear()

    def _make(self, prompt: str, params: GenerationParams) -> tuple[str, Request]:
        request = Request(self._tokenizer.encode(prompt), params, self.identity, self._tokenizer.digest, prompt)
        self._check_fits(request)
        return request.key, request

    def ask_many(self, prompts: Any, arguments: Mapping[str, Any]) -> tuple[list[tuple[str, Request]], bool]:
        """Return the keys and requests for several prompts, and whether their answers may be cached."""
        if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
            check_prompt(prompts)
        seeds = arguments.get("seed")
        if isinstance(seeds, Sequence):
            check_seeds(seeds, len(prompts))
            drawn = [(check_seeded(self.params({**arguments, "seed": seed})), True) for seed in seeds]
        else:
            shared = self.params(arguments)
            drawn = [self.seeded(shared) for _ in prompts]
        asked = [self.ask(prompt, params) for prompt, (params, _) in zip(prompts, drawn, strict=True)]
        return asked, all(seeded for _, seeded in drawn)

    def params(self, arguments: Mapping[str, Any]) -> GenerationParams:
        """Return the parameters from a caller's arguments, with this model's end tokens."""
        budget, ends = arguments.get("max_new_tokens"), self._source.eos_token_ids
        if len(arguments) != 1 or type(budget) is not int:
            made = GenerationParams.from_arguments(arguments, eos_token_ids=ends)
            if made.stop_strings:
                self._tokenizer.check_texts()
            return made
        params = self._budgets.get((budget, ends))
        if params is None:
            params = GenerationParams.from_arguments(arguments, eos_token_ids=ends)
            self._budgets[budget, ends] = params
        return params

    def seeded(self, params: GenerationParams) -> tuple[GenerationParams, bool]:
        """Return parameters with a seed where they need one, and whether the caller gave it."""
        if not params.do_sample or params.seed is not None:
            return params, True
        self._own.warn_once("seed", NO_SEED)
        return params.model_copy(update={"seed": secrets.randbits(63)}), False

    def pairs(self, prompts: Any, continuations: Any) -> list[Request]:
        """Return the requests to score continuations after their prompts, two lists of equal length."""
        if not all(isinstance(given, Sequence) and not isinstance(given, str) for given in (prompts, continuations)):
            raise PromptError(
                f"score() was given {type(prompts).__name__} and {type(continuations).__name__}",
                accepted="two strings, or two lists of equal length",
            )
        if len(prompts) != len(continuations):
            raise PromptError(
                f"score() was given {len(prompts)} prompts and {len(continuations)} continuations",
                accepted="two lists of equal length",
            )
        return [self._pair(*pair) for pair in zip(prompts, continuations, strict=True)]

    def _pair(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Request:
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise PromptError(
                f"a prompt is of type {type(prompt).__name__}, its continuation of type {type(continuation).__name__}",
                accepted="two strings, or two lists of token ids",
            )
        if isinstance(prompt, str):
            ids = self._tokenizer.split(check_prompt(prompt), check_prompt(continuation))
        else:
            ids = check_ids(prompt), check_ids(continuation)
        if not ids[1]:
            raise PromptError("a continuation has no tokens", accepted="at least one token")
        params = GenerationParams(max_new_tokens=len(ids[1]))
        return self._check_fits(Request(ids[0], params, self.identity, self._tokenizer.digest, text, ids[1]))

    def make_request(
        self,
        prompt_ids: Sequence[int],
        arguments: Mapping[str, Any],
        *,
        logits_processors: Mapping[str, Any] = _NOTHING,
        stopping_criteria: Mapping[str, Callable[[int], Any]] = _NOTHING,
    ) -> Request:
        """Return the request for prompt token ids and arguments, with the caller's own objects by their cache keys."""
        for key, processor in logits_processors.items():
            self._own.processors[key] = processor
        for key, criterion in stopping_criteria.items():
            self._own.criteria[key] = criterion
        own = {"logits_processors": tuple(logits_processors), "stopping_criteria": tuple(stopping_criteria)}
        params = self.params({**arguments, **{name: keys for name, keys in own.items() if keys}})
        return Request(
            tuple(prompt_ids),
            params,
            self.identity,
            self._tokenizer.digest,
            logits_processors=tuple(logits_processors.values()),
            stopping_criteria=tuple(stopping_criteria.values()),
        )

    def validate(self, request: Request) -> Request:
        """Return a request; raise ``InvalidRequestError`` where it does not fit, or was made for another model."""
        self._check_fits(request)
        check_seeded(request.params)
        if request.model.identity != self.identity.identity or request.tokenizer != self._tokenizer.digest:
            raise InvalidRequestError(
                f"a request was made for {request.model.name!r}, not for {self.identity.name!r} in its present state",
                accepted="requests made by this client's request() or make_request()",
            )
        return request if request.complete else self._completed(request)

    def _completed(self, request: Request) -> Request:
        """Return a stored request with the caller's own processors and criteria that its parameters name."""
        processors = [self._own.processors.get(key) for key in request.params.logits_processors]
        criteria = [self._own.criteria.get(key) for key in request.params.stopping_criteria]
        named = [*request.params.logits_processors, *request.params.stopping_criteria]
        unknown = [key for key, own in zip(named, [*processors, *criteria], strict=True) if own is None]
        if unknown:
            raise InvalidRequestError(
                f"a request needs the caller's own logits processors or stopping criteria with the cache keys "
                f"{', '.join(unknown)}, and this client does not have them (it keeps the last {KNOWN_OBJECTS})",
                hint="Pass them to generate() or make_request() of this client once",
            )
        return replace(
            request,
            logits_processors=tuple(processors),
            stopping_criteria=tuple(one for one in criteria if one is not None),
        )

    def _check_fits(self, request: Request) -> Request:
        return check_fits(request, self._source.context, self._source.vocabulary)


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
    """Raise ``ParameterError`` where there are not as many seeds as rows."""
    if isinstance(seeds, str) or len(seeds) != rows:
        raise ParameterError(f"seed={seeds!r:.60} was given for {rows} rows", accepted="one seed, or one for each row")
