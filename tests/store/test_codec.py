"""The bytes of a record: what goes in comes out, and nothing but a whole, unaltered record is ever read."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MODEL, numerics, record, request, untraced

from stablegen.core.numerics import Numerics
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Shape
from stablegen.core.record import Composition, Record
from stablegen.core.request import SCHEMA, ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.errors import CacheSchemaError, CorruptEntryError
from stablegen.store.codec import decode, encode

MAGIC = b"SGREC" + bytes([SCHEMA])

words = st.integers(0, 2**32 - 1)
floats = st.floats(width=32, allow_nan=False)
texts = st.text(max_size=12)
steps = st.lists(st.tuples(words, words, floats, floats, st.integers(0, 2**64 - 1)), min_size=1, max_size=5)
traces = steps.map(lambda rows: Trace.of(*map(list, zip(*rows, strict=True))))
requests = st.builds(
    Request,
    st.lists(words, min_size=1, max_size=5).map(tuple),
    st.builds(
        GenerationParams, max_new_tokens=st.integers(1, 2**40), eos_token_ids=st.sampled_from([(), (0,), (1, 2)])
    ),
    st.sampled_from([MODEL, ModelIdentity(source="hub", repo="a/b", commit="c", name="line\nbreak")]),
    texts,
    st.none() | texts,
)
shapes = st.builds(Shape, st.none() | words, st.none() | words, st.none() | words)
compositions = st.builds(Composition, st.integers(1, 9), st.integers(1, 9), st.integers(0, 8), shapes)
under = [
    numerics(),
    numerics(overrides=("A=1\n",), cuda="13.0", threads=None),
    numerics(engine="a kernel set", engine_version=7, attention=None, static=True, choosing=2, alignment="0,32"),
]


@st.composite
def records(draw: st.DrawFn, *, depth: int = 1) -> Record:
    asked = draw(requests)
    continuation = tuple(draw(st.lists(words, max_size=3)))
    asked = replace(asked, continuation=continuation)
    old = draw(st.none() | records(depth=depth - 1)) if depth else None
    made = Record(
        key=asked.key,
        request=asked,
        text=draw(texts),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        trace=draw(st.none() | traces),
        numerics=draw(st.sampled_from(under)),
        composition=draw(compositions),
        created=draw(st.floats(0, 2e9)),
        seconds=draw(st.floats(0, 1e6)),
        superseded=None if old is None else old._replace(key=asked.key),
        logprobs=tuple(draw(floats) for _ in continuation),
        app=draw(st.none() | texts),
    )
    return made if made.trace is not None else made._replace(untraced=tuple(draw(st.lists(words, max_size=3))))


@given(records())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_what_goes_in_comes_out(made: Record) -> None:
    found = decode(encode(made), made.key)
    assert found == made
    assert found.request.prompt == made.request.prompt  # no part of a request's equality
    assert found.superseded == made.superseded
    assert encode(found) == encode(made)


@pytest.mark.parametrize("text", ["", "\u2028\n\0", "naïve 🤖"], ids=ascii)
def test_texts_of_any_kind(text: str) -> None:
    made = record(request(prompt=text), text=text)
    found = decode(encode(made), made.key)
    assert (found.text, found.request.prompt) == (text, text)


@pytest.mark.parametrize(
    "made",
    [record(), untraced(), record(margins=[0.5]).superseding(untraced())],
    ids=["traced", "untraced", "superseding"],
)
def test_no_altered_byte_is_ever_read(made: Record) -> None:
    data = encode(made)
    read = []
    for place in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            altered = bytearray(data)
            altered[place] ^= flip
            with suppress(CorruptEntryError, CacheSchemaError):
                read.append((place, flip, decode(bytes(altered), made.key)))
    assert read == []


def test_no_part_of_a_record_is_ever_read() -> None:
    data = encode(record())
    for size in range(len(data)):
        with pytest.raises(CorruptEntryError):
            decode(data[:size])
    with pytest.raises(CorruptEntryError):
        decode(data + b"\0")


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: MAGIC + rest))
def test_foreign_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises((CorruptEntryError, CacheSchemaError)):
        decode(data)


def sealed(body: bytes) -> bytes:
    """Return a body with the right magic, version and digest before it."""
    return b"".join((MAGIC, hashlib.sha256(body).digest(), body))


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_a_forged_digest_makes_no_other_error(foreign: bytes, place: int, patch: bytes) -> None:
    body = encode(record())[38:]
    for forged in (foreign, body[:place] + patch + body[place + len(patch) :]):
        with suppress(CorruptEntryError, CacheSchemaError):
            decode(sealed(forged))


def test_a_record_under_another_key_is_corrupt() -> None:
    made = record()
    with pytest.raises(CorruptEntryError, match=made.key):
        decode(encode(made), "0" * 64)


def test_a_newer_schema_is_told_apart_from_damage() -> None:
    data = bytearray(encode(record()))
    data[5] = SCHEMA + 1
    with pytest.raises(CacheSchemaError, match=f"schema {SCHEMA + 1}.*Upgrade"):
        decode(bytes(data))


@pytest.mark.parametrize("schema", range(SCHEMA))
def test_an_older_schema_is_not_read(schema: int) -> None:
    data = bytearray(encode(record()))
    data[5] = schema
    with pytest.raises(CorruptEntryError, match=f"schema {schema}; this stablegen reads {SCHEMA} alone"):
        decode(bytes(data))


def test_numerics_are_parsed_whole() -> None:
    found = decode(encode(record(numerics=numerics(overrides=("A=1",)))))
    assert isinstance(found.numerics, Numerics)
    assert found.numerics.overrides == ("A=1",)


def test_a_record_without_an_app_is_the_bytes_it_always_was() -> None:
    assert b'"app"' not in encode(record())
    assert decode(encode(record(app="an app"))).app == "an app"


@pytest.mark.parametrize("logprobs", [(), (-0.5,), (-0.5, -1.25, -2.0)])
def test_a_continuation_needs_a_log_probability_for_each_token(logprobs: tuple[float, ...]) -> None:
    asked = request(continuation=(7, 8))
    scored = record(asked, logprobs=(-0.5, -1.25))
    assert decode(encode(scored), asked.key) == scored
    with pytest.raises(CorruptEntryError, match="not a log-probability for each token"):
        decode(encode(record(asked, logprobs=logprobs)))


@pytest.mark.parametrize("shape", [Shape(), Shape(64), Shape(None, 256), Shape(64, 256, 0), Shape(None, None, 64)])
def test_a_composition_is_read_with_its_shape(shape: Shape) -> None:
    found = decode(encode(record(composition=Composition(8, 3, 2, shape)))).composition
    assert found == Composition(8, 3, 2, shape)
    assert (type(found), type(found.shape)) == (Composition, Shape)
