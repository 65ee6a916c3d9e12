"""What a run leaves behind: trace, record, verdict and completion, and the versioned bytes of a record.

A stored record is self-describing and checked on reading::

    magic "SGREC" | version u8 | digest of all that follows (SHA-256, 32 bytes)
    | key (32 bytes) | header length u32 | prompt tokens u32 | steps u32 | superseded length u32
    | header | prompt ids u32[] | trace columns | superseded record, in the same form

The header is four lines of JSON: parameters, model, numerics (each the same in thousands of records, so each is
parsed once), and what is the record's own.

All integers are little-endian. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import fsum, isfinite
from typing import Any, Literal, NamedTuple, TypeVar

import pydantic_core
from pydantic import Field

from stablegen.errors import CacheSchemaError, CorruptEntryError
from stablegen.frozen import Frozen
from stablegen.numerics import Numerics
from stablegen.params import GenerationParams
from stablegen.policy import Shape
from stablegen.request import SCHEMA, ModelIdentity, Request, words

_Model = TypeVar("_Model", bound=Frozen)
FinishReason = Literal["stop", "length"]
Status = Literal["exact", "stable", "at_risk", "diverged", "unknown"]
Basis = Literal["numerics", "prior", "calibrated", "verified", "none"]

_MAGIC = b"SGREC"
_START = len(_MAGIC) + 1 + 32
_LAYOUT = struct.Struct("<32sIIII")
_HEADER_AT = _START + _LAYOUT.size
# tokens, runner-ups, scores, runner-up scores, hashes
_COLUMNS = ("I", "I", "f", "f", "Q")
_OFFSETS = (0, 4, 8, 12, 16)
_STEP_BYTES = 24


class Trace:
    """What each generated step looked like; every attribute has one entry a step.

    ``tokens`` and ``runner_ups`` are token ids, ``scores`` and ``runner_up_scores`` float32, ``margins`` their
    difference rounded to float32, ``score_hash`` a 64-bit hash of the bits of the step's full score row. Columns stay
    bytes until they are looked at: most hits are served without.
    """

    __slots__ = ("_columns", "_data", "_steps")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._steps = len(data) // _STEP_BYTES
        self._columns: dict[int, tuple[Any, ...]] = {}

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        runner_ups: Sequence[int],
        scores: Sequence[float],
        runner_up_scores: Sequence[float],
        score_hash: Sequence[int],
    ) -> Trace:
        """Return the trace with these columns, scores rounded to float32."""
        columns = (tokens, runner_ups, scores, runner_up_scores, score_hash)
        assert len({len(column) for column in columns}) == 1
        return cls(b"".join(_pack(code, column) for code, column in zip(_COLUMNS, columns, strict=True)))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the token chosen at each step."""
        return self._column(0)

    @property
    def runner_ups(self) -> tuple[int, ...]:
        """Return the second-best token of each step."""
        return self._column(1)

    @property
    def scores(self) -> tuple[float, ...]:
        """Return the score of each step's token."""
        return self._column(2)

    @property
    def runner_up_scores(self) -> tuple[float, ...]:
        """Return the score of each step's runner-up."""
        return self._column(3)

    @property
    def score_hash(self) -> tuple[int, ...]:
        """Return the 64-bit hash of each step's full score row."""
        return self._column(4)

    @property
    def margins(self) -> tuple[float, ...]:
        """Return best minus second-best score of each step, rounded to float32."""
        pairs = zip(self.scores, self.runner_up_scores, strict=True)
        return tuple(array("f", [best - second for best, second in pairs]))

    def __len__(self) -> int:
        return self._steps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self._data == other._data

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return f"Trace({self._steps} steps, tokens={self.tokens})"

    def __bytes__(self) -> bytes:
        """Return the columns one after the other, little-endian, 24 bytes a step."""
        return self._data

    def upto(self, stop: int) -> Trace:
        """Return the trace of the steps before ``stop``."""
        if stop >= self._steps:
            return self
        return Trace.of(*(self._column(index)[:stop] for index in range(len(_COLUMNS))))

    def __add__(self, later: Trace) -> Trace:
        """Return the trace of these steps and those that followed."""
        return Trace.of(*(self._column(index) + later._column(index) for index in range(len(_COLUMNS))))

    def digest(self) -> str:
        """Return 16 hexadecimal digits that stand for all score rows of the trace."""
        return hashlib.sha256(_pack("Q", self.score_hash)).hexdigest()[:16]

    def first_difference(self, other: Trace) -> int | None:
        """Return the first step at which the tokens differ; None where they are the same."""
        return first_difference(self.tokens, other.tokens)

    def _column(self, index: int) -> tuple[Any, ...]:
        column = self._columns.get(index)
        if column is None:
            start = self._steps * _OFFSETS[index]
            size = self._steps * array(_COLUMNS[index]).itemsize
            column = self._columns[index] = _unpack(_COLUMNS[index], self._data[start : start + size])
        return column


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the first step at which two answers' token ids differ, or one of them ends; None where they are equal."""
    if mine == theirs:
        return None
    for step, (one, other) in enumerate(zip(mine, theirs, strict=False)):
        if one != other:
            return step
    return None if len(mine) == len(theirs) else min(len(mine), len(theirs))


