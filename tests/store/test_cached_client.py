"""A client whose cache on disk is damaged or full."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from store.planted import Bomb, fill, replace
from support import client

from stablegen.errors import CacheEntryWarning, CacheWriteError
from stablegen.store.disk import DiskStore


def test_a_planted_pickle_is_a_reported_miss(tmp_path: Path) -> None:
    with client(tmp_path / "cache") as asking:
        first = asking.complete("Hello", max_new_tokens=1)
        assert isinstance(asking.cache.store, DiskStore)
        replace(asking.cache.store, f"record/{first.key}", pickle.dumps(Bomb(tmp_path / "ran")), mode=4)
        with pytest.warns(CacheEntryWarning, match="pickled"):
            again = asking.complete("Hello", max_new_tokens=1)
        assert (again.cached, again.token_ids) == (False, first.token_ids)
        assert asking.complete("Hello", max_new_tokens=1).cached
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_hands_out_what_was_computed(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        kept = asking.complete("Hello", max_new_tokens=1)
        store = asking.cache.store
        assert isinstance(store, DiskStore)
        fill(store)
        prompts = [f"{number} " * 300 for number in range(1, 9)]
        with pytest.raises(CacheWriteError) as told:
            asking.complete(["Hello", *prompts], max_new_tokens=1)
        computed = told.value.completions
        assert computed[0].key == kept.key
        assert len(computed) > 1
        assert all(len(completion.token_ids) == 1 for completion in computed)
        assert asking.complete("Hello", max_new_tokens=1).cached
        store._cache._sql("PRAGMA max_page_count = 100000")
        assert len(asking.complete(["Hello", *prompts], max_new_tokens=1)) == 9
