"""The bytes of a record: what goes in comes out, and nothing but a whole, unaltered record is ever read."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import MODEL, numerics, record, request, trace, untraced

from stablegen.core.answer import Completion, Verdict
from stablegen.core.numerics import Numerics
from stablegen.core.params import GenerationParams
from stablegen.core.record import Composition, Record
from stablegen.core.request import SCHEMA, ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.errors import CacheSchemaError, CorruptEntryError
from stablegen.store.codec import decode, encode

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
compositions = st.builds(Composition, st.integers(1, 9), st.integers(1, 9), st.integers(0, 8), st.none() | words)


@st.composite
def records(draw: st.DrawFn, *, depth: int = 1) -> Record:
    asked = draw(requests)
    old = draw(st.none() | records(depth=depth - 1)) if depth else None
    made = Record(
        key=asked.key,
        request=asked,
        text=draw(texts),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        trace=draw(st.none() | traces),
        numerics=draw(st.sampled_from([numerics(), numerics(overrides=("A=1\n",), cuda="13.0", threads=None)])),
        composition=draw(compositions),
        created=draw(st.floats(0, 2e9)),
        seconds=draw(st.floats(0, 1e6)),
        superseded=None if old is None else old._replace(key=asked.key),
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


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: b"SGREC\1" + rest))
def test_foreign_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises((CorruptEntryError, CacheSchemaError)):
        decode(data)


def sealed(body: bytes) -> bytes:
    """Return a body with the right magic, version and digest before it."""
    return b"".join((b"SGREC", bytes([SCHEMA]), hashlib.sha256(body).digest(), body))


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


def test_superseding_keeps_one_level() -> None:
    first, second, third = (record(created=float(day)) for day in (1, 2, 3))
    newest = third.superseding(second.superseding(first))
    assert newest.superseded is not None
    assert newest.superseded == second
    assert newest.superseded.superseded is None
    assert third.superseding(None).superseded is None


def test_margins_are_best_minus_second_in_float32() -> None:
    made = Trace.of([1, 2], [3, 4], [0.1, 5.0], [0.0, 5.0], [0, 2**64 - 1])
    assert made.scores[0] == 0.10000000149011612
    assert made.margins == (0.10000000149011612, 0.0)
    assert made.score_hash == (0, 2**64 - 1)
    assert (made.tokens, made.runner_ups, made.runner_up_scores, len(made)) == ((1, 2), (3, 4), (0.0, 5.0), 2)


@pytest.mark.parametrize(
    ("other", "step"),
    [([0, 1, 2], None), ([9, 1, 2], 0), ([0, 1, 9], 2), ([0, 1], 2), ([0, 1, 2, 3], 3)],
)
def test_first_difference(other: list[int], step: int | None) -> None:
    one, two = trace([1.0] * 3), trace([1.0] * len(other), tokens=other)
    assert one.first_difference(two) == two.first_difference(one) == step


def test_a_trace_digest_stands_for_its_score_rows() -> None:
    one, other = trace([1.0, 2.0]), trace([1.0, 3.0])
    moved = Trace.of(one.tokens, one.runner_ups, one.scores, one.runner_up_scores, [1, 2])
    assert one.digest() == other.digest() != moved.digest()
    assert one != other


def test_the_json_of_a_record() -> None:
    shown = json.loads(json.dumps(record(request(prompt="a prompt")).superseding(untraced()).to_dict()))
    assert shown["prompt"] == "a prompt"
    assert shown["token_ids"] == shown["trace"]["tokens"] == [0, 1]
    assert shown["trace"]["score_hash"] == ["deadbeef00000000", "deadbeef00000001"]
    assert shown["numerics_digest"] == numerics().digest
    assert shown["superseded"]["trace"] is None
    assert shown["superseded"]["token_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("status", "flagged"),
    [("exact", False), ("stable", False), ("at_risk", True), ("diverged", True), ("unknown", True)],
)
def test_which_verdicts_are_flagged(status: Any, flagged: bool) -> None:
    assert Verdict(status=status, reason="").flagged is flagged


def test_a_completion_shows_its_record() -> None:
    made = record(request(prompt="a prompt"))
    shown = Completion(made, cached=True, verdict=Verdict(status="exact", reason=""))
    assert (shown.text, shown.token_ids, shown.key, shown.trace) == ("an answer", (0, 1), made.key, made.trace)


def test_numerics_are_parsed_whole() -> None:
    found = decode(encode(record(numerics=numerics(overrides=("A=1",)))))
    assert isinstance(found.numerics, Numerics)
    assert found.numerics.overrides == ("A=1",)


def test_a_record_without_an_app_is_the_bytes_it_always_was() -> None:
    assert b'"app"' not in encode(record())
    assert decode(encode(record(app="an app"))).app == "an app"
    assert record(app="an app").to_dict()["app"] == "an app"
