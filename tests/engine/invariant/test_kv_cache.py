"""Who holds which page: leases, sharing, eviction; no model runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stablegen.engine.invariant.kv_cache import TICKS, KVCache, Lease
from stablegen.kernels import log
from stablegen.kernels.base import PAGE


def make_cache(pages: int = 6, slots: int = 3, *, paired: bool = False, dtype: torch.dtype = torch.float16) -> KVCache:
    shape = {"pages": pages, "slots": slots, "context": 4 * PAGE}
    return KVCache(2, 3, 4, **shape, dtype=dtype, device=torch.device("cpu"), paired=paired)


def leased(cache: KVCache, prompt: Sequence[int], new: int = 1) -> Lease:
    lease = cache.lease(prompt, len(prompt) + new)
    assert lease is not None
    return lease


def prompt_of(*pages: int, rest: int = 1) -> list[int]:
    """Return a prompt of full pages, each of one token, and the beginning of another."""
    return [token for token in pages for _ in range(PAGE)] + [999] * rest


def take_all(cache: KVCache, pages: int) -> None:
    """Lease so many pages, all that there are, to requests that share none."""
    leases = [leased(cache, [-1 - i], min(4, pages - i) * PAGE - 1) for i in range(0, pages, 4)]
    assert {page for lease in leases for page in lease.pages} == {*range(1, pages + 1)}
    assert cache.lease([-9], 1) is None
    for lease in leases:
        cache.release(lease)


# --- the tensors ------------------------------------------------------------------------------------------------------


def test_keys_and_values_have_a_spare_page_and_a_spare_slot() -> None:
    cache = make_cache()
    assert cache.keys.shape == cache.values.shape == (2, 7, 3, PAGE, 4)
    assert cache.table.shape == (4, 4)
    assert cache.newest.shape == cache.lengths.shape == (4,)
    assert cache.log.shape == (TICKS, 3, log.WIDTH)
    assert cache.spare == 3
    assert cache.bytes == 2 * 2 * 7 * 3 * PAGE * 4 * 2


def test_pairs_take_the_bytes_of_float32() -> None:
    paired, plain = make_cache(paired=True, dtype=torch.float32), make_cache(dtype=torch.float32)
    assert paired.keys.shape == (2, 2, 7, 3, PAGE, 4)
    assert paired.keys.dtype == torch.float16
    assert paired.bytes == plain.bytes


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_holds_its_positions_and_nobody_elses() -> None:
    cache = make_cache()
    one, two = leased(cache, [1] * 10, PAGE - 10), leased(cache, [1] * 10, PAGE - 9)
    assert len(one.pages) == 1
    assert len(two.pages) == 2
    assert one.slot != two.slot
    assert len({*one.pages, *two.pages}) == 3
    assert 0 not in one.pages + two.pages, "page 0 is spare"
    assert cache.spare not in (one.slot, two.slot)


def test_the_table_reaches_the_device_when_it_is_uploaded() -> None:
    cache = make_cache()
    lease = leased(cache, [1] * 100, 30)
    assert not cache.table.any()
    cache.upload()
    assert cache.table[lease.slot].tolist() == [*lease.pages, 0]
    cache.release(lease)
    other = leased(cache, [2], 1)
    cache.upload()
    assert other.slot == lease.slot
    assert cache.table[other.slot].tolist() == [*other.pages, 0, 0, 0]


def test_the_table_is_uploaded_only_where_it_has_changed() -> None:
    cache = make_cache()
    leased(cache, [1])
    cache.upload()
    cache.table.fill_(-5)
    cache.upload()
    assert (cache.table == -5).all()
    leased(cache, [1])
    cache.upload()
    assert (cache.table >= 0).all()


def test_without_a_slot_there_is_no_lease_until_one_is_released() -> None:
    cache = make_cache(pages=6, slots=2)
    one, _ = leased(cache, [1]), leased(cache, [2])
    assert cache.lease([3], 2) is None
    cache.release(one)
    assert leased(cache, [3]).slot == one.slot


def test_without_pages_there_is_no_lease_until_some_are_released() -> None:
    cache = make_cache(pages=3)
    big, small = leased(cache, [1] * 100, 20), leased(cache, [2])
    assert cache.lease([3], 2) is None
    cache.release(small)
    assert cache.lease([3], PAGE + 1) is None, "a refused lease should take nothing"
    third = leased(cache, [3])
    cache.release(big)
    cache.release(third)
    take_all(cache, 3)


def test_what_could_ever_fit() -> None:
    cache = make_cache(pages=3)
    assert cache.fits(3 * PAGE)
    assert not cache.fits(3 * PAGE + 1)


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_full_pages_of_one_beginning_are_shared() -> None:
    cache = make_cache(pages=8)
    one = leased(cache, prompt_of(1, 2, 3))
    two = leased(cache, prompt_of(1, 2, 4))
    assert one.shared == 0
    assert two.shared == 2 * PAGE
    assert two.pages[:2] == one.pages[:2]
    assert not set(two.pages[2:]) & set(one.pages)


def test_a_page_is_known_by_all_that_stands_before_it() -> None:
    cache = make_cache(pages=8)
    leased(cache, prompt_of(1, 2))
    assert leased(cache, prompt_of(3, 2)).shared == 0


def test_pages_are_shared_after_their_first_user_has_left() -> None:
    cache = make_cache()
    one = leased(cache, prompt_of(1, 2))
    cache.release(one)
    two = leased(cache, prompt_of(1, 2))
    assert two.shared == 2 * PAGE
    assert two.pages[:2] == one.pages[:2]


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1])
def test_the_last_token_of_a_prompt_is_always_computed(length: int) -> None:
    cache = make_cache()
    cache.release(leased(cache, [1] * length))
    again = leased(cache, [1] * length)
    assert again.shared == (length - 1) // PAGE * PAGE
    assert again.shared < length


def test_the_page_of_an_answer_is_known_to_nobody() -> None:
    cache = make_cache()
    cache.release(leased(cache, [1] * 10, 2 * PAGE))
    assert leased(cache, [1] * (PAGE + 1)).shared == 0


def test_a_shared_page_is_given_back_when_its_last_user_leaves() -> None:
    cache = make_cache(pages=4, slots=3)
    one, two = leased(cache, prompt_of(1)), leased(cache, prompt_of(1))
    cache.release(one)
    third = leased(cache, [3])
    assert cache.lease([4], 2 * PAGE) is None
    assert not {*third.pages} & {*two.pages}
    cache.release(two)
    cache.release(third)
    take_all(cache, 4)


def test_idle_shared_pages_are_not_counted_twice() -> None:
    cache = make_cache(pages=3)
    cache.release(leased(cache, prompt_of(1, 2)))
    # three pages are there, and all three are needed: two of them are the very ones it shares
    assert leased(cache, prompt_of(1, 2)).shared == 2 * PAGE
    cache = make_cache(pages=3)
    cache.release(leased(cache, prompt_of(1)))
    leased(cache, prompt_of(2))
    # one page is idle and would be shared: it cannot be the second one too
    assert cache.lease(prompt_of(1), PAGE + 2) is None


# --- eviction ---------------------------------------------------------------------------------------------------------


def test_pages_that_nobody_knows_are_taken_before_idle_ones() -> None:
    cache = make_cache(pages=4)
    cache.release(leased(cache, prompt_of(1)))
    cache.release(leased(cache, [5], 2 * PAGE))
    assert leased(cache, prompt_of(1)).shared == PAGE


def test_the_longest_idle_page_is_evicted_first() -> None:
    cache = make_cache(pages=4)
    for i in (1, 2, 3):  # each holds a page that is known and one that is not
        cache.release(leased(cache, prompt_of(i)))
    cache.release(leased(cache, prompt_of(1)))  # used again: now 2 is idle for longest
    cache.release(leased(cache, [7], 2 * PAGE - 1))  # wants two, one is free
    assert [leased_pages(cache, i) for i in (1, 3, 2)] == [PAGE, PAGE, 0]


def leased_pages(cache: KVCache, first: int) -> int:
    """Return how many positions of a prompt are known; forget what asking made known."""
    lease = leased(cache, prompt_of(first))
    shared = lease.shared
    cache.release(lease, forget=not shared)
    return shared


def test_of_one_prompt_the_end_is_evicted_before_the_beginning() -> None:
    cache = make_cache(pages=4)
    cache.release(leased(cache, prompt_of(1, 2, 3)))
    cache.release(leased(cache, [7], 2 * PAGE - 1))  # one page was free
    assert leased(cache, prompt_of(1, 2, 3)).shared == 2 * PAGE, "without its beginning the end is of no use"


def test_pages_in_use_are_never_evicted() -> None:
    cache = make_cache(pages=4)
    used = leased(cache, prompt_of(1))
    cache.release(leased(cache, prompt_of(2)))
    other = leased(cache, [7], 2 * PAGE - 1)
    assert not {*used.pages} & {*other.pages}
    assert cache.lease([8], 1) is None


# --- forgetting -------------------------------------------------------------------------------------------------------


def test_what_was_never_computed_is_known_to_nobody() -> None:
    cache = make_cache()
    cache.release(leased(cache, prompt_of(1, 2)), forget=True)
    assert leased(cache, prompt_of(1, 2)).shared == 0


def test_a_forgotten_page_stays_with_its_other_user() -> None:
    cache = make_cache(pages=4)
    one, two = leased(cache, prompt_of(1)), leased(cache, prompt_of(1))
    cache.release(one, forget=True)
    third = leased(cache, prompt_of(1), 0)
    assert third.shared == 0
    assert not {*third.pages} & {*two.pages}
    cache.release(two)
    cache.release(third)
    take_all(cache, 4)


def test_a_page_may_be_computed_anew_while_an_older_one_of_the_same_tokens_is_idle() -> None:
    cache = make_cache(pages=6)
    beginning = leased(cache, prompt_of(1))
    cache.release(leased(cache, prompt_of(1, 2)))
    cache.release(beginning, forget=True)  # the page of 1 is forgotten, that of 1 and 2 stays
    again = leased(cache, prompt_of(1, 2))
    assert again.shared == 0
    cache.release(again)
    take_all(cache, 6)


def test_all_that_is_idle_can_be_forgotten() -> None:
    cache = make_cache(pages=6)
    used = leased(cache, prompt_of(1))
    cache.release(leased(cache, prompt_of(1, 2)))
    cache.release(leased(cache, prompt_of(3)))
    cache.forget()
    assert leased(cache, prompt_of(3)).shared == 0
    assert leased(cache, prompt_of(1)).pages[0] == used.pages[0], "what somebody holds is still right"
    cache = make_cache(pages=6)
    cache.release(leased(cache, prompt_of(1, 2)))
    cache.forget()
    take_all(cache, 6)


# --- whatever happens -------------------------------------------------------------------------------------------------

PROMPTS = st.lists(st.integers(0, 2), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 70), st.integers(0, 3), st.booleans()), max_size=40))
def test_no_page_has_two_owners_and_none_is_lost(steps: list[tuple[list[int], int, int, bool]]) -> None:
    cache = make_cache(pages=7, slots=3)
    held: list[Lease] = []
    owners: dict[int, list[int]] = {}  # page -> the tokens that it was leased for
    for pages, new, which, forget in steps:
        prompt = prompt_of(*pages)
        lease = cache.lease(prompt, min(len(prompt) + new, 4 * PAGE))
        if lease is None:
            if held:
                cache.release(held.pop(which % len(held)), forget=forget)
            continue
        held.append(lease)
        fresh = lease.pages[lease.shared // PAGE :]
        others = {page for other in held[:-1] for page in other.pages}
        assert not others & {*fresh}
        assert len({*lease.pages}) == len(lease.pages)
        assert len({other.slot for other in held}) == len(held)
        assert {*lease.pages} <= {*range(1, 8)}
        for index, page in enumerate(lease.pages):
            content = prompt[: (index + 1) * PAGE]
            if index < lease.shared // PAGE:
                assert owners[page] == content, "a shared page should hold these very tokens"
            owners[page] = content if (index + 1) * PAGE <= len(prompt) else []
    for lease in held:
        cache.release(lease)
    take_all(cache, 7)