def _pack(code: str, values: Sequence[Any]) -> bytes:
    column = array(code, values)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return column.tobytes()


def _unpack(code: str, data: bytes) -> tuple[Any, ...]:
    column = array(code)
    column.frombytes(data)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return tuple(column)


class Composition(NamedTuple):
    """How the batch of a run was composed: ``rows`` in all, ``requests`` of them real, this one's ``slot``.

    ``width`` is the padded prompt length in tokens; None where prompts were not padded. ``capacity`` is the length of
    the KV cache in tokens; None where it was not fixed. ``scored`` as in ``Shape``.
    """

    rows: int
    requests: int
    slot: int
    width: int | None = None
    capacity: int | None = None
    scored: int | None = None

    @property
    def shape(self) -> Shape:
        """Return the shape in which the batch ran."""
        return Shape(self.width, self.capacity, self.scored)


class Record(NamedTuple):
    """What the cache stores: what was asked, what came out, and how it was computed.

    ``trace`` is None in a record that was made elsewhere and cannot be judged; ``untraced`` then holds its tokens.
    ``created`` is Unix time, ``seconds`` the time from the start of the batch. ``superseded`` is the record that this
    one replaced, one level deep. ``logprobs``: natural logarithms of the probability of each token of the request's
    continuation, float32. ``app`` is that of the client which computed it; None where it had none, or was older.
    """

    key: str
    request: Request
    text: str
    finish_reason: FinishReason
    trace: Trace | None
    numerics: Numerics
    composition: Composition
    created: float
    seconds: float
    superseded: Record | None = None
    untraced: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    app: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the generated token ids, an end token included; of a scored continuation, those of highest score."""
        return self.untraced if self.trace is None else self.trace.tokens

    @property
    def whole(self) -> bool:
        """Return whether the answer ends where its request lets it: with its only end token, or at its length."""
        params, tokens = self.request.params, self.token_ids
        if self.request.continuation:
            return len(tokens) == params.max_new_tokens
        if self.finish_reason == "stop" and (params.stop_strings or params.stopping_criteria):
            return params.eos_token_ids == () or not set(tokens[:-1]) & set(params.eos_token_ids)
        ends = [step for step, token in enumerate(tokens) if token in params.eos_token_ids]
        return ends == [len(tokens) - 1] if ends else len(tokens) == params.max_new_tokens

    def superseding(self, old: Record | None) -> Record:
        """Return this record with ``old`` kept behind it, itself stripped of what it had replaced."""
        return self._replace(superseded=None if old is None else old._replace(superseded=None))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON knows it, for export and display."""
        trace = None
        if self.trace is not None:
            trace = {
                "tokens": self.trace.tokens,
                "runner_ups": self.trace.runner_ups,
                "scores": self.trace.scores,
                "runner_up_scores": _finite(self.trace.runner_up_scores),
                "margins": _finite(self.trace.margins),
                "score_hash": [f"{value:016x}" for value in self.trace.score_hash],
            }
        return {
            "key": self.key,
            "app": self.app,
            "prompt": self.request.prompt,
            "prompt_ids": self.request.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "params": self.request.params.for_display(),
            "model": self.request.model.model_dump(mode="json"),
            "tokenizer": self.request.tokenizer,
            "numerics": self.numerics.model_dump(mode="json"),
            "numerics_digest": self.numerics.digest,
            "composition": self.composition._asdict(),
            "created": self.created,
            "seconds": self.seconds,
            "continuation": self.request.continuation,
            "logprobs": self.logprobs,
            "trace": trace,
            "superseded": None if self.superseded is None else self.superseded.to_dict(),
        }


