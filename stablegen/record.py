"""What a run leaves behind: trace, record, verdict and completion, and the versioned bytes of a record.

A stored record is self-describing and checked on reading::

    magic "SGREC" | version u8 | digest of all that follows (SHA-256, 32 bytes)
    | key (32 bytes) | header length u32 | prompt tokens u32 | steps u32 | superseded length u32
    | header (JSON) | prompt ids u32[] | trace columns | superseded record, in the same form

All integers are little-endian. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from stablegen.errors import CacheSchemaError, CorruptEntryError
from stablegen.numerics import Numerics
from stablegen.request import SCHEMA, GenerationParams, ModelIdentity, Request, words

_Model = TypeVar("_Model", bound=BaseModel)
FinishReason = Literal["stop", "length"]
Status = Literal["exact", "stable", "at_risk", "diverged", "unknown"]
Basis = Literal["numerics", "prior", "calibrated", "verified", "none"]

_MAGIC = b"SGREC"
_START = len(_MAGIC) + 1 + 32
_LAYOUT = struct.Struct("<32sIIII")
# tokens, runner-ups, scores, runner-up scores, hashes
_COLUMNS = ("I", "I", "f", "f", "Q")
_STEP_BYTES = 24


@dataclass(frozen=True, slots=True)
class Trace:
    """What each generated step looked like; every attribute has one entry a step.

    ``tokens`` and ``runner_ups`` are token ids, ``scores`` and ``runner_up_scores`` float32, ``margins`` their
    difference rounded to float32, ``score_hash`` a 64-bit hash of the bits of the step's full score row.
    """

    tokens: tuple[int, ...]
    runner_ups: tuple[int, ...]
    scores: tuple[float, ...]
    runner_up_scores: tuple[float, ...]
    score_hash: tuple[int, ...]

    @property
    def margins(self) -> tuple[float, ...]:
        """Return best minus second-best score of each step, rounded to float32."""
        pairs = zip(self.scores, self.runner_up_scores, strict=True)
        return tuple(array("f", [best - second for best, second in pairs]))

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """Return 16 hexadecimal digits that stand for all score rows of the trace."""
        return hashlib.sha256(_column("Q", self.score_hash)).hexdigest()[:16]

    def first_difference(self, other: Trace) -> int | None:
        """Return the first step at which the tokens differ; None where one is the other."""
        for step, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                return step
        return None if len(self) == len(other) else min(len(self), len(other))

    def to_bytes(self) -> bytes:
        """Return the columns one after the other, little-endian, 24 bytes a step."""
        columns = (self.tokens, self.runner_ups, self.scores, self.runner_up_scores, self.score_hash)
        return b"".join(_column(code, column) for code, column in zip(_COLUMNS, columns, strict=True))

    @classmethod
    def from_bytes(cls, data: bytes) -> Trace:
        """Return the trace whose ``to_bytes`` is ``data``."""
        steps = len(data) // _STEP_BYTES
        columns: list[Any] = []
        offset = 0
        for code in _COLUMNS:
            column = array(code)
            column.frombytes(data[offset : (offset := offset + steps * column.itemsize)])
            if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
                column.byteswap()
            columns.append(tuple(column))
        return cls(*columns)


def _column(code: str, values: tuple[Any, ...]) -> bytes:
    column = array(code, values)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return column.tobytes()


@dataclass(frozen=True, slots=True)
class Composition:
    """How the batch of a run was composed: ``rows`` in all, ``requests`` of them real, this one's ``slot``.

    ``width`` is the padded prompt length in tokens; None where prompts were not padded.
    """

    rows: int
    requests: int
    slot: int
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What the cache stores: what was asked, what came out, and how it was computed.

    ``trace`` is None in a record that was made elsewhere and cannot be judged. ``created`` is Unix time and
    ``seconds`` the duration of the batch. ``superseded`` is the record that this one replaced, one level deep.
    """

    key: str
    request: Request
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    trace: Trace | None
    numerics: Numerics
    composition: Composition
    created: float
    seconds: float
    superseded: Record | None = field(default=None, repr=False)

    def superseding(self, old: Record | None) -> Record:
        """Return this record with ``old`` kept behind it, itself stripped of what it had replaced."""
        return replace(self, superseded=None if old is None else replace(old, superseded=None))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON knows it, for export and display."""
        trace = None
        if self.trace is not None:
            trace = {
                "tokens": self.trace.tokens,
                "runner_ups": self.trace.runner_ups,
                "scores": self.trace.scores,
                "runner_up_scores": self.trace.runner_up_scores,
                "margins": self.trace.margins,
                "score_hash": [f"{value:016x}" for value in self.trace.score_hash],
            }
        return {
            "key": self.key,
            "prompt": self.request.prompt,
            "prompt_ids": self.request.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "params": self.request.params.model_dump(mode="json"),
            "model": self.request.model.model_dump(mode="json"),
            "tokenizer": self.request.tokenizer,
            "numerics": self.numerics.model_dump(mode="json"),
            "numerics_digest": self.numerics.digest,
            "composition": asdict(self.composition),
            "created": self.created,
            "seconds": self.seconds,
            "trace": trace,
            "superseded": None if self.superseded is None else self.superseded.to_dict(),
        }


class Verdict(BaseModel):
    """The guard's judgement of one hit under the numerics that would recompute it.

    ``probability`` is that of a divergence anywhere in the answer (None where nothing can be said); ``step`` is the
    first risky or first differing step, with its ``token``, ``runner_up`` (token ids) and ``margin``. ``basis``
    says what the probability rests on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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


