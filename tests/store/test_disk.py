"""The cache on disk: no pickle in either direction, nothing lost, and damage reported instead of served."""

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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import diskcache
import pytest
from support import audit_report, client, numerics, passed, record, request, untraced

import stablegen.store.disk
from stablegen.core.answer import Verdict
from stablegen.core.flagged import FlaggedHit
from stablegen.core.record import Record
from stablegen.core.request import SCHEMA
from stablegen.errors import CacheDirectoryError, CacheEntryWarning, CacheSchemaError, CacheWriteError
from stablegen.store.codec import encode
from stablegen.store.disk import BytesDisk, DiskStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with closing(DiskStore(tmp_path / "cache")) as opened:
        yield opened


def made(token: int, **changes: Any) -> Record:
    return record(request((token,)), **changes)


def hit(key: str = "5" * 64, **changes: Any) -> FlaggedHit:
    fields = {"key": key, "app": "an app", "prompt": "a prompt", "verdict": Verdict(status="at_risk", reason="r")}
    fields |= {"token": " a", "runner_up": " b", "recorded": "there", "recorded_digest": "1" * 64}
    return FlaggedHit(**(fields | {"current": "here", "current_digest": "2" * 64, "seen": 1.0} | changes))


def sql(store: DiskStore, statement: str, *values: Any) -> None:
    """Do to the database what another program could."""
    with closing(sqlite3.connect(store.path / "cache.db")) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


def plant(store: DiskStore, name: Any, value: Any, *, mode: int = 1, raw: int = 1) -> None:
    columns = "key, raw, store_time, access_time, access_count, tag, size, mode, filename, value"
    sql(store, f"INSERT INTO Cache({columns}) VALUES (?, ?, 0, 0, 0, NULL, 0, ?, NULL, ?)", name, raw, mode, value)


def replace(store: DiskStore, key: str, value: Any, *, mode: int = 1) -> None:
    sql(store, "UPDATE Cache SET value = ?, mode = ? WHERE key = ?", value, mode, f"record:{key}")


# -- what goes in comes out ------------------------------------------------------------------------------------


def test_records_come_back(store: DiskStore) -> None:
    old = untraced(created=1.0)
    first, second = record(created=2.0).superseding(old), made(9)
    store.put([first, second])
    assert store.get(first.key) == first
    assert store.get("0" * 64) is None
    assert list(store.records()) == [first, second]
    assert store.keys() == [first.key, second.key]
    assert store.keys(first.key[:8]) == [first.key]


def test_superseded_is_kept_one_level_deep(store: DiskStore) -> None:
    newest = record(created=1.0)
    for day in (2.0, 3.0, 4.0):
        newest = record(created=day).superseding(newest)
        store.put([newest])
    found = store.get(newest.key)
    assert found is not None
    assert found.superseded is not None
    assert (found.created, found.superseded.created, found.superseded.superseded) == (4.0, 3.0, None)


def test_flags_and_checks_come_back(store: DiskStore) -> None:
    store.flag([hit(seen=1.0)])
    store.flag([hit("6" * 64)])
    store.flag([hit(seen=2.0)])  # the same request under the same numerics
    assert [(found.key[0], found.seen) for found in store.flagged()] == [("5", 2.0), ("6", 1.0)]
    check = passed(numerics())
    store.put_check("a name", check)
    assert store.get_check("a name") == check
    assert store.get_check("another") is None
    assert store.checks() == [check]


def test_of_each_name_the_newest_audit_stays(store: DiskStore) -> None:
    early, late = audit_report(made=1.0), audit_report(made=3.0)
    other = audit_report(made=2.0, numerics=numerics(dtype="bfloat16"))
    for name, report in (("one", early), ("one", late), ("another", other)):
        store.put_audit(name, report)
    assert store.audits() == [other, late]
    assert store.stats().audits == 2
    assert store.clear() == 0
    assert store.audits() == []


def test_an_audit_that_cannot_be_read_is_reported(store: DiskStore) -> None:
    plant(store, "audit:bad", b'{"model": 1}')
    store.put_audit("good", audit_report())
    with pytest.warns(CacheEntryWarning, match="audit:bad"):
        assert store.audits() == [audit_report()]


def test_large_records_come_back(store: DiskStore) -> None:
    large = record(margins=[1.0] * 3000)
    store.put([large])
    assert store.get(large.key) == large


