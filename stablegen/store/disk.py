"""The store on disk: diskcache, with strings for keys, bytes for values, and no pickle in either direction."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import diskcache
from diskcache.core import MODE_BINARY, MODE_RAW

from stablegen.core.answer import SelfCheck
from stablegen.core.audit import AuditReport
from stablegen.core.calibration import VERSION, Calibration
from stablegen.core.flagged import FlaggedHit
from stablegen.core.record import Record
from stablegen.core.request import SCHEMA
from stablegen.errors import (
    CacheDirectoryError,
    CacheEntryWarning,
    CacheSchemaError,
    CacheWriteError,
    CorruptEntryError,
)
from stablegen.store.base import StoreStats
from stablegen.store.codec import decode, encode

_T = TypeVar("_T")

_OWN = ("cache.db", ".probe-", "digests.json")
"""How the files begin that may lie in a new cache: another process may be opening it at this moment."""
_RECORD, _FLAG, _CHECK, _CALIBRATION, _AUDIT = "record:", "flag:", "check:", "calibration:", "audit:"


class BytesDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Serialise strings and bytes as they are and refuse everything else, pickles above all.

    diskcache unpickles whatever row says it holds a pickle, whoever wrote it; this class never does.
    """

    def put(self, key: object) -> tuple[str, bool]:
        """Return the row's key."""
        if not isinstance(key, str):
            raise TypeError(f"a cache key is {type(key).__name__}, not str")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """Return a row's key; raise ``CorruptEntryError`` for one that is pickled or not text."""
        if not raw or not isinstance(key, str):
            raise CorruptEntryError("a row's key is pickled or not text; it was not read")
        return key

    def store(self, value: object, read: bool, key: object = diskcache.UNKNOWN) -> Any:
        """Return the columns of a value, which must be bytes."""
        if read or not isinstance(value, bytes):
            raise TypeError(f"a cache value is {type(value).__name__}, not bytes")
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        """Return a row's bytes; raise ``CorruptEntryError`` for a pickle or any other foreign mode."""
        if read or mode not in (MODE_RAW, MODE_BINARY):
            raise CorruptEntryError("the entry is pickled or of a foreign kind; it was not read")
        data = super().fetch(mode, filename, value, read)
        if not isinstance(data, bytes):
            raise CorruptEntryError("the entry is not bytes")
        return data