class SelfCheck(BaseModel):
    """Whether a policy keeps its promise under one numerics with one model; ``checks`` says what was compared.

    ``passed``: no bit moved. ``slot_free``: a row's slot in the batch moved none either. ``width``: the padded width
    in tokens at which ``padded:N`` was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    numerics: Numerics
    width: int | None = None
    passed: bool
    slot_free: bool = True
    checks: dict[str, str] = {}


def encode(record: Record) -> bytes:
    """Return a record's bytes."""
    header = json.dumps(
        {
            "prompt": record.request.prompt,
            "params": record.request.params.model_dump_json(),
            "model": record.request.model.model_dump_json(),
            "tokenizer": record.request.tokenizer,
            "text": record.text,
            "finish_reason": record.finish_reason,
            "traced": record.trace is not None,
            "numerics": record.numerics.model_dump_json(),
            "composition": astuple(record.composition),
            "created": record.created,
            "seconds": record.seconds,
        },
        separators=(",", ":"),
    ).encode()
    prompt = words(record.request.prompt_ids)
    # a record without a trace keeps its tokens where the trace's first column would be
    steps = words(record.token_ids) if record.trace is None else record.trace.to_bytes()
    superseded = b"" if record.superseded is None else encode(record.superseded)
    layout = _LAYOUT.pack(
        bytes.fromhex(record.key),
        len(header),
        len(record.request.prompt_ids),
        len(record.token_ids),
        len(superseded),
    )
    body = b"".join((layout, header, prompt, steps, superseded))
    return b"".join((_MAGIC, bytes([SCHEMA]), hashlib.sha256(body).digest(), body))


def decode(data: bytes, key: str | None = None) -> Record:
    """Return the record in ``data``; with ``key``, only if it is that request's.

    Raises ``CorruptEntryError`` for anything that is not a whole, unaltered record, ``CacheSchemaError`` for one of
    a newer schema.
    """
    if data[:5] != _MAGIC or len(data) < _START + _LAYOUT.size:
        raise CorruptEntryError("the entry is not a stablegen record")
    if data[5] > SCHEMA:
        raise CacheSchemaError(
            f"the entry has schema {data[5]}; this stablegen reads up to {SCHEMA}", hint="Upgrade stablegen"
        )
    if hashlib.sha256(memoryview(data)[_START:]).digest() != data[6:_START]:
        raise CorruptEntryError("the entry's digest does not match its content")
    raw_key, header_size, prompt_size, steps, superseded_size = _LAYOUT.unpack_from(data, _START)
    own_key = raw_key.hex()
    if key is not None and own_key != key:
        raise CorruptEntryError(f"the entry belongs to the request {own_key}")
    try:
        header_at = _START + _LAYOUT.size
        prompt_at = header_at + header_size
        steps_at = prompt_at + 4 * prompt_size
        header = pydantic_core.from_json(data[header_at:prompt_at])
        prompt_ids = _words(data[prompt_at:steps_at])
        traced = header["traced"]
        steps_end = steps_at + steps * (_STEP_BYTES if traced else 4)
        trace = Trace.from_bytes(data[steps_at:steps_end]) if traced else None
        if len(data) != steps_end + superseded_size:
            raise CorruptEntryError("the entry's parts do not add up to its length")
        return Record(
            key=own_key,
            request=Request(
                prompt_ids,
                _parse(GenerationParams, header["params"]),
                _parse(ModelIdentity, header["model"]),
                header["tokenizer"],
                header["prompt"],
            ),
            token_ids=_words(data[steps_at:steps_end]) if trace is None else trace.tokens,
            text=header["text"],
            finish_reason=header["finish_reason"],
            trace=trace,
            numerics=_parse(Numerics, header["numerics"]),
            composition=Composition(*header["composition"]),
            created=header["created"],
            seconds=header["seconds"],
            superseded=decode(data[steps_end:], own_key) if superseded_size else None,
        )
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CorruptEntryError(f"the entry cannot be read: {error}") from error


def _words(data: bytes) -> tuple[int, ...]:
    column = array("I")
    column.frombytes(data)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return tuple(column)


@lru_cache(maxsize=1024)
def _parse(kind: type[_Model], text: str) -> _Model:
    """Return a model from its JSON; one cache holds few distinct ones, so each is validated once."""
    return kind.model_validate_json(text)