def test_stats_and_clear(store: DiskStore) -> None:
    store.put([made(1), made(2)])
    store.flag([hit()])
    store.put_check("a", passed(numerics()))
    plant(store, "foreign", b"x")
    stats = store.stats()
    assert (stats.records, stats.flagged_hits, stats.self_checks, stats.foreign) == (2, 1, 1, 1)
    assert stats.size > 0
    assert store.clear() == 2
    assert list(store.records()) == []
    stats = store.stats()
    assert (stats.records, stats.flagged_hits, stats.self_checks, stats.foreign) == (0, 0, 0, 0)


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
    store.put([made(token) for token in range(50)])
    store.put([made(99)])
    assert store.stats().records == 51


def test_a_size_limit_is_kept(tmp_path: Path) -> None:
    limit = 200_000
    with closing(DiskStore(tmp_path, size_limit=limit)) as store:
        for token in range(60):
            store.put([record(request((token,)), margins=[1.0] * 400)])  # some 10 KB each
        kept = store.keys()
        stats = store.stats()
        assert stats.size_limit == limit
        assert stats.size < 2 * limit
        assert 5 < stats.records < 40
        assert kept[-1] == request((59,)).key  # the oldest go first
        assert stats.foreign == 0


# -- no pickle ---------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_a_planted_pickle_never_runs(store: DiskStore, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(marker))
    sound, planted = made(1), made(2)
    store.put([sound])
    plant(store, f"record:{planted.key}", bomb, mode=4)  # a value
    plant(store, bomb, b"x", raw=0)  # a key
    plant(store, "flag:x", bomb, mode=4)
    plant(store, "check:x", bomb, mode=4)

    with pytest.warns(CacheEntryWarning, match=f"{planted.key}.*pickled.*not read"):
        assert store.get(planted.key) is None
    with pytest.warns(CacheEntryWarning):
        assert list(store.records()) == [sound]
    with pytest.warns(CacheEntryWarning):
        assert store.flagged() == []
    with pytest.warns(CacheEntryWarning):
        assert store.checks() == []
    stats = store.stats()
    assert (stats.records, stats.foreign) == (2, 1)
    store.put([planted])
    assert store.get(planted.key) == planted
    store.clear()
    assert not marker.exists()


def test_the_same_pickle_would_run_under_plain_diskcache(store: DiskStore, tmp_path: Path) -> None:
    plant(store, "record:x", pickle.dumps(Bomb(tmp_path / "ran")), mode=4)
    with closing(diskcache.Cache(str(store.path))) as plain:
        plain.get("record:x")
    assert (tmp_path / "ran").exists()


def test_a_planted_pickle_is_a_reported_miss_for_the_client(tmp_path: Path) -> None:
    with client(tmp_path / "cache") as asking:
        first = asking.complete("Hello", max_new_tokens=1)
        store = DiskStore(asking.store.path)
        replace(store, first.key, pickle.dumps(Bomb(tmp_path / "ran")), mode=4)
        store.close()
        with pytest.warns(CacheEntryWarning, match="pickled"):
            again = asking.complete("Hello", max_new_tokens=1)
        assert (again.cached, again.token_ids) == (False, first.token_ids)
        assert asking.complete("Hello", max_new_tokens=1).cached
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("key", "value"), [(5, b"x"), (("a",), b"x"), ("a", "text"), ("a", 5), ("a", None)])
def test_nothing_but_text_and_bytes_is_written(key: Any, value: Any, tmp_path: Path) -> None:
    with closing(diskcache.Cache(str(tmp_path), disk=BytesDisk)) as cache, pytest.raises(TypeError, match="not "):
        cache.set(key, value)


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "mode", "why"),
    [
        (b"", 1, "not a stablegen record"),
        (b"other bytes" * 20, 1, "not a stablegen record"),
        (encode(made(1))[:-1], 1, "digest"),
        (encode(made(2)), 1, made(2).key),
        ("text", 3, "foreign kind"),
        (12, 1, "not bytes"),
        (encode(made(1))[:5] + bytes([SCHEMA + 1]) + encode(made(1))[6:], 1, f"schema {SCHEMA + 1}"),
    ],
    ids=["empty", "foreign", "cut", "another's", "text", "number", "newer"],
)
def test_a_damaged_entry_is_a_reported_miss(value: Any, mode: int, why: str, store: DiskStore) -> None:
    store.put([made(1), made(3)])
    replace(store, made(1).key, value, mode=mode)
    with pytest.warns(CacheEntryWarning, match=f"{made(1).key}.*ignored.*{why}"):
        assert store.get(made(1).key) is None
    with pytest.warns(CacheEntryWarning):
        assert list(store.records()) == [made(3)]


def test_a_lost_file_is_a_reported_miss(store: DiskStore) -> None:
    large = record(margins=[1.0] * 3000)  # diskcache keeps values of this size in files
    store.put([large])
    (file,) = store.path.rglob("*.val")
    file.unlink()
    with pytest.warns(CacheEntryWarning, match=large.key):
        assert store.get(large.key) is None


