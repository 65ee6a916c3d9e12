"""Who runs in which pass; no model runs, the log is made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stablegen.core.params import GenerationParams
from stablegen.core.request import ModelIdentity, Request
from stablegen.engine.invariant.kv_cache import KVCache
from stablegen.engine.invariant.scheduler import Piece, Row, Scheduler, Task
from stablegen.kernels import log
from stablegen.kernels.base import PAGE

END = 50


def make_request(prompt: int | Sequence[int], new: int = 3, end: Sequence[int] = ()) -> Request:
    """Return a request; a number stands for a prompt of so many tokens that nobody else has."""
    ids = tuple(range(1000 * prompt, 1001 * prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = GenerationParams(max_new_tokens=new, eos_token_ids=tuple(end))
    return Request(ids, params, ModelIdentity(source="digest", digest="test"), "")


def make_cache(pages: int = 40, slots: int = 8) -> KVCache:
    cpu = torch.device("cpu")
    return KVCache(1, 1, 1, pages=pages, slots=slots, context=8 * PAGE, dtype=torch.float16, device=cpu)


def make_scheduler(*requests: Request, cache: KVCache | None = None, chunk: int = 100) -> Scheduler:
    return scheduler_of([Task(slot, request) for slot, request in enumerate(requests)], cache=cache, chunk=chunk)


def scheduler_of(tasks: Sequence[Task], *, cache: KVCache | None = None, chunk: int = 100) -> Scheduler:
    return Scheduler(tasks, make_cache() if cache is None else cache, chunk=chunk)


def shape(pieces: Sequence[Piece]) -> list[tuple[int, int, int, int]]:
    return [(piece.row.slot, piece.start, piece.count, piece.choices) for piece in pieces]


def step(scheduler: Scheduler, times: int = 1) -> list[tuple[int, int, int, int]]:
    """Admit, compose and count one pass; return what it was made of."""
    scheduler.admit()
    pieces, most = scheduler.compose()
    assert times <= most
    scheduler.count(pieces, times)
    return shape(pieces)


def words(*tokens: int, finite: bool = True) -> npt.NDArray[Any]:
    logged = np.zeros((len(tokens), log.WIDTH), dtype=np.int32)
    logged[:, log.TOKEN] = tokens
    logged[:, log.FINITE] = finite
    return logged


def tokens_of(row: Row) -> list[int]:
    return [] if not row.logged else np.concatenate(row.logged)[:, log.TOKEN].tolist()


def assert_all_free(cache: KVCache) -> None:
    """Fail if a slot or a page was not given back."""
    slots = [cache.lease([-1 - i], 1) for i in range(cache.slots)]
    assert None not in slots
    for lease in slots:
        cache.release(lease)  # type: ignore[arg-type]
    assert cache._users == [0] * (cache.pages + 1)
    assert len(cache._free) + len(cache._idle) == cache.pages


# --- admission --------------------------------------------------------------------------------------------------------


def test_requests_are_admitted_in_order_while_slots_last() -> None:
    scheduler = make_scheduler(*(make_request(n) for n in (3, 4, 5, 6)), cache=make_cache(slots=2))
    scheduler.admit()
    assert [row.slot for row in scheduler.running] == [0, 1]
    scheduler.drop(scheduler.running[0])
    scheduler.admit()
    assert [row.slot for row in scheduler.running] == [1, 2]


def test_a_large_request_is_not_overtaken_by_a_small_one() -> None:
    scheduler = make_scheduler(make_request(100), make_request(300), make_request(1), cache=make_cache(pages=5))
    scheduler.admit()
    assert [row.slot for row in scheduler.running] == [0]
    scheduler.drop(scheduler.running[0])
    scheduler.admit()
    assert [row.slot for row in scheduler.running] == [1]


def test_a_scheduler_is_busy_while_anything_waits_or_runs() -> None:
    assert not make_scheduler().busy
    scheduler = make_scheduler(make_request(3, new=1))
    assert scheduler.busy
    step(scheduler)
    assert not scheduler.busy


# --- passes -----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fits_is_one_piece_and_chooses() -> None:
    scheduler = make_scheduler(make_request(5))
    assert step(scheduler) == [(0, 0, 5, True)]
    assert step(scheduler) == [(0, -1, 1, True)]


def test_a_long_prompt_is_cut_and_chooses_behind_its_end_only() -> None:
    scheduler = make_scheduler(make_request(25), chunk=10)
    passes = [step(scheduler) for _ in range(4)]
    assert passes == [[(0, 0, 10, False)], [(0, 10, 10, False)], [(0, 20, 5, True)], [(0, -1, 1, True)]]


def test_prompts_fill_the_chunk_in_the_order_of_admission() -> None:
    scheduler = make_scheduler(make_request(6), make_request(7), make_request(8), chunk=10)
    assert step(scheduler) == [(0, 0, 6, True), (1, 0, 4, False)]
    assert step(scheduler) == [(0, -1, 1, True), (1, 4, 3, True), (2, 0, 7, False)]
    assert step(scheduler) == [(0, -1, 1, True), (1, -1, 1, True), (2, 7, 1, True)]


def test_rows_that_decode_go_on_beside_prompts() -> None:
    scheduler = make_scheduler(make_request(3, new=9), make_request(35), cache=make_cache(), chunk=10)
    step(scheduler)
    for _ in range(3):
        assert step(scheduler)[0] == (0, -1, 1, True)


def test_a_pass_of_single_tokens_may_repeat_until_the_first_row_leaves() -> None:
    scheduler = make_scheduler(make_request(3, new=9), make_request(4, new=5))
    scheduler.admit()
    pieces, times = scheduler.compose()
    assert times == 1, "a pass with prompts runs once"
    scheduler.count(pieces, 1)
    pieces, times = scheduler.compose()
    assert times == 4
    scheduler.count(pieces, 4)
    assert [row.slot for row in scheduler.running] == [0]
    assert scheduler.compose()[1] == 4


def test_shared_pages_are_not_computed_again() -> None:
    ids = [7] * (2 * PAGE)
    scheduler = make_scheduler(make_request([*ids, 1, 2]), make_request([*ids, 3]), chunk=1000)
    assert step(scheduler) == [(0, 0, 2 * PAGE + 2, True), (1, 2 * PAGE, 1, True)]


def test_whoever_shares_a_page_waits_until_it_is_computed() -> None:
    ids = [7] * (2 * PAGE)
    scheduler = make_scheduler(make_request([*ids, 1]), make_request([*ids, 2]), chunk=PAGE)
    passes = [step(scheduler) for _ in range(3)]
    first = [(0, 0, PAGE, False)], [(0, PAGE, PAGE, False)]
    assert passes == [*first, [(0, 2 * PAGE, 1, True), (1, 2 * PAGE, 1, True)]]


# --- the end of a row -------------------------------------------------------------------------------------------------


def test_a_row_leaves_when_its_last_step_is_scheduled() -> None:
    cache = make_cache(slots=1)
    scheduler = make_scheduler(make_request(3, new=3), make_request(4), cache=cache)
    for _ in range(3):
        assert step(scheduler)[0][0] == 0
    assert step(scheduler) == [(1, 0, 4, True)], "its slot should be free at once"


def test_a_row_ends_by_its_budget() -> None:
    scheduler = make_scheduler(make_request(3, new=2, end=[END]))
    scheduler.admit()
    row = scheduler.running[0]
    assert [row.read(words(1)), row.read(words(2))] == [False, True]
    assert row.finished
    assert row.finish_reason == "length"
    assert tokens_of(row) == [1, 2]


def test_a_row_reads_several_steps_at_once_and_no_further_than_its_end() -> None:
    for may_end in (True, False):
        scheduler = make_scheduler(make_request(3, new=5, end=[END]), make_request(3, new=5, end=[END]))
        scheduler.admit()
        first, second = scheduler.running
        assert not first.read(words(1, 2), may_end)
        assert first.read(words(3, 4, 5, 6), may_end)
        assert (tokens_of(first), first.steps, first.finish_reason) == ([1, 2, 3, 4, 5], 5, "length")
    assert second.read(words(1, END, 2, 3))
    assert (tokens_of(second), second.steps, second.finish_reason) == ([1, END], 2, "stop")


def test_a_row_ends_at_its_end_token_which_it_keeps() -> None:
    scheduler = make_scheduler(make_request(3, new=9, end=[END, END + 1]))
    scheduler.admit()
    row = scheduler.running[0]
    row.read(words(1))
    row.read(words(END + 1))
    assert row.finish_reason == "stop"
    scheduler.drop(row)
    assert scheduler.running == []


@pytest.mark.parametrize("token", [1, END])
def test_a_row_whose_scores_are_not_finite_has_no_finish_reason(token: int) -> None:
    scheduler = make_scheduler(make_request(3, new=1, end=[END]))
    scheduler.admit()
    row = scheduler.running[0]
    row.read(words(token, finite=False))
    assert row.finished
    assert row.finish_reason is None


def test_dropping_a_row_that_has_left_by_itself_does_nothing() -> None:
    cache = make_cache(slots=2)
    scheduler = make_scheduler(make_request(3, new=1), make_request(4, new=9), cache=cache)
    scheduler.admit()
    row = scheduler.running[0]
    step(scheduler)
    scheduler.drop(row)
    scheduler.drop(row)
    assert [other.slot for other in scheduler.running] == [1]
    scheduler.close()
    assert_all_free(cache)


def test_closing_gives_everything_back_and_forgets_what_was_not_computed() -> None:
    cache = make_cache()
    ids = [7] * (2 * PAGE)
    scheduler = make_scheduler(make_request([*ids, 1]), make_request(4), make_request(5), cache=cache, chunk=PAGE)
    step(scheduler)
    scheduler.close()
    assert not scheduler.busy
    assert_all_free(cache)
    again = cache.lease([*ids, 1], 3 * PAGE)
    assert again is not None
    assert again.shared == 0


# --- whatever happens -------------------------------------------------------------------------------------------------


class Device:
    """What passes leave in the cache: of each place, for which tokens it was computed."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], object] = {}

    def run(self, pieces: Sequence[Piece], times: int) -> None:
        """Write all keys of a pass, then read them, as the kernels do."""
        for piece in pieces:
            assert piece.start in (-1, piece.row.computed)
            for position in range(piece.row.computed, piece.row.computed + piece.count * times):
                self._places[self._place(piece.row, position)] = self._content(piece.row, position)
        for piece in pieces:
            for position in range(piece.row.computed + piece.count * times):
                found = self._places.get(self._place(piece.row, position))
                assert found == self._content(piece.row, position), "read before it was written, or somebody else's"

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.lease.pages[position // PAGE], position % PAGE

    def _content(self, row: Row, position: int) -> object:
        if position >= len(row.given):
            return row.slot, position  # an answer is nobody else's
        # prompts here are told apart by the first token of each page, and by what follows the last full one
        return row.given[: position + 1 : PAGE], row.given[position]


def run_all(scheduler: Scheduler, draw: Callable[[], int], delay: int, passes: int | None) -> list[Row]:
    """Run passes and read the log some passes late; return the rows that finished, in the order they did."""
    device, finished = Device(), []
    unread: list[list[Row]] = []
    numbers = count() if passes is None else iter(range(passes))
    while scheduler.busy and next(numbers, None) is not None:
        scheduler.admit()
        pieces, times = scheduler.compose()
        assert pieces, "a pass that does nothing would go on for ever"
        assert sum(piece.count for piece in pieces if piece.start >= 0) <= scheduler._chunk
        device.run(pieces, times)
        scheduler.count(pieces, times)
        unread += [[piece.row for piece in pieces for _ in range(piece.choices)]] * times
        while unread and (len(unread) > delay or not scheduler.busy):
            for row in unread.pop(0):
                if not row.finished and row.read(words(draw())):
                    finished.append(row)
                    scheduler.drop(row)
    return finished


SHAPES = st.tuples(st.lists(st.integers(0, 1), max_size=3), st.integers(1, 40), st.integers(1, 12))
"""Full pages of few contents, further tokens, and a budget."""


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(SHAPES, max_size=8),
    slots=st.integers(1, 4),
    pages=st.integers(5, 12),
    chunk=st.sampled_from([7, 64, 100, 1000]),
    delay=st.integers(0, 9),
    random=st.randoms(use_true_random=False),
    passes=st.none() | st.integers(0, 6),
)
def test_all_slots_and_pages_are_free_after_any_run(
    shapes: list[tuple[list[int], int, int]],
    slots: int,
    pages: int,
    chunk: int,
    delay: int,
    random: Random,
    passes: int | None,
) -> None:
    cache = make_cache(pages, slots)
    prompts = [[*(t for page in full for t in [page] * PAGE), *range(100, 100 + rest)] for full, rest, _ in shapes]
    requests = [make_request(ids, new, [END]) for ids, (_, _, new) in zip(prompts, shapes, strict=True)]
    # some are given their answer
    answers = [(1,) * one.params.max_new_tokens if random.random() < 0.3 else () for one in requests]
    tasks = [Task(slot, *task) for slot, task in enumerate(zip(requests, answers, strict=True))]
    scheduler = scheduler_of(tasks, cache=cache, chunk=chunk)
    finished = run_all(scheduler, lambda: END if random.random() < 0.1 else 1, delay, passes)
    if passes is None:
        assert sorted(row.slot for row in finished) == [*range(len(requests))]
    for row in finished:
        ended = [token == END for token in tokens_of(row)]
        if row.task.answer:
            assert len(ended) == len(row.task.answer)
            assert row.finish_reason == "length"
            continue
        assert not any(ended[:-1])
        assert row.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(ended) == row.request.params.max_new_tokens
    scheduler.close()
    assert not scheduler.busy
    assert_all_free(cache)
