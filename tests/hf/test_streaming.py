"""Streamers hear what they hear of transformers, from a run and from a hit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generating import (
    BY_POLICY,
    NEW,
    PAD,
    SAMPLED,
    Recorder,
    answer_to,
    assert_heard_the_same,
    emptied,
    in_full,
    one,
    ours,
    padded,
    rows_of,
    text_of,
    theirs,
    tokenizer,
)
from transformers import (
    TextIteratorStreamer,
    TextStreamer,
)

from stablegen.client import Client


@BY_POLICY
@pytest.mark.parametrize("places", [[0], [0, 1, 2], [1, 0, 1, 2]], ids=["alone", "three", "one of them twice"])
def test_a_streamer_hears_what_it_does_of_transformers(
    places: list[int], policy: str, small: Any, clients: dict[str, Client]
) -> None:
    rows = [rows_of()[place] for place in places]
    arguments = {"eos_token_id": answer_to(small, rows_of()[0])[2]}
    expected = Recorder()
    out = theirs(small, padded(rows), streamer=expected, **arguments)
    assert expected.heard[-1] is None and len(expected.heard) == out.shape[1] - max(map(len, rows)) + 2
    asking = emptied(clients[policy])

    def hear() -> list[bool]:
        found = Recorder()
        done = in_full(asking, padded(rows), streamer=found, **arguments)
        assert torch.equal(done.sequences, out)
        assert_heard_the_same(found, expected)
        return [completion.cached for completion in done.completions]

    assert hear() == [False] * len(rows)
    assert hear() == [True] * len(rows)
    ours(emptied(asking), one(rows[0]), **arguments)
    assert hear() == [place == places[0] for place in places]


@BY_POLICY
def test_a_streamer_hears_rows_that_end_by_stop_strings(policy: str, small: Any, clients: dict[str, Client]) -> None:
    rows = rows_of()[:3]
    arguments = {"stop_strings": text_of(answer_to(small, rows[0])[3]), "tokenizer": tokenizer()}
    expected = Recorder()
    out = theirs(small, padded(rows), streamer=expected, **arguments)
    lengths = [(row != PAD).sum().item() for row in out]
    assert len(set(lengths)) > 1
    asking = emptied(clients[policy])
    for _ in range(2):
        found = Recorder()
        assert torch.equal(ours(asking, padded(rows), streamer=found, **arguments), out)
        assert_heard_the_same(found, expected)


def test_a_streamer_hears_several_samples(asking: Client) -> None:
    heard = []
    for _ in range(2):
        recorder = Recorder()
        out = ours(asking, padded(rows_of()[:2]), streamer=recorder, num_return_sequences=2, **SAMPLED)
        told = [value for value in recorder.heard if value is not None]
        width = told[0].shape[1]
        assert torch.equal(told[0], out[:, :width])
        assert torch.equal(torch.stack(told[1:], dim=1), out[:, width:])
        heard.append(recorder)
    assert_heard_the_same(*heard)


@BY_POLICY
def test_a_streamer_hears_the_first_token_while_the_others_are_computed(
    policy: str, clients: dict[str, Client]
) -> None:
    asking = emptied(clients[policy])
    kept: list[int] = []

    class Watching(Recorder):
        def put(self, value: torch.Tensor) -> None:
            kept.append(asking.cache.stats().records)

    ours(asking, padded(rows_of()[:2]), streamer=Watching())
    assert len(kept) == 1 + NEW
    assert kept[1] < 2  # the other's record is there: rows run one by one under ``single``
    assert asking.cache.stats().records == 2


def test_a_text_streamer_in_a_thread(small: Any, clients: dict[str, Client]) -> None:
    def chunks(ask: Callable[..., Any], whom: Any) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
        given = one(rows_of()[3])
        thread = threading.Thread(target=ask, args=(whom, given), kwargs={"streamer": streamer, "max_new_tokens": 12})
        thread.start()
        try:
            return list(streamer)
        finally:
            thread.join()

    expected = chunks(theirs, small)
    assert len(expected) > 3
    for asking in map(emptied, clients.values()):
        assert chunks(ours, asking) == expected
        assert chunks(ours, asking) == expected


def test_a_text_streamer_takes_one_row(model: Any, asking: Client) -> None:
    for ask, whom in ((theirs, model), (ours, asking)):
        with pytest.raises(ValueError, match="batch size 1"):
            ask(whom, padded(rows_of()[:2]), streamer=TextStreamer(tokenizer()))
    assert asking.cache.stats().records == 0


def test_a_text_streamer_prints_what_it_does_of_transformers(
    model: Any, asking: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for ask, whom in ((theirs, model), (ours, asking), (ours, asking)):
        ask(whom, one(rows_of()[0]), streamer=TextStreamer(tokenizer()), max_new_tokens=12)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert printed[0].startswith("What do you think")
