"""The contract of ``stablegen.store.base.Store``: run it on a store of your own by one subclass with ``make``."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stablegen.errors import CacheError
from stablegen.store.base import Store

LARGE = 5 * 2**20
TRICKY = [
    "a%",
    "a_",
    "a*",
    "a[b]",
    "a?",
    "a'",
    'a"',
    "a\\",
    "a/",
    "a:",
    "A",
    "ä",
    "a\0b",
    "a\U0010ffff",
    "a\U0010ffffb",
]


class Failing(Mapping[str, bytes]):
    """Entries of which the last cannot be had."""

    def __init__(self, entries: Mapping[str, bytes]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> bytes:
        if name == list(self._entries)[-1]:
            raise OSError("no more")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class StoreContract(ABC):
    """What every store promises; the tests of a store inherit them."""

    @abstractmethod
    def make(self, folder: Path) -> Store:
        """Return a new, empty store, which may write below an empty folder."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with closing(self.make(tmp_path)) as made:
            yield made

    def test_it_has_every_method(self, store: Store) -> None:
        assert isinstance(store, Store)

    def test_where_it_is_can_be_told(self, store: Store) -> None:
        where = store.where
        assert isinstance(where, str)
        assert where
        store.close()
        assert store.where == where

    def test_a_new_store_is_empty(self, store: Store) -> None:
        assert list(store.names()) == []
        assert store.get("record/1") is None
        assert store.size() >= 0

    @pytest.mark.parametrize(
        "data",
        [b"", b"\0", bytes(range(256)), b"text", b"x" * 40_000, bytes(LARGE)],
        ids=["empty", "null", "any", "text", "40 KB", "5 MB"],
    )
    def test_bytes_of_any_kind_and_size_come_back(self, data: bytes, store: Store) -> None:
        store.put({"before": b"before", "record/1": data, "after": b"after"})
        found = store.get("record/1")
        assert type(found) is bytes
        assert found == data
        assert (store.get("before"), store.get("after")) == (b"before", b"after")

    def test_other_names_are_absent(self, store: Store) -> None:
        store.put({"record/1": b"x"})
        for name in ("record/", "record/11", "RECORD/1", "record/1 ", "", "\udcff"):
            assert store.get(name) is None

    def test_nothing_may_be_written(self, store: Store) -> None:
        store.put({})
        assert list(store.names()) == []

    def test_names_are_in_the_order_of_their_first_writing(self, store: Store) -> None:
        store.put({"c": b"1", "a": b"2"})
        store.put({"b": b"3"})
        assert list(store.names()) == ["c", "a", "b"]

    @pytest.mark.parametrize("size", [3, LARGE])
    def test_what_is_replaced_keeps_its_place(self, size: int, store: Store) -> None:
        store.put({"c": b"1" * size, "a": b"2"})
        store.put({"b": b"3"})
        store.put({"d": b"4", "c": b"5" * (size - 1)})
        assert list(store.names()) == ["c", "a", "b", "d"]
        assert store.get("c") == b"5" * (size - 1)

    def test_a_prefix_is_taken_letter_by_letter(self, store: Store) -> None:
        store.put({name: name.encode() for name in TRICKY})
        assert list(store.names()) == TRICKY
        assert list(store.names("a")) == [name for name in TRICKY if name.startswith("a")]
        for name in TRICKY:
            assert store.get(name) == name.encode()
            assert list(store.names(name)) == [other for other in TRICKY if other.startswith(name)]
        assert list(store.names("b")) == list(store.names("a%%")) == list(store.names("\udcff")) == []

    @given(
        st.lists(
            st.dictionaries(st.text("ab/é\0\U0010ffff", max_size=4) | st.text(max_size=3), st.binary(max_size=9)),
            max_size=4,
        ),
        st.text("ab/é\0\U0010ffff", max_size=2),
    )
    @settings(
        max_examples=30,
        deadline=None,
        # the store is emptied for each example, and every subclass runs this function
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    def test_it_is_a_dictionary(self, store: Store, written: list[dict[str, bytes]], prefix: str) -> None:
        store.clear()
        expected: dict[str, bytes] = {}
        for entries in written:
            store.put(entries)
            expected.update(entries)
        assert {name: store.get(name) for name in store.names()} == expected
        assert list(store.names()) == list(expected)
        assert list(store.names(prefix)) == [name for name in expected if name.startswith(prefix)]

    @pytest.mark.parametrize("size", [3, LARGE])
    def test_all_are_written_or_none(self, size: int, store: Store) -> None:
        store.put({"old": b"1" * size})
        entries = {"new": b"2" * size, "old": b"3" * size, "last": b"4"}
        with pytest.raises((OSError, CacheError)):
            store.put(Failing(entries))
        assert list(store.names()) == ["old"]
        assert store.get("old") == b"1" * size
        assert store.get("new") is None
        store.put(entries)
        assert list(store.names()) == ["old", "new", "last"]
        assert store.get("old") == b"3" * size

    def test_what_was_handed_in_may_change_later(self, store: Store) -> None:
        entries = {"a": b"1"}
        store.put(entries)
        entries["b"] = b"2"
        names = store.names()
        store.put({"c": b"3"})
        assert list(names) == ["a"]
        assert list(store.names()) == ["a", "c"]

    def test_threads_may_share_it(self, store: Store) -> None:
        failures: list[BaseException] = []
        start = threading.Barrier(4)

        def work(number: int) -> None:
            try:
                start.wait()
                for turn in range(15):
                    data = b"%d" % turn * 10_000
                    store.put({f"{number}/{turn}": data, "shared": data})
                    assert store.get(f"{number}/{turn}") == data
                    assert (store.get("shared") or b"")[-1:].isdigit()
                    assert len(store.names(f"{number}/")) == turn + 1
                    assert store.size() > 0
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(store.names()) == 4 * 15 + 1

    def test_a_name_that_is_being_replaced_is_always_there(self, store: Store) -> None:
        values = {b"%d" % digit * 40_000 for digit in range(10)}
        store.put({"a": next(iter(values))})
        done = threading.Event()

        def replace_it() -> None:
            for _ in range(15):
                for data in values:
                    store.put({"a": data})
            done.set()

        thread = threading.Thread(target=replace_it)
        thread.start()
        seen = {store.get("a")}
        try:
            while not done.is_set():
                seen.add(store.get("a"))
        finally:
            thread.join()
        assert seen <= values

    def test_clear_removes_everything(self, store: Store) -> None:
        store.put({f"record/{number}": b"x" * 40_000 for number in range(120)})
        full = store.size()
        store.clear()
        assert list(store.names()) == []
        assert store.get("record/1") is None
        assert store.size() < full
        store.put({"record/2": b"y", "record/1": b"z"})
        assert list(store.names()) == ["record/2", "record/1"]

    def test_its_size_grows_with_what_it_holds(self, store: Store) -> None:
        sizes = [store.size()]
        for number in range(3):
            store.put({f"record/{number}": bytes(200_000), f"flag/{number}": bytes(9000)})
            sizes.append(store.size())
        growth = [after - before for before, after in pairwise(sizes)]
        assert len(growth) == 3
        assert all(200_000 <= grown < 400_000 for grown in growth), growth

    def test_a_closed_store_says_so(self, store: Store) -> None:
        store.put({"a": b"1"})
        store.close()
        store.close()
        actions: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.get("b"),
            lambda: store.put({"b": b"2"}),
            store.names,
            lambda: store.names("a"),
            store.size,
            store.clear,
        ]
        for action in actions:
            with pytest.raises(CacheError, match="is closed"):
                action()
