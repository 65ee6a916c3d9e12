"""The store on disk: no pickle in either direction, nothing lost, and damage reported instead of served."""

from __future__ import annotations

import os
import pickle
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import diskcache
import pytest
from store.planted import Bomb, fill, plant, replace, sql

from stablegen.core.request import SCHEMA
from stablegen.errors import (
    CacheDirectoryError,
    CacheError,
    CacheSchemaError,
    CacheWriteError,
    CorruptEntryError,
)
from stablegen.store.disk import BytesDisk, DiskStore

LARGE = b"large" * 10_000
"""diskcache keeps values of this size in files."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with closing(DiskStore(tmp_path / "cache")) as opened:
        yield opened


def files(store: DiskStore) -> list[bytes]:
    """Return what stands in the files of large values."""
    return sorted(path.read_bytes() for path in store.path.rglob("*.val"))


def user_version(store: DiskStore, change: int | None = None) -> int:
    with closing(sqlite3.connect(store.path / "cache.db")) as connection:
        if change is not None:
            connection.execute(f"PRAGMA user_version = {change}")
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


# -- the directory, and what stays in it -----------------------------------------------------------------------


def test_where_it_is(tmp_path: Path) -> None:
    with closing(DiskStore(tmp_path / "cache")) as store:
        assert (store.path, store.where, store.size_limit) == (tmp_path / "cache", str(tmp_path / "cache"), None)


def test_entries_are_there_when_it_is_opened_again(store: DiskStore) -> None:
    store.put({"b": b"1", "a": LARGE})
    store.close()
    with closing(DiskStore(store.path)) as again:
        assert again.names() == ["b", "a"]
        assert (again.get("b"), again.get("a")) == (b"1", LARGE)


def test_the_directory_is_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        DiskStore(tmp_path / "new" / "cache").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "cache").stat().st_mode) == 0o700


def test_a_cache_opened_to_others_is_closed_again(store: DiskStore) -> None:
    store.path.chmod(0o755)
    DiskStore(store.path).close()
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700


def test_nothing_is_evicted_unless_asked(store: DiskStore) -> None:
    assert store._cache.eviction_policy == "none"
    assert store._cache.cull_limit == 0
    assert store._cache.size_limit >= 2**60
    # diskcache's own limit would be 1 GiB; whatever it says, no row goes
    store._cache.reset("size_limit", 1)
    store.put({f"record/{token}": b"x" * 700 for token in range(50)})
    store.put({"record/99": b"x"})
    assert len(store.names()) == 51


def test_a_size_limit_is_kept(tmp_path: Path) -> None:
    limit = 200_000
    with closing(DiskStore(tmp_path, size_limit=limit)) as store:
        for token in range(60):
            store.put({f"record/{token}": bytes(10_000)})
        kept = store.names()
        assert store.size_limit == limit
        assert store.size() < 2 * limit
        assert 5 < len(kept) < 40
        assert kept[-1] == "record/59"  # the oldest go first
        assert all(name.startswith("record/") for name in kept)


def test_a_closed_store_does_not_open_again(store: DiskStore) -> None:
    store.put({"a": b"1"})
    store.close()
    for action in (lambda: store.get("a"), store.names, lambda: store.put({"a": b"2"})):
        with pytest.raises(CacheError, match=rf"{store.path} is closed\. Open it again"):
            action()
    store.close()
    assert store.where == str(store.path)


# -- no pickle ---------------------------------------------------------------------------------------------------


def test_a_planted_pickle_never_runs(store: DiskStore, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(marker))
    store.put({"sound": b"1"})
    plant(store, "value", bomb, mode=4)
    plant(store, bomb, b"x", raw=0)  # a key
    with pytest.raises(CorruptEntryError, match=r"pickled.*not read"):
        store.get("value")
    names = store.names()
    assert names[:2] == ["sound", "value"]
    assert len(names) == 3
    with pytest.raises(CorruptEntryError, match=r"pickled.*not read"):
        store.get(names[2])
    assert store.get("sound") == b"1"
    store.put({"value": b"2"})
    assert store.get("value") == b"2"
    store.clear()
    assert store.names() == []
    assert not marker.exists()


def test_the_same_pickle_would_run_under_plain_diskcache(store: DiskStore, tmp_path: Path) -> None:
    plant(store, "record/x", pickle.dumps(Bomb(tmp_path / "ran")), mode=4)
    with closing(diskcache.Cache(str(store.path))) as plain:
        plain.get("record/x")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("key", "value"), [(5, b"x"), (("a",), b"x"), ("a", "text"), ("a", 5), ("a", None)])
def test_nothing_but_text_and_bytes_is_written(key: Any, value: Any, tmp_path: Path) -> None:
    with closing(diskcache.Cache(str(tmp_path), disk=BytesDisk)) as cache, pytest.raises(TypeError, match="not "):
        cache.set(key, value)


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "mode", "why"),
    [
        ("text", 3, "foreign kind"),
        (None, 3, "foreign kind"),
        (b"x", 9, "foreign kind"),
        (12, 1, "not bytes"),
        ("text", 1, "not bytes"),
    ],
)
def test_a_value_of_another_kind_is_corrupt(value: Any, mode: int, why: str, store: DiskStore) -> None:
    store.put({"a": b"1", "b": b"2"})
    replace(store, "a", value, mode=mode)
    with pytest.raises(CorruptEntryError, match=why):
        store.get("a")
    assert store.get("b") == b"2"
    assert store.names() == ["a", "b"]


def test_text_that_cannot_be_decoded_is_corrupt(store: DiskStore) -> None:
    store.put({"a": b"1"})
    sql(store, "UPDATE Cache SET value = CAST(X'FF' AS TEXT) WHERE key = 'a'")
    with pytest.raises(CorruptEntryError, match="cannot be decoded"):
        store.get("a")


def test_keys_that_cannot_be_read_are_listed_under_other_names(store: DiskStore) -> None:
    store.put({"record/1": b"x"})
    for key, raw in ((b"record/2", 1), (7, 1), (2.5, 1), (b"pickled", 0), ("record/3", 0)):
        plant(store, key, b"x", raw=raw)
    plant(store, "record/4", b"x")
    sql(store, "UPDATE Cache SET key = CAST(X'7265636F72642FFF' AS TEXT) WHERE key = 'record/4'")  # record/ and FF
    names = store.names()
    assert names[0] == "record/1"
    assert len(set(names)) == 7
    assert store.names("record/") == ["record/1"]
    unreadable = names[1:]
    for name in unreadable:
        assert name.startswith("unreadable:")
        with pytest.raises(CorruptEntryError, match="not text"):
            store.get(name)
    store.clear()
    assert store.names() == []
    assert store.get(unreadable[0]) is None


def test_a_lost_file_is_corrupt(store: DiskStore) -> None:
    store.put({"a": LARGE})
    (file,) = store.path.rglob("*.val")
    file.unlink()
    with pytest.raises(CorruptEntryError, match="file that held its bytes is gone"):
        store.get("a")
    store.put({"a": LARGE})
    assert store.get("a") == LARGE


@pytest.mark.parametrize("make", [str, lambda path: os.path.relpath(path, path.parent / "cache")], ids=["full", "dots"])
def test_a_file_elsewhere_is_neither_read_nor_removed(
    make: Callable[[Path], str], store: DiskStore, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    assert (store.path / make(precious)).exists()
    plant(store, "a", None, mode=2, file=make(precious))
    with pytest.raises(CorruptEntryError, match="not the cache's"):
        store.get("a")
    store.put({"a": b"1"})
    assert store.get("a") == b"1"
    plant(store, "b", None, mode=2, file=make(precious))
    store.clear()
    assert precious.read_bytes() == b"x"


def test_a_newer_cache_is_refused(store: DiskStore) -> None:
    user_version(store, SCHEMA + 1)
    with pytest.raises(CacheSchemaError, match=f"schema {SCHEMA + 1}.*up to {SCHEMA}.*Upgrade stablegen"):
        DiskStore(store.path)


def test_an_older_cache_is_opened_and_marked(store: DiskStore) -> None:
    assert user_version(store) == SCHEMA
    store.put({"record:1": b"x"})
    user_version(store, SCHEMA - 1)
    with closing(DiskStore(store.path)) as again:
        assert again.names() == ["record:1"]
    assert user_version(store) == SCHEMA


# -- directories that cannot be used ---------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[Path]:
    """Run as a user who owns nothing, with a directory that is root's: root may write anywhere."""
    if not hasattr(os, "setresuid") or os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextmanager
def as_nobody() -> Iterator[None]:
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_somebody_elses_directory() -> None:
    with nobody() as folder:
        (folder / "cache").mkdir()
        with as_nobody(), pytest.raises(CacheDirectoryError, match=f"{folder}.*ermi.*Choose another cache_dir"):
            DiskStore(folder / "cache")
        with as_nobody(), pytest.raises(CacheDirectoryError, match=f"{folder}.*ermi"):
            DiskStore(folder / "new")


def test_a_read_only_database() -> None:
    with nobody() as folder:
        (folder / "cache").mkdir()
        DiskStore(folder / "cache").close()
        for path in (folder / "cache", *(folder / "cache").iterdir()):
            os.chown(path, 65534, 65534)
        (folder / "cache" / "cache.db").chmod(0o400)
        with as_nobody(), pytest.raises(CacheDirectoryError, match=r"cache\.db is read-only.*Choose another"):
            DiskStore(folder / "cache")
        (folder / "cache" / "cache.db").chmod(0o600)
        with as_nobody():
            DiskStore(folder / "cache").close()


def test_a_read_only_database_by_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # for those who do not run the tests as root, whom the system lets write to everything
    DiskStore(tmp_path).close()
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("cache.db"))
    with pytest.raises(CacheDirectoryError, match=r"cache\.db is read-only"):
        DiskStore(tmp_path)