def _finite(values: Sequence[float]) -> list[float | None]:
    """Return numbers as JSON knows them: it knows no infinity."""
    return [value if isfinite(value) else None for value in values]


class Verdict(Frozen):
    """The guard's judgement of one hit under the numerics that would recompute it.

    ``probability`` is that of a divergence anywhere in the answer (None where nothing can be said); ``step`` is the
    most fragile step or, once ``diverged``, the first that differs, with its ``token``, ``runner_up`` (token ids) and
    ``margin``. ``basis``
    says what the probability rests on.
    """

    status: Status
    reason: str
    basis: Basis = "none"
    probability: float | None = None
    step: int | None = None
    token: int | None = None
    runner_up: int | None = None
    margin: float | None = None

    @property
    def flagged(self) -> bool:
        """Return whether ``on_risk`` applies: anything but ``exact`` and ``stable``."""
        return self.status not in ("exact", "stable")


@dataclass(frozen=True, slots=True)
class Completion:
    """What the caller gets.

    ``cached`` says whether the answer stood in the cache; for one computed just now, ``verdict`` is what it would be
    judged if it were asked for again (or, where it replaces a hit, how the two compare).
    """

    record: Record
    cached: bool
    verdict: Verdict

    @property
    def text(self) -> str:
        """Return the generated text, without the prompt and without special tokens."""
        return self.record.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the generated token ids, an end token included."""
        return self.record.token_ids

    @property
    def key(self) -> str:
        """Return the request's key."""
        return self.record.key

    @property
    def trace(self) -> Trace | None:
        """Return the steps' tokens, runner-ups, scores and hashes."""
        return self.record.trace


