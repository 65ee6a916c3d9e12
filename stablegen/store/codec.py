"""The bytes of a record: versioned, self-describing, and checked on reading.

The layout::

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
from functools import lru_cache
from typing import Any, TypeVar

import pydantic_core

from stablegen.core.frozen import Frozen
from stablegen.core.numerics import Numerics
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Shape
from stablegen.core.record import Composition, Record
from stablegen.core.request import SCHEMA, ModelIdentity, Request, words
from stablegen.core.trace import STEP_BYTES, Trace, unpack_column
from stablegen.errors import CacheSchemaError, CorruptEntryError

_Model = TypeVar("_Model", bound=Frozen)

_MAGIC = b"SGREC"
_START = len(_MAGIC) + 1 + 32
_LAYOUT = struct.Struct("<32sIIII")
_HEADER_AT = _START + _LAYOUT.size


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

    Raises ``CorruptEntryError`` for anything but a whole, unaltered record of this schema, ``CacheSchemaError`` for a
    record of a newer schema.
    """
    if data[:5] != _MAGIC or len(data) < _HEADER_AT:
        raise CorruptEntryError("the entry is not a stablegen record")
    if data[5] > SCHEMA:
        raise CacheSchemaError(
            f"the entry has schema {data[5]}; this stablegen reads up to {SCHEMA}", hint="Upgrade stablegen"
        )
    if data[5] != SCHEMA:
        raise CorruptEntryError(f"the entry has schema {data[5]}; this stablegen reads {SCHEMA} alone")
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
        superseded_at = steps_at + steps * (STEP_BYTES if traced else 4)
        if len(data) != superseded_at + superseded_size:
            raise CorruptEntryError("the entry's parts do not add up to its length")
        answer = data[steps_at:superseded_at]
        continuation, logprobs = tuple(own.get("continuation", ())), tuple(own.get("logprobs", ()))
        if len(continuation) != len(logprobs):
            raise CorruptEntryError("the entry has not a log-probability for each token of its continuation")
        rows, requests, slot, shape = own["composition"]
        return Record(
            own_key,
            Request(
                unpack_column("I", data[prompt_at:steps_at]),
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
            Composition(rows, requests, slot, Shape(*shape)),
            own["created"],
            own["seconds"],
            decode(data[superseded_at:], own_key) if superseded_size else None,
            () if traced else unpack_column("I", answer),
            logprobs,
            own.get("app"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptEntryError(f"the entry cannot be read: {error}") from error


@lru_cache(maxsize=1024)
def _parse(kind: type[_Model], text: bytes) -> _Model:
    """Return a model from its JSON; one cache holds few distinct ones, so each is validated once."""
    return kind.model_validate_json(text)