class DiskStore:
    """Records in one diskcache directory of mode 0700.

    ``size_limit`` is in bytes; None, the default, never evicts. Several processes may share a directory on a local
    file system. Raises ``CacheDirectoryError`` where the directory cannot be used, ``CacheSchemaError`` where a newer
    stablegen wrote it.
    """

    def __init__(self, path: Path, *, size_limit: int | None = None) -> None:
        self.path = path
        self.size_limit = size_limit
        self._cache = _open(path, size_limit)
        try:
            self._check_schema()
        except BaseException:
            self._cache.close()
            raise

    def get(self, key: str) -> Record | None:
        """Return the record of a request; a corrupt or foreign entry is reported and counts as absent."""
        return self._read(_RECORD + key, decode, key)

    def put(self, records: Iterable[Record]) -> None:
        """Write records in one transaction: all of them or none."""
        self._write({_RECORD + record.key: encode(record) for record in records})

    def keys(self, start: str = "") -> list[str]:
        """Return the keys that begin with ``start``, oldest first."""
        return [name.removeprefix(_RECORD) for name in self._names(_RECORD + start)]

    def records(self) -> Iterator[Record]:
        """Yield every readable record, oldest first."""
        for key in self.keys():
            record = self.get(key)
            if record is not None:
                yield record

    def flag(self, hits: Iterable[FlaggedHit]) -> None:
        """Keep flagged hits, all of them or none.

        Of one request, app and numerics the newest judgement stays, and the newest proof.
        """

        def name(hit: FlaggedHit) -> str:
            return f"{_FLAG}{hit.key}:{hit.current_digest}:{hit.verdict.basis == 'verified'}:{hit.app}"

        self._write({name(hit): hit.model_dump_json().encode() for hit in hits})

    def flagged(self) -> list[FlaggedHit]:
        """Return the flagged hits, oldest first."""
        found = (self._read(name, FlaggedHit.model_validate_json) for name in self._names(_FLAG))
        return [hit for hit in found if hit is not None]

    def get_check(self, name: str) -> SelfCheck | None:
        """Return the self-check kept under a name, or None."""
        return self._read(_CHECK + name, SelfCheck.model_validate_json)

    def put_check(self, name: str, check: SelfCheck) -> None:
        """Keep a self-check."""
        self._write({_CHECK + name: check.model_dump_json(exclude_defaults=True).encode()})

    def checks(self) -> list[SelfCheck]:
        """Return every self-check."""
        found = (self._read(name, SelfCheck.model_validate_json) for name in self._names(_CHECK))
        return [check for check in found if check is not None]

    def get_calibration(self, name: str) -> Calibration | None:
        """Return the calibration kept under a name, or None; one of another version is none."""
        found = self._read(_CALIBRATION + name, Calibration.model_validate_json)
        return found if found is not None and found.version == VERSION else None

    def put_calibration(self, name: str, calibration: Calibration) -> None:
        """Keep a calibration."""
        self._write({_CALIBRATION + name: calibration.model_dump_json().encode()})

    def calibrations(self) -> list[Calibration]:
        """Return every calibration."""
        found = (self._read(name, Calibration.model_validate_json) for name in self._names(_CALIBRATION))
        return [one for one in found if one is not None and one.version == VERSION]

    def put_audit(self, name: str, report: AuditReport) -> None:
        """Keep what an audit found."""
        self._write({_AUDIT + name: report.model_dump_json().encode()})

    def audits(self) -> list[AuditReport]:
        """Return what the audits found, oldest first."""
        found = (self._read(name, AuditReport.model_validate_json) for name in self._names(_AUDIT))
        return sorted((report for report in found if report is not None), key=lambda report: report.made)

    def stats(self) -> StoreStats:
        """Return what the store holds."""
        names = list(self._names(""))
        prefixes = (_RECORD, _FLAG, _CHECK, _CALIBRATION, _AUDIT)
        counts = [sum(name.startswith(prefix) for name in names) for prefix in prefixes]
        total = self._retry(self._cache.__len__)
        return StoreStats(
            records=counts[0],
            flagged_hits=counts[1],
            self_checks=counts[2],
            calibrations=counts[3],
            audits=counts[4],
            foreign=total - sum(counts),
            size=int(self._retry(self._cache.volume)),
            size_limit=self.size_limit,
        )

    def clear(self) -> int:
        """Remove everything; return how many records went."""
        count = len(self.keys())
        self._retry(self._cache.clear)
        return count

    def close(self) -> None:
        """Release the database."""
        self._cache.close()

    def _read(self, name: str, parse: Callable[..., _T], *context: str) -> _T | None:
        try:
            try:
                data = self._cache.get(name)
            except sqlite3.OperationalError:
                data = self._retry(lambda: self._cache.get(name))
            if data is not None:
                return parse(data, *context)
            if name in self._cache:
                raise CorruptEntryError("the file that held its bytes is gone")
            return None
        except (CorruptEntryError, CacheSchemaError, ValueError) as error:
            warnings.warn(f"cache entry {name} in {self.path} was ignored: {error}", CacheEntryWarning, stacklevel=3)
            return None
        except sqlite3.DatabaseError as error:
            raise CacheDirectoryError(
                f"the cache in {self.path} cannot be read: {error}", hint="Move it away, or choose another cache_dir"
            ) from error

    def _write(self, entries: dict[str, bytes]) -> None:
        def write() -> None:
            with self._cache.transact():
                for name, data in entries.items():
                    self._cache.set(name, data)

        try:
            self._retry(write)
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            raise CacheWriteError(
                f"{len(entries)} entries could not be written to {self.path}: {error}",
                hint="Free disk space or choose another cache_dir; nothing that was stored before is lost",
            ) from error

    def _names(self, prefix: str) -> Iterator[str]:
        # a row with a pickled key stops diskcache's own iteration: ask SQLite for the text keys instead
        rows = self._retry(
            lambda: self._cache._sql(
                "SELECT key FROM Cache WHERE raw = 1 AND typeof(key) = 'text' AND substr(key, 1, ?) = ? ORDER BY rowid",
                (len(prefix), prefix),
            ).fetchall()
        )
        return (name for (name,) in rows)

    def _check_schema(self) -> None:
        # SQLite's own place for it: no row, so nothing can evict it
        found = int(self._retry(lambda: self._cache._sql("PRAGMA user_version").fetchone()[0]))
        if found > SCHEMA:
            raise CacheSchemaError(
                f"the cache in {self.path} has schema {found}; this stablegen reads up to {SCHEMA}",
                hint="Upgrade stablegen, or choose another cache_dir",
            )
        if found < SCHEMA:
            self._retry(lambda: self._cache._sql(f"PRAGMA user_version = {SCHEMA}").fetchall())

    @staticmethod
    def _retry(action: Callable[[], _T]) -> _T:
        return _locked_retry(action)


def _open(path: Path, size_limit: int | None) -> Any:
    policy = "none" if size_limit is None else "least-recently-stored"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (path / "cache.db").exists() and any(not file.name.startswith(_OWN) for file in path.iterdir()):
            raise FileExistsError("it holds other files and no cache")
        path.chmod(0o700)
        _probe(path)
        return _locked_retry(
            lambda: diskcache.Cache(
                str(path),
                timeout=5,
                disk=BytesDisk,
                eviction_policy=policy,
                cull_limit=0 if size_limit is None else 10,
                size_limit=2**62 if size_limit is None else size_limit,
            )
        )
    except (OSError, sqlite3.Error) as error:
        raise CacheDirectoryError(
            f"the cache directory {path} cannot be used: {error}",
            accepted="a directory on a local disk that this user may write to, new, empty or stablegen's own",
            hint="Choose another cache_dir",
        ) from error


def _probe(path: Path) -> None:
    # SQLite would open a database it cannot write and fail at the first record
    for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
        if (path / name).exists() and not os.access(path / name, os.W_OK):
            raise PermissionError(f"{name} is read-only")
    probe = path / f".probe-{os.getpid()}"
    probe.touch()
    with contextlib.suppress(FileNotFoundError):
        probe.unlink()


def _locked_retry(action: Callable[[], _T]) -> _T:
    """Run an action, again with growing pauses while SQLite says the database is locked."""
    try:
        return action()
    except (sqlite3.OperationalError, diskcache.Timeout) as error:
        if not _is_locked(error):
            raise
    # tenacity is imported and paid for only where there is something to retry
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    retrying = Retrying(
        retry=retry_if_exception(_is_locked),
        wait=wait_random_exponential(multiplier=0.02, max=1.0),
        stop=stop_after_delay(30),
        reraise=True,
    )
    return retrying(action)


def _is_locked(error: BaseException) -> bool:
    return isinstance(error, diskcache.Timeout) or (
        isinstance(error, sqlite3.OperationalError) and ("locked" in str(error) or "busy" in str(error))
    )
