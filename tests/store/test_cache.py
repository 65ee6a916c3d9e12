"""The typed cache: what goes in comes out of any store, and damage is reported instead of served."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from store.planted import Bomb, plant, replace
from support import MODEL, audit_report, numerics, passed, python, record, request, untraced

from stablegen.core.calibration import VERSION, Calibration
from stablegen.core.policy import Shape
from stablegen.core.record import Record
from stablegen.core.request import SCHEMA, ModelIdentity
from stablegen.core.verdict import FlaggedHit, SelfCheck, Verdict
from stablegen.errors import CacheDirectoryError, CacheEntryWarning, CacheError, ConfigError
from stablegen.store.base import Store
from stablegen.store.cache import Cache, CacheStats, cache_path, check_size, open_cache
from stablegen.store.codec import encode
from stablegen.store.disk import DiskStore
from stablegen.store.memory import MemoryStore

HUB = ModelIdentity(source="hub", repo="an/owner", commit="c" * 40)
BFLOAT16 = numerics(dtype="bfloat16")
OLDER = ("record:", "flag:", "check:", "calibration:", "audit:")


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with closing(DiskStore(tmp_path / "cache") if request.param == "disk" else MemoryStore()) as opened:
        yield opened


@pytest.fixture
def cache(store: Store) -> Cache:
    return Cache(store)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    with closing(DiskStore(tmp_path / "cache")) as opened:
        yield opened


def made(token: int, **changes: Any) -> Record:
    return record(request((token,)), **changes)


def hit(key: str = "5" * 64, *, proof: bool = False, **changes: Any) -> FlaggedHit:
    verdict = Verdict(status="at_risk", reason="r", basis="verified" if proof else "prior")
    fields: dict[str, Any] = {"key": key, "app": "an app", "prompt": "a prompt", "verdict": verdict}
    fields |= {"token": " a", "runner_up": " b", "recorded": "there", "recorded_digest": "1" * 64}
    return FlaggedHit(**(fields | {"current": "here", "current_digest": "2" * 64, "seen": 1.0} | changes))


def calibration(**changes: Any) -> Calibration:
    fields: dict[str, Any] = {"model": MODEL, "recorded": numerics(), "current": BFLOAT16, "prompts": 2, "steps": 9}
    fields |= {"flips": 1, "ties": 0, "tie_flips": 0, "power": 0.5, "grid": False, "sizes": (0.1, 0.2)}
    fields |= dict.fromkeys(("above", "from_on", "near_above", "near_from_on"), (0.5, 0.0))
    fields |= {"tail_from": 0.2, "tail_share": 0.1, "tail_shape": 0.3, "tail_scale": 0.1}
    return Calibration(**(fields | changes))


# -- what goes in comes out ------------------------------------------------------------------------------------


def test_records_come_back(cache: Cache) -> None:
    old = untraced(created=1.0)
    first, second = record(created=2.0).superseding(old), made(9)
    cache.put([first, second])
    assert cache.get(first.key) == first
    assert cache.get("0" * 64) is None
    assert list(cache.records()) == [first, second]
    assert cache.keys() == [first.key, second.key]
    assert cache.keys(first.key[:8]) == [first.key]
    assert cache.keys("%") == []


def test_superseded_is_kept_one_level_deep(cache: Cache) -> None:
    newest = record(created=1.0)
    for day in (2.0, 3.0, 4.0):
        newest = record(created=day).superseding(newest)
        cache.put([newest])
    found = cache.get(newest.key)
    assert found is not None
    assert found.superseded is not None
    assert (found.created, found.superseded.created, found.superseded.superseded) == (4.0, 3.0, None)


def test_large_records_come_back(cache: Cache) -> None:
    large = record(margins=[1.0] * 3000)
    cache.put([large])
    assert cache.get(large.key) == large


def test_flags_come_back(cache: Cache) -> None:
    cache.flag([hit(seen=1.0)])
    cache.flag([hit("6" * 64)])
    cache.flag([hit(seen=2.0)])  # the same request under the same numerics
    assert [(found.key[0], found.seen) for found in cache.flagged()] == [("5", 2.0), ("6", 1.0)]


def test_flags_of_another_app_numerics_or_kind_stand_beside_each_other(cache: Cache) -> None:
    flags = [
        hit(),
        hit(proof=True),
        hit(app=None),
        hit(app=""),
        hit(app="None"),
        hit(app="a/proof", proof=True),
        hit(current_digest="3" * 64),
    ]
    cache.flag(flags)
    assert cache.flagged() == flags
    assert cache.stats().flagged_hits == len(flags) == 7


@pytest.mark.parametrize("model", [MODEL, HUB], ids=["digest", "hub"])
def test_self_checks_come_back(model: ModelIdentity, cache: Cache) -> None:
    shapes = [Shape(), Shape(64), Shape(None, 64), Shape(None, None, 64), Shape(64, 256, 0), Shape(64, 256, 64)]
    checks = [
        SelfCheck(numerics=under, shape=shape, passed=True) for shape in shapes for under in (numerics(), BFLOAT16)
    ]
    for check in checks:
        cache.put_self_check(model, check)
    assert cache.self_checks() == checks
    for check in checks:
        assert cache.self_check(model, check.numerics, check.shape) == check
    assert cache.self_check(model, numerics(), Shape(128)) is None
    assert cache.self_check(model, numerics(dtype="float16"), Shape()) is None
    assert cache.self_check(ModelIdentity(source="digest", digest="6" * 64), numerics(), Shape()) is None
    failed = SelfCheck(numerics=numerics(), passed=False, slot_free=True, checks={"a": "b"})
    cache.put_self_check(model, failed)
    assert cache.self_check(model, numerics(), Shape()) == failed
    assert cache.stats().self_checks == len(checks) == 12


def test_a_models_name_is_no_part_of_its_identity(cache: Cache) -> None:
    cache.put_self_check(MODEL, passed(numerics()))
    renamed = MODEL.model_copy(update={"name": "another name"})
    assert cache.self_check(renamed, numerics(), Shape()) == passed(numerics())


def test_calibrations_come_back(cache: Cache) -> None:
    one, back = calibration(), calibration(recorded=BFLOAT16, current=numerics())
    other = calibration(model=HUB, prompts=3)
    for found in (one, back, other):
        cache.put_calibration(found)
    assert cache.calibrations() == [one, back, other]
    assert cache.calibration(MODEL, numerics(), BFLOAT16) == one
    assert cache.calibration(MODEL, BFLOAT16, numerics()) == back
    assert cache.calibration(HUB, numerics(), BFLOAT16) == other
    assert cache.calibration(HUB, BFLOAT16, numerics()) is None
    newest = calibration(prompts=7)
    cache.put_calibration(newest)
    assert cache.calibration(MODEL, numerics(), BFLOAT16) == newest
    assert cache.stats().calibrations == 3


def test_a_calibration_of_another_version_is_none(cache: Cache) -> None:
    cache.put_calibration(calibration(version=VERSION - 1))
    assert cache.calibration(MODEL, numerics(), BFLOAT16) is None
    assert cache.calibrations() == []


def test_of_each_model_and_numerics_the_newest_audit_stays(cache: Cache) -> None:
    early, late = audit_report(made=1.0), audit_report(made=3.0)
    other = audit_report(made=2.0, numerics=BFLOAT16)
    elsewhere = audit_report(made=0.5)
    for model, report in ((MODEL, early), (MODEL, late), (MODEL, other), (HUB, elsewhere)):
        cache.put_audit(model, report)
    assert cache.audits() == [elsewhere, other, late]
    assert cache.stats().audits == 3
    assert cache.clear() == 0
    assert cache.audits() == []


def test_stats_and_clear(cache: Cache) -> None:
    assert cache.stats() == CacheStats(0, 0, 0, 0, 0, 0, cache.store.size())
    cache.put([made(1), made(2)])
    cache.flag([hit()])
    cache.put_self_check(MODEL, passed(numerics()))
    cache.put_calibration(calibration())
    cache.put_audit(MODEL, audit_report())
    cache.store.put({"foreign": b"x", "records/1": b"x"})
    assert cache.stats() == CacheStats(2, 1, 1, 1, 1, 2, cache.store.size())
    assert cache.stats().size > 0
    assert cache.clear() == 2
    assert list(cache.records()) == []
    assert cache.stats() == CacheStats(0, 0, 0, 0, 0, 0, cache.store.size())


def test_records_and_what_stands_beside_them_do_not_mix(cache: Cache) -> None:
    cache.put([made(1)])
    cache.flag([hit(made(1).key)])
    assert cache.keys() == [made(1).key]
    assert cache.get("") is None
    assert (cache.self_checks(), cache.calibrations(), cache.audits()) == ([], [], [])


def test_a_closed_cache_says_so(cache: Cache) -> None:
    where = cache.where
    cache.close()
    cache.close()
    assert cache.where == where == cache.store.where
    for action in (lambda: cache.get("0" * 64), cache.keys, cache.stats, cache.clear, lambda: cache.put([made(1)])):
        with pytest.raises(CacheError, match="is closed"):
            action()


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "not a stablegen record"),
        (b"other bytes" * 20, "not a stablegen record"),
        (encode(made(1))[:-1], "digest"),
        (encode(made(2)), made(2).key),
        (encode(made(1))[:5] + bytes([SCHEMA + 1]) + encode(made(1))[6:], f"schema {SCHEMA + 1}"),
        (encode(made(1))[:5] + bytes([SCHEMA - 1]) + encode(made(1))[6:], f"schema {SCHEMA - 1}"),
    ],
    ids=["empty", "foreign", "cut", "another's", "newer", "older"],
)
def test_a_damaged_record_is_a_reported_miss(value: bytes, why: str, cache: Cache) -> None:
    cache.put([made(1), made(3)])
    cache.store.put({f"record/{made(1).key}": value})
    with pytest.warns(CacheEntryWarning, match=f"record/{made(1).key} in {cache.where} was ignored: .*{why}"):
        assert cache.get(made(1).key) is None
    with pytest.warns(CacheEntryWarning, match=made(1).key):
        assert list(cache.records()) == [made(3)]
    cache.put([made(1)])
    assert cache.get(made(1).key) == made(1)


@pytest.mark.parametrize("value", [b"{}", b"no json", b"[1]", b'{"model": 1}', b"\xff"])
@pytest.mark.parametrize("kind", ["flag", "check", "calibration", "audit"])
def test_any_other_damaged_entry_is_reported(kind: str, value: bytes, cache: Cache) -> None:
    kept = {"flag": [hit()], "check": [passed(numerics())], "calibration": [calibration()], "audit": [audit_report()]}
    read = {"flag": cache.flagged, "check": cache.self_checks, "calibration": cache.calibrations, "audit": cache.audits}
    cache.store.put({f"{kind}/bad": value})
    cache.flag([hit()])
    cache.put_self_check(MODEL, passed(numerics()))
    cache.put_calibration(calibration())
    cache.put_audit(MODEL, audit_report())
    with pytest.warns(CacheEntryWarning, match=f"{kind}/bad in {cache.where} was ignored"):
        assert read[kind]() == kept[kind]


def test_a_damaged_self_check_is_none(cache: Cache) -> None:
    cache.put_self_check(MODEL, passed(numerics()))
    (name,) = cache.store.names("check/")
    cache.store.put({name: b"no json"})
    with pytest.warns(CacheEntryWarning, match=name):
        assert cache.self_check(MODEL, numerics(), Shape()) is None


def test_a_warning_points_at_the_line_that_asked(cache: Cache) -> None:
    cache.store.put({f"record/{made(1).key}": b"damaged", "flag/bad": b"{}"})
    for action in (lambda: cache.get(made(1).key), lambda: list(cache.records()), cache.flagged):
        with pytest.warns(CacheEntryWarning) as told:
            action()
        assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(("value", "mode", "why"), [("text", 3, "foreign kind"), (12, 1, "not bytes")])
def test_a_value_of_another_kind_is_a_reported_miss(value: Any, mode: int, why: str, disk: DiskStore) -> None:
    cache = Cache(disk)
    cache.put([made(1), made(3)])
    replace(disk, f"record/{made(1).key}", value, mode=mode)
    with pytest.warns(CacheEntryWarning, match=f"{made(1).key}.*ignored.*{why}"):
        assert cache.get(made(1).key) is None
    with pytest.warns(CacheEntryWarning):
        assert list(cache.records()) == [made(3)]


def test_a_lost_file_is_a_reported_miss(disk: DiskStore) -> None:
    cache = Cache(disk)
    large = record(margins=[1.0] * 3000)  # diskcache keeps values of this size in files
    cache.put([large])
    (file,) = disk.path.rglob("*.val")
    file.unlink()
    with pytest.warns(CacheEntryWarning, match=f"{large.key}.*is gone"):
        assert cache.get(large.key) is None


def test_a_planted_pickle_never_runs(disk: DiskStore, tmp_path: Path) -> None:
    cache = Cache(disk)
    marker = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(marker))
    sound, planted = made(1), made(2)
    cache.put([sound])
    plant(disk, f"record/{planted.key}", bomb, mode=4)  # a value
    plant(disk, bomb, b"x", raw=0)  # a key
    plant(disk, "flag/x", bomb, mode=4)
    plant(disk, "check/x", bomb, mode=4)
    with pytest.warns(CacheEntryWarning, match=f"{planted.key}.*pickled.*not read"):
        assert cache.get(planted.key) is None
    with pytest.warns(CacheEntryWarning, match="pickled"):
        assert list(cache.records()) == [sound]
    with pytest.warns(CacheEntryWarning, match="flag/x.*pickled"):
        assert cache.flagged() == []
    with pytest.warns(CacheEntryWarning, match="check/x.*pickled"):
        assert cache.self_checks() == []
    stats = cache.stats()
    assert (stats.records, stats.flagged_hits, stats.self_checks, stats.foreign) == (2, 1, 1, 1)
    cache.put([planted])
    assert cache.get(planted.key) == planted
    assert cache.clear() == 2
    assert not marker.exists()


def test_entries_that_cannot_be_read_are_foreign(disk: DiskStore) -> None:
    cache = Cache(disk)
    cache.put([made(1)])
    for key, raw in ((b"record/2", 1), (7, 1), (b"pickled", 0)):
        plant(disk, key, b"x", raw=raw)
    stats = cache.stats()
    assert (stats.records, stats.foreign) == (1, 3)
    assert list(cache.records()) == [made(1)]
    assert cache.clear() == 1
    assert cache.stats().foreign == 0


# -- an older cache ----------------------------------------------------------------------------------------------------


def test_an_older_cache_is_reported_and_foreign(store: Store) -> None:
    store.put({f"{kind}{number}": encode(made(1)) for kind in OLDER for number in range(2)})
    store.put({f"record:{made(1).key}": encode(made(1))})
    with pytest.warns(CacheEntryWarning) as told:
        cache = Cache(store)
    (warning,) = told
    assert warning.filename == __file__
    assert str(warning.message) == (
        f"the cache in {store.where} holds 11 entries of an older stablegen (record format 1), not read and counted as "
        "foreign; `stablegen cache clear` empties the cache"
    )
    assert cache.get(made(1).key) is None
    assert (list(cache.records()), cache.flagged(), cache.self_checks()) == ([], [], [])
    assert (cache.calibrations(), cache.audits()) == ([], [])
    cache.put([made(1)])
    assert cache.stats() == CacheStats(1, 0, 0, 0, 0, 11, store.size())
    assert cache.clear() == 1


def test_a_cleared_cache_is_reported_no_more(store: Store) -> None:
    store.put({"record:1": b"x"})
    with pytest.warns(CacheEntryWarning, match="holds 1 entry of an older stablegen"):
        cache = Cache(store)
    cache.clear()
    Cache(store)


def test_an_older_cache_on_disk_is_opened_with_a_warning(disk: DiskStore) -> None:
    disk.put({"record:1": b"x"})
    with pytest.warns(CacheEntryWarning, match="older stablegen"):
        opened = open_cache(disk.path, None)
    assert opened.stats().foreign == 1
    opened.close()


def test_nothing_stays_open_where_the_warning_is_an_error(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.put({"record:1": b"x"})
    closed = []
    close = DiskStore.close

    def noted(self: DiskStore) -> None:
        closed.append(self.path)
        close(self)

    monkeypatch.setattr(DiskStore, "close", noted)
    with pytest.raises(CacheEntryWarning, match="older stablegen"):  # pytest makes an error of every warning
        open_cache(disk.path, None)
    assert closed == [disk.path]


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_cache_is_opened_by_its_directory(tmp_path: Path) -> None:
    with closing(open_cache(tmp_path / "cache", 10**6)) as cache:
        assert cache.where == str(tmp_path / "cache")
        assert isinstance(cache.store, DiskStore)
        assert cache.store.size_limit == 10**6
    with pytest.raises(CacheDirectoryError):
        open_cache(__file__, None)


def test_the_default_directory_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_path(None) == platformdirs.user_cache_path("stablegen")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_path("~/answers") == Path("/home/somebody/answers")
    assert cache_path("answers") == Path("answers")


@pytest.mark.parametrize("size", [0, -1, True, False])
def test_a_size_must_be_positive(size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Accepted: a positive number of bytes, or None for the default"):
        check_size("kv_cache_size", size)
    with pytest.raises(ConfigError, match=f"size_limit={size}"):
        open_cache(tmp_path / "cache", size)
    assert not (tmp_path / "cache").exists()
    check_size("size_limit", None)
    check_size("size_limit", 1)


def test_a_memory_store_loads_no_diskcache() -> None:
    code = """
import json, sys
from stablegen.store.cache import Cache
from stablegen.store.memory import MemoryStore
Cache(MemoryStore()).stats()
print(json.dumps(sorted({"diskcache", "sqlite3", "platformdirs", "tenacity", "torch"} & set(sys.modules))))
"""
    assert python(code) == []