def test_a_damaged_flag_or_check_is_reported(store: DiskStore) -> None:
    plant(store, "flag:x", b"{}")
    plant(store, "check:x", b"no json")
    with pytest.warns(CacheEntryWarning, match="flag:x"):
        assert store.flagged() == []
    with pytest.warns(CacheEntryWarning, match="check:x"):
        assert store.get_check("x") is None


def test_a_newer_cache_is_refused(store: DiskStore) -> None:
    with closing(sqlite3.connect(store.path / "cache.db")) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(CacheSchemaError, match=f"schema {SCHEMA + 1}.*up to {SCHEMA}.*Upgrade stablegen"):
        DiskStore(store.path)


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
    monkeypatch.setattr(stablegen.store.disk.os, "access", lambda path, mode: not str(path).endswith("cache.db"))
    with pytest.raises(CacheDirectoryError, match=r"cache\.db is read-only"):
        DiskStore(tmp_path)


@pytest.mark.parametrize("inside", ["", "below", "below/more"])
def test_a_file_in_place_of_the_directory(inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheDirectoryError, match=r"file.*Accepted: a directory.*Choose another cache_dir"):
        DiskStore(tmp_path / "file" / inside)
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"not SQLite" * 1000)
    with pytest.raises(CacheDirectoryError, match="not a database"):
        DiskStore(tmp_path)


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
        store.put([made(1)])
        assert time.monotonic() - started > 0.5
    assert store.get(made(1).key) == made(1)


def test_a_lock_does_not_keep_from_reading(store: DiskStore) -> None:
    store.put([made(1)])
    with locked(store, 0.3):
        assert store.get(made(1).key) == made(1)


def test_a_database_that_stays_locked_is_a_write_error(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.stop_after_delay", lambda seconds: lambda state: state.attempt_number > 2)
    store._cache._con.execute("PRAGMA busy_timeout = 0")
    with locked(store, 0.5), pytest.raises(CacheWriteError, match="could not be written"):
        store.put([made(1)])
    assert store.get(made(1).key) is None


def test_several_processes_open_a_new_cache_at_once(tmp_path: Path) -> None:
    code = """
import sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from support import record, request
from stablegen.store.disk import DiskStore
time.sleep(max(0, float(sys.argv[2]) - time.time()))
store = DiskStore(Path(sys.argv[1]))
for token in range(20):
    store.put([record(request((int(sys.argv[4]), token)))])
"""
    start = time.time() + 1.5
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        code,
        str(tmp_path / "cache"),
        str(start),
        str(Path(__file__).parents[1]),
    ]
    running = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True) for number in range(3)]
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in running] == [("", 0)] * 3
    with closing(DiskStore(tmp_path / "cache")) as store:
        assert store.stats().records == len(list(store.records())) == 60


def fill(store: DiskStore, *, spare: int = 0) -> None:
    """Let the database grow by ``spare`` pages of 4 KB and no further, as on a full disk."""
    (pages,) = store._cache._sql("PRAGMA page_count").fetchone()
    assert store._cache._sql(f"PRAGMA max_page_count = {pages + spare}").fetchone() == (pages + spare,)


def test_a_full_disk_loses_nothing_stored_before(store: DiskStore) -> None:
    store.put([made(1)])
    fill(store, spare=5)
    many = [record(request((2, token)), margins=[1.0] * 100) for token in range(20)]
    with pytest.raises(CacheWriteError, match=r"20 entries could not be written.*full.*Free disk space"):
        store.put(many)
    assert list(store.records()) == [made(1)]  # all of a transaction or nothing
    store._cache._sql("PRAGMA max_page_count = 100000")
    store.put(many)
    assert len(store.keys()) == 21


def test_a_full_disk_hands_out_what_was_computed(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        kept = asking.complete("Hello", max_new_tokens=1)
        assert isinstance(asking.store, DiskStore)
        fill(asking.store)
        prompts = [f"{number} " * 300 for number in range(1, 9)]
        with pytest.raises(CacheWriteError) as told:
            asking.complete(["Hello", *prompts], max_new_tokens=1)
        computed = told.value.completions
        assert computed[0].key == kept.key
        assert len(computed) > 1
        assert all(len(completion.token_ids) == 1 for completion in computed)
        assert asking.complete("Hello", max_new_tokens=1).cached
        asking.store._cache._sql("PRAGMA max_page_count = 100000")
        assert len(asking.complete(["Hello", *prompts], max_new_tokens=1)) == 9
