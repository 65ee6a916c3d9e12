"""The client: a thin face of a ``Session``, made from a source and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Unpack, overload

from stablegen.config import ClientSettings, Effective, load_settings
from stablegen.core.answer import Completion, Score, Verification
from stablegen.core.calibration import Calibration
from stablegen.core.numerics import Numerics
from stablegen.core.policy import ExecutionPolicy
from stablegen.core.record import Record
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.verdict import FlaggedHit, OnRisk, SelfCheck, Verdict
from stablegen.engine.base import Listener
from stablegen.errors import ConfigError, ModelError, PromptError
from stablegen.session import forcing
from stablegen.session.call import Progress
from stablegen.session.open import NAMED, open_session
from stablegen.session.session import Session
from stablegen.session.verification import VerifyOptions, verify
from stablegen.sources.base import Source
from stablegen.store.base import Store
from stablegen.store.cache import Cache
from stablegen.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

Answers = str | Record | Completion
"""How an answer in the cache may be given: by its key, its record or its completion."""


class Client:
    """A cached generation client with a determinism guard.

    ``Client(model, tokenizer)`` wraps a transformers model that is already loaded, ``Client(source)`` any ``Source``;
    ``Client.from_pretrained`` and ``Client.for_app`` open a checkpoint, loaded at the first miss. ``given`` are the
    arguments that ``ClientSettings`` describes. ``store`` holds the cache in place of a folder.

    Threads may share a client: a request that several make at once is computed once. A closed client raises
    ``ClientClosedError``. Raises a subclass of ``StablegenError`` for anything it cannot do.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        app: str | None = None,
        store: Store | None = None,
        settings: Effective | None = None,
        **given: Unpack[ClientSettings],
    ) -> None:
        if settings is not None and (app is not None or given):
            raise ConfigError("settings were given twice: resolved, and as arguments", accepted="one of them")
        settings = load_settings(app, **given) if settings is None else settings
        self.session: Session = open_session(model, tokenizer, settings, store)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        app: str | None = None,
        store: Store | None = None,
        **given: Unpack[ClientSettings],
    ) -> Client:
        """Return a client for a hub name, a directory, or (None) ``tiny-gpt2``; resolve the rest as ``Client`` does."""
        return cls.from_settings(load_settings(app, model=model, revision=revision, **given), store=store)

    @classmethod
    def for_app(cls, app: str) -> Client:
        """Return a client with the settings of an app from the configuration."""
        return cls.from_pretrained(app=app)

    @classmethod
    def from_settings(cls, settings: Effective, *, store: Store | None = None) -> Client:
        """Return a client for the model that already resolved settings name."""
        return cls(NAMED, settings=settings, store=store)

    # -- answering -----------------------------------------------------------------------------------------------

    @overload
    def complete(self, prompts: str, *, progress: Progress | None = None, **params: Any) -> Completion: ...
    @overload
    def complete(
        self, prompts: Sequence[str], *, progress: Progress | None = None, **params: Any
    ) -> list[Completion]: ...

    def complete(
        self, prompts: str | Sequence[str], *, progress: Progress | None = None, **params: Any
    ) -> Completion | list[Completion]:
        """Return the completion of a prompt, or those of several in their order; equal prompts are computed once.

        ``params``: ``max_new_tokens`` (tokens, 64 by default), ``eos_token_id`` (by default the model's), and the
        others of ``stablegen.core.params.SUPPORTED``, with transformers' meaning. With ``do_sample=True``, a ``seed``,
        or one for each prompt, makes an answer a function of the request; without one it is drawn anew and not
        cached. ``sample_index`` selects one of several samples of a prompt and seed. Bad input raises before anything
        runs. Where a part fails later, or a hit may not be served (``on_risk="raise"``), the rest is done and cached
        first; the error's ``completions`` hold it.
        """
        found = self.session.complete(prompts, params, progress)
        return found[0] if isinstance(prompts, str) else found

    @overload  # a string is a sequence of strings too, and is checked first
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

        Each pair is two strings, tokenized together, or two lists of token ids. Log-probabilities are natural and
        float32, computed under the client's policy, and cached; equal pairs are computed once. A prompt has at least
        one token; prompt and continuation have at most one more than the model's context. Raises as ``complete`` does.
        """
        if isinstance(prompts, str) and isinstance(continuations, str):
            return self.session.score([prompts], [continuations], progress)[0]
        if isinstance(prompts, str):
            raise PromptError(
                f"score() was given one prompt and continuations of type {type(continuations).__name__}",
                accepted="two strings, or two lists of equal length",
            )
        return self.session.score(prompts, continuations, progress)

    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **arguments: Any) -> Any:
        """Generate as transformers' ``model.generate`` does, with the same arguments and the same kinds of result.

        It also takes ``seed`` (one, or one for each row) and ``sample_index`` for sampling, and ``unsupported`` for
        arguments whose answers no policy makes stable: ``"raise"`` (the default) raises ``UnsupportedParameterError``,
        ``"passthrough"`` passes the call to transformers, uncached. ``stablegen/hf/README.md`` lists every argument.
        With ``return_dict_in_generate`` the output has ``completions``, with records and verdicts.
        """
        from stablegen.hf.generate import generate

        return generate(self.session, inputs, generation_config, **arguments)

    def request(self, prompt: str, **params: Any) -> Request:
        """Return the request that ``complete`` would make for a prompt; raise the same errors for bad input."""
        return self.session.request(prompt, params)

    def make_request(
        self,
        prompt_ids: Sequence[int],
        arguments: Mapping[str, Any],
        *,
        logits_processors: Mapping[str, Any] | None = None,
        stopping_criteria: Mapping[str, Callable[[int], Any]] | None = None,
    ) -> Request:
        """Return the request for prompt token ids and generation arguments.

        ``logits_processors`` and ``stopping_criteria``: the caller's own by their cache keys; a criterion is given as a
        function that makes it from the prompt's length in tokens.
        """
        return self.session.make_request(prompt_ids, arguments, logits_processors or {}, stopping_criteria or {})

    def run(
        self,
        requests: Iterable[Request],
        *,
        progress: Progress | None = None,
        cached: bool = True,
        listen: Listener | None = None,
    ) -> list[Completion]:
        """Return the completions of requests made by ``request`` or ``make_request``, in their order.

        ``cached=False`` neither reads nor writes the cache. ``listen`` gets the generated tokens. Raises
        ``InvalidRequestError`` for a request that was made for another model or tokenizer.
        """
        return self.session.run_requests(requests, progress=progress, cached=cached, listen=listen)

    # -- verifying ---------------------------------------------------------------------------------------------

    @overload  # a record is a tuple, and is checked first
    def verify(  # type: ignore[overload-overlap]
        self, answers: Answers, **how: Unpack[VerifyOptions]
    ) -> Verification: ...
    @overload
    def verify(self, answers: Sequence[Answers], **how: Unpack[VerifyOptions]) -> list[Verification]: ...

    def verify(
        self, answers: Answers | Sequence[Answers], **how: Unpack[VerifyOptions]
    ) -> Verification | list[Verification]:
        """Compare a cached answer, or several, with what a run gives now.

        ``answers``: keys, records or completions; ``how``: ``repair=True`` replaces them in the cache by the fresh
        answers, ``from_scratch=True`` recomputes all, ``progress`` is called with how many are done. Where prefill and
        decode give the same bits, one pass over prompt and answer suffices, for all answers together, and only what
        follows the first differing step is generated. Otherwise an answer of other numerics is replayed up to its last
        step whose risk is not negligible, and recomputed where it diverges before. Under equal numerics, and with
        ``repair`` or ``from_scratch``, answers are recomputed. The fresh record equals a fresh generation's bit for
        bit. Raises ``RecordNotFoundError`` for an unknown key, ``InvalidRequestError`` for another model's answer, and
        what ``complete`` raises.
        """
        if isinstance(answers, (str, Record, Completion)):
            return verify(self.session, [answers], **how)[0]
        return verify(self.session, answers, **how)

    def calibrate(
        self,
        answers: Iterable[Answers],
        *,
        sizes: Sequence[int] = forcing.CALIBRATION_SIZES,
        progress: Progress | None = None,
    ) -> list[Calibration]:
        """Measure how far margins move from the answers' numerics to this client's, and judge by it from then on.

        ``answers``: keys, records or completions, whose tokens are teacher-forced; where the policy promises nothing,
        in batches of each of the ``sizes``. Returns a calibration for each numerics with enough steps; the cache keeps
        them. Raises ``CalibrationError`` where none has enough, and what ``verify`` raises.
        """
        return forcing.calibrate(self.session, answers, sizes=sizes, progress=progress)

    def calibrate_from(
        self, source: Client, prompts: Sequence[str], *, max_new_tokens: int, progress: Progress | None = None
    ) -> list[Calibration]:
        """Let ``source``, another client of the same model, answer prompts, and ``calibrate`` from its answers.

        A source whose policy promises nothing answers one prompt at a time: only this client is measured in batches.
        """
        return forcing.calibrate_from(self.session, source.session, prompts, max_new_tokens, progress)

    def score_rows(self, completions: Iterable[Completion]) -> dict[str, list[torch.Tensor]]:
        """Return each answer's full score rows by its key: for each step the model's own [V] float32, on the device.

        They are not cached, but computed by teacher forcing under the client's numerics.
        """
        return forcing.score_rows(self.session, completions)

    def self_check(self) -> SelfCheck:
        """Load the engine, and check now whether the policy keeps its promise here.

        Every shape is checked when it is first used; this checks the smallest.
        """
        return self.session.self_check()

    # -- reading -----------------------------------------------------------------------------------------------

    def inspect(self, key: str) -> Record:
        """Return the record under a key; raise ``RecordNotFoundError`` where there is none."""
        return self.session.record(key)

    def find_key(self, start: str) -> str:
        """Return the one key that begins with ``start``; raise ``RecordNotFoundError`` where none or several do."""
        return self.session.find_key(start)

    def judge(self, record: Record) -> Verdict:
        """Return the guard's verdict on a record under this client's numerics."""
        return self.session.judge(record)

    def calibration(self, record: Record) -> Calibration | None:
        """Return the calibration from a record's numerics to this client's; None where there is none for its model."""
        return self.session.calibration(record)

    def numerics_for(self, request: Request) -> Numerics:
        """Return the numerics under which this client would answer a request."""
        return self.session.numerics_for(request)

    def answers_for(self, record: Record) -> bool:
        """Return whether this client's model and tokenizer could answer a record's request."""
        return self.session.answers_for(record)

    def warnings(self) -> list[FlaggedHit]:
        """Return the hits that were flagged, oldest first."""
        return self.cache.flagged()

    @property
    def cache(self) -> Cache:
        """Return the typed cache: records, flags, self-checks, calibrations, audits."""
        return self.session.cache

    @property
    def source(self) -> Source:
        """Return the model's source."""
        return self.session.source

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self.session.source.tokenizer

    @property
    def identity(self) -> ModelIdentity:
        """Return the identity of the model, as of the last call."""
        return self.session.identity

    @property
    def numerics(self) -> Numerics:
        """Return the numerics under which misses run; once the engine is loaded, its own."""
        return self.session.numerics

    @property
    def policy(self) -> ExecutionPolicy:
        """Return the policy under which misses run."""
        return self.session.parts.policy

    @property
    def on_risk(self) -> OnRisk:
        """Return what happens to a flagged hit."""
        return self.session.parts.on_risk

    @property
    def accepted_risk(self) -> float:
        """Return the probability of divergence up to which a hit counts as stable."""
        return self.session.parts.judge.accepted_risk

    @property
    def app(self) -> str | None:
        """Return the app whose settings apply; None where there is none."""
        return self.session.parts.app

    # -- closing -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the cache and the model, once a thread that generates has finished."""
        self.session.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled: a copy would share the engine and the files of this client."""
        raise ModelError(
            "a client, and with it a stabilized model, cannot be copied or pickled",
            hint="Make a client of its own for the copy; for a model, call stablegen.restore(model) first",
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