@pytest.mark.parametrize("inside", ["", "below", "below/more"])
def test_a_file_in_place_of_the_directory(inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheDirectoryError, match=r"file.*Accepted: a directory.*Choose another cache_dir"):
        DiskStore(tmp_path / "file" / inside)
    assert (tmp_path / "file").read_text() == "x"


def test_a_directory_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(CacheDirectoryError, match="holds other files and no cache"):
        DiskStore(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"not SQLite" * 1000)
    with pytest.raises(CacheDirectoryError, match="not a database"):
        DiskStore(tmp_path)


def test_a_database_that_breaks_later_is_a_named_error(store: DiskStore) -> None:
    store.put({"a": b"1"})
    with closing(sqlite3.connect(store.path / "cache.db")) as connection:
        connection.execute("DROP TABLE Cache")
    for action in (lambda: store.get("a"), store.names, lambda: store.names("a")):
        with pytest.raises(CacheDirectoryError, match=r"cannot be read.*Move it away"):
            action()
    for action in (lambda: store.put({"a": b"1"}), store.clear):
        with pytest.raises(CacheWriteError, match=str(store.path)):
            action()


# -- locks and full disks --------------------------------------------------------------------------------------------


@contextmanager
def locked(store: DiskStore, seconds: float) -> Iterator[None]:
    """Hold the write lock for a while, from another connection."""
    with closing(sqlite3.connect(store.path / "cache.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(seconds, other.execute, ["ROLLBACK"])
        timer.start()
        try:
            yield
        finally:
            timer.join()


def test_a_locked_database_is_tried_again(store: DiskStore) -> None:
    store._cache._con.execute("PRAGMA busy_timeout = 0")  # else SQLite waits by itself, and nothing is retried
    with locked(store, 0.7):
        started = time.monotonic()
        store.put({"a": b"1", "b": LARGE})
        assert time.monotonic() - started > 0.5
    assert (store.get("a"), store.get("b")) == (b"1", LARGE)
    assert files(store) == [LARGE]


def test_a_lock_does_not_keep_from_reading(store: DiskStore) -> None:
    store.put({"a": b"1"})
    with locked(store, 0.3):
        assert store.get("a") == b"1"
        assert store.names() == ["a"]


def test_a_database_that_stays_locked_is_a_write_error(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.stop_after_delay", lambda seconds: lambda state: state.attempt_number > 2)
    store._cache._con.execute("PRAGMA busy_timeout = 0")
    with locked(store, 0.5):
        with pytest.raises(CacheWriteError, match="1 entry could not be written"):
            store.put({"a": b"1"})
        with pytest.raises(CacheWriteError, match="could not be emptied"):
            store.clear()
    assert store.get("a") is None


def test_several_processes_open_a_new_cache_at_once(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from stablegen.store.disk import DiskStore
time.sleep(max(0, float(sys.argv[2]) - time.time()))
store = DiskStore(Path(sys.argv[1]))
for token in range(20):
    store.put({f"record/{sys.argv[3]}/{token}": sys.argv[3].encode() * 500})
"""
    start = time.time() + 1.0
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "cache"), str(start)]
    running = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True) for number in range(3)]
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in running] == [("", 0)] * 3
    with closing(DiskStore(tmp_path / "cache")) as store:
        for number in range(3):
            names = store.names(f"record/{number}/")
            assert names == [f"record/{number}/{token}" for token in range(20)]
            assert {store.get(name) for name in names} == {str(number).encode() * 500}


def test_a_full_disk_loses_nothing_stored_before(store: DiskStore) -> None:
    store.put({"small": b"1", "large": LARGE})
    fill(store, spare=5)
    many = {"small": b"2" * 9, "large": LARGE * 2, **{f"record/{token}": bytes(3000) for token in range(18)}}
    with pytest.raises(CacheWriteError, match=r"20 entries could not be written.*full.*Free disk space"):
        store.put(many)
    assert store.names() == ["small", "large"]  # all of a transaction or nothing
    assert (store.get("small"), store.get("large")) == (b"1", LARGE)
    assert files(store) == [LARGE]
    store._cache._sql("PRAGMA max_page_count = 100000")
    store.put(many)
    assert len(store.names()) == 20
    assert files(store) == [LARGE * 2]


def test_a_full_disk_evicts_nothing_that_it_cannot_replace(tmp_path: Path) -> None:
    with closing(DiskStore(tmp_path, size_limit=3 * len(LARGE))) as store:
        store.put({"old": LARGE})
        fill(store)
        with pytest.raises(CacheWriteError):
            store.put({"new": LARGE, "newer": LARGE, **{f"record/{token}": bytes(20_000) for token in range(9)}})
        assert store.names() == ["old"]
        assert store.get("old") == LARGE
        assert files(store) == [LARGE]