@dataclass(frozen=True, slots=True)
class Score(Completion):
    """How probable a continuation is after its prompt; ``exact`` where scoring it again gives the same digits.

    ``stable``: other digits, but the same tokens have the highest scores, as far as ``accepted_risk`` goes.
    """

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Return the natural logarithm of each token's probability, float32."""
        return self.record.logprobs

    @property
    def logprob(self) -> float:
        """Return the natural logarithm of the continuation's probability: the sum, rounded once."""
        return fsum(self.record.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Return whether greedy decoding would give this continuation."""
        return self.record.token_ids == self.record.request.continuation


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of verifying a cached answer: the ``record`` that was held against ``fresh``, a run of today.

    ``verdict`` is ``exact`` (same bits), ``stable`` (same tokens) or ``diverged`` at ``verdict.step``. ``fresh`` is
    None where a part of the answer was replayed and the margins of the rest are too wide to matter.
    """

    record: Record
    fresh: Record | None
    verdict: Verdict

    @property
    def continuations(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the cached token ids and the fresh ones from the first step on that differs; empty where none does."""
        step = self.verdict.step
        if self.fresh is None or self.verdict.status != "diverged" or step is None:
            return (), ()
        return self.record.token_ids[step:], self.fresh.token_ids[step:]


class SelfCheck(Frozen):
    """Whether a policy keeps its promise under one numerics with one model; ``checks`` says what was compared.

    ``passed``: no bit moved. ``slot_free``: a row's slot in the batch moved none either. ``width``, ``capacity`` and
    ``scored``: the shape that was measured, as in ``Shape``.
    """

    numerics: Numerics
    width: int | None = None
    capacity: int | None = None
    scored: int | None = None
    passed: bool
    slot_free: bool = False
    checks: dict[str, str] = Field(default_factory=dict)


def encode(record: Record) -> bytes:
    """Return a record's bytes."""
    request = record.request
    own: dict[str, Any] = {
        "prompt": request.prompt,
        "tokenizer": request.tokenizer,
        "text": record.text,
        "finish_reason": record.finish_reason,
        "traced": record.trace is not None,
        "composition": record.composition,
        "created": record.created,
        "seconds": record.seconds,
    }
    if request.continuation:
        own |= {"continuation": request.continuation, "logprobs": record.logprobs}
    if record.app is not None:
        own["app"] = record.app
    header = "\n".join(
        (
            request.params.model_dump_json(exclude_defaults=True),  # an older version reads what it knows
            request.model.model_dump_json(),
            record.numerics.model_dump_json(),
            json.dumps(own, separators=(",", ":")),
        )
    ).encode()
    # a record without a trace keeps its tokens where the trace's first column would be
    steps = words(record.token_ids) if record.trace is None else bytes(record.trace)
    superseded = b"" if record.superseded is None else encode(record.superseded)
    layout = _LAYOUT.pack(
        bytes.fromhex(record.key), len(header), len(request.prompt_ids), len(record.token_ids), len(superseded)
    )
    body = b"".join((layout, header, words(request.prompt_ids), steps, superseded))
    return b"".join((_MAGIC, bytes([SCHEMA]), hashlib.sha256(body).digest(), body))


def decode(data: bytes, key: str | None = None) -> Record:
    """Return the record in ``data``; with ``key``, only if it is that request's.

    Raises ``CorruptEntryError`` for anything that is not a whole, unaltered record, ``CacheSchemaError`` for one of
    a newer schema.
    """
    if data[:5] != _MAGIC or len(data) < _HEADER_AT:
        raise CorruptEntryError("the entry is not a stablegen record")
    if data[5] > SCHEMA:
        raise CacheSchemaError(
            f"the entry has schema {data[5]}; this stablegen reads up to {SCHEMA}", hint="Upgrade stablegen"
        )
    if data[5] != SCHEMA:
        raise CorruptEntryError(f"the entry has schema {data[5]}, which no stablegen ever wrote")
    if hashlib.sha256(memoryview(data)[_START:]).digest() != data[6:_START]:
        raise CorruptEntryError("the entry's digest does not match its content")
    raw_key, header_size, prompt_size, steps, superseded_size = _LAYOUT.unpack_from(data, _START)
    own_key = raw_key.hex()
    if key is not None and own_key != key:
        raise CorruptEntryError(f"the entry belongs to the request {own_key}")
    try:
        prompt_at = _HEADER_AT + header_size
        steps_at = prompt_at + 4 * prompt_size
        params, model, numerics, rest = data[_HEADER_AT:prompt_at].split(b"\n")
        own = pydantic_core.from_json(rest)
        traced = own["traced"]
        superseded_at = steps_at + steps * (_STEP_BYTES if traced else 4)
        if len(data) != superseded_at + superseded_size:
            raise CorruptEntryError("the entry's parts do not add up to its length")
        answer = data[steps_at:superseded_at]
        continuation, logprobs = tuple(own.get("continuation", ())), tuple(own.get("logprobs", ()))
        if len(continuation) != len(logprobs):
            raise CorruptEntryError("the entry has not a log-probability for each token of its continuation")
        return Record(
            own_key,
            Request(
                _unpack("I", data[prompt_at:steps_at]),
                _parse(GenerationParams, params),
                _parse(ModelIdentity, model),
                own["tokenizer"],
                own["prompt"],
                continuation,
            ),
            own["text"],
            own["finish_reason"],
            Trace(answer) if traced else None,
            _parse(Numerics, numerics),
            Composition(*own["composition"]),
            own["created"],
            own["seconds"],
            decode(data[superseded_at:], own_key) if superseded_size else None,
            () if traced else _unpack("I", answer),
            logprobs,
            own.get("app"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptEntryError(f"the entry cannot be read: {error}") from error


@lru_cache(maxsize=1024)
def _parse(kind: type[_Model], text: bytes) -> _Model:
    """Return a model from its JSON; one cache holds few distinct ones, so each is validated once."""
    return kind.model_validate_json(text)
