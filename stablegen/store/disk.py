"""The store on disk: diskcache, with strings for keys, bytes for values, and no pickle in either direction."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard, TypeVar

import diskcache
from diskcache.core import MODE_BINARY, MODE_RAW

from stablegen.core.request import SCHEMA
from stablegen.errors import CacheDirectoryError, CacheError, CacheSchemaError, CacheWriteError, CorruptEntryError

_T = TypeVar("_T")

_OWN = ("cache.db", ".probe-", "digests.json")
"""How the files begin that may lie in a new cache: another process may be opening it at this moment."""
_VALUE_FILE = re.compile(r"[0-9a-f]{2}[/\\][0-9a-f]{2}[/\\][0-9a-f]{28}\.val")
"""How diskcache names the files that hold large values, below the cache's directory."""
_UNREADABLE = "unreadable:"
"""How the made-up names begin of rows whose key is pickled or not text."""
_ATTEMPTS = 10
"""How often a value is read whose file is not there: who replaces it removes the old file after the new row stands."""
_FAILURES = (OSError, sqlite3.Error, diskcache.Timeout)


class BytesDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Serialise strings and bytes as they are and refuse everything else, pickles above all.

    diskcache unpickles whatever row says it holds a pickle, whoever wrote it; this class never does. It opens and
    removes no file but those that diskcache made, whatever a row names.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._local = threading.local()

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
        if mode == MODE_BINARY and not _is_value_file(filename):
            raise CorruptEntryError("the entry names a file that is not the cache's; it was not read")
        data = super().fetch(mode, filename, value, read)
        if not isinstance(data, bytes):
            raise CorruptEntryError("the entry is not bytes")
        return data

    def filename(self, key: object = diskcache.UNKNOWN, value: object = diskcache.UNKNOWN) -> tuple[str, str]:
        """Return a new file's name below the directory, and its full path."""
        name, path = super().filename(key, value)
        files = self._transaction_files()
        if files is not None:
            files.written.append(name)
        return name, path

    def remove(self, file_path: object) -> None:
        """Remove a value's file: at once, or in a ``transaction`` when that is committed."""
        if not _is_value_file(file_path):
            return
        files = self._transaction_files()
        if files is None:
            super().remove(file_path)
        else:
            files.replaced.append(file_path)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep the files in step with the rows, around a transaction of the database in this thread.

        diskcache removes the file of a replaced value before the commit, so that a rollback would bring back a row
        without its file. Here it goes after the commit; where the transaction fails, the files that it wrote go.
        """
        files = self._local.files = _Files([], [])
        unwanted = files.written
        try:
            yield
            unwanted = files.replaced
        finally:
            self._local.files = None
            for name in unwanted:
                super().remove(name)

    def _transaction_files(self) -> _Files | None:
        return getattr(self._local, "files", None)


class DiskStore:
    """Bytes by name in one diskcache directory of mode 0700.

    ``size_limit`` is in bytes; None, the default, never evicts. Several processes may share a directory on a local
    file system. Raises ``CacheDirectoryError`` where the directory cannot be used, ``CacheSchemaError`` where a newer
    stablegen wrote it, ``CacheError`` once it is closed.
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

    @property
    def where(self) -> str:
        """Return the directory."""
        return str(self.path)

    def get(self, name: str) -> bytes | None:
        """Return the bytes under a name; None where there are none.

        Raises ``CorruptEntryError`` for an entry that is pickled, not bytes, or whose file is gone.
        """
        data: bytes | None
        try:
            data = self._cache.get(name)
        except UnicodeEncodeError:  # half a surrogate pair: no row has such a key
            return None
        except (sqlite3.OperationalError, diskcache.Timeout) as error:
            if "decode" in str(error):
                raise CorruptEntryError("the entry is text that cannot be decoded") from error
            data = self._read(lambda: self._cache.get(name))
        except sqlite3.Error as error:
            raise self._unreadable(error) from error
        return self._get_missing(name) if data is None else data

    def put(self, entries: Mapping[str, bytes]) -> None:
        """Write entries, in place of those that have their names, in one transaction: all of them or none.

        Raises ``CacheWriteError`` where the disk is full or fails.
        """

        def write() -> None:
            with self._cache.disk.transaction(), self._cache.transact():
                for name, data in entries.items():
                    self._cache.set(name, data)

        try:
            _retry_locked(write)
        except (*_FAILURES, UnicodeEncodeError) as error:
            count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
            raise CacheWriteError(
                f"{count} could not be written to {self.path}: {error}",
                hint="Free disk space or choose another cache_dir; nothing that was stored before is lost",
            ) from error

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that begin with ``prefix``, in the order in which they were first written.

        With the empty prefix, a row whose key is pickled or not text is listed too, under a made-up name; ``get`` of
        that name raises ``CorruptEntryError``.
        """
        # diskcache's own iteration stops at such a key, so SQLite is asked. Keys are fetched as bytes, since sqlite3
        # raises for text that is not UTF-8
        if not prefix:
            rows = self._select(
                "SELECT rowid, CASE WHEN raw = 1 AND typeof(key) = 'text' THEN CAST(key AS BLOB) END FROM Cache "
                "ORDER BY rowid"
            )
            return [f"{_UNREADABLE}{row}" if (name := _decoded(key)) is None else name for row, key in rows]
        try:
            first = prefix.encode()
        except UnicodeEncodeError:
            return []
        # SQLite compares text byte by byte, and no UTF-8 holds the byte FF: this is the prefix's range of the index
        rows = self._select(
            "SELECT rowid, CAST(key AS BLOB) FROM Cache "
            "WHERE key >= CAST(? AS TEXT) AND key < CAST(? AS TEXT) AND raw = 1 ORDER BY rowid",
            first,
            first + b"\xff",
        )
        return [name for _, key in rows if (name := _decoded(key)) is not None]

    def size(self) -> int:
        """Return how many bytes the database and the files of large values take."""
        return int(self._read(self._cache.volume))

    def clear(self) -> None:
        """Remove every entry; raises ``CacheWriteError`` where the disk fails."""
        try:
            _retry_locked(self._cache.clear)
        except _FAILURES as error:
            raise CacheWriteError(
                f"the cache in {self.path} could not be emptied: {error}", hint="Remove the directory instead"
            ) from error

    def close(self) -> None:
        """Release the database; may be called twice."""
        # diskcache would open it again at the next call
        cache, self._cache = self._cache, _Closed(self.path)
        if not isinstance(cache, _Closed):
            cache.close()

    def _read(self, action: Callable[[], _T]) -> _T:
        try:
            return _retry_locked(action)
        except (sqlite3.Error, diskcache.Timeout) as error:
            raise self._unreadable(error) from error

    def _select(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._read(lambda: list(self._cache._sql(statement, values)))

    def _get_missing(self, name: str) -> bytes | None:
        """Return the bytes under a name that had none a moment ago: it may have been written, or replaced, since."""
        for _ in range(_ATTEMPTS):
            if not self._read(lambda: name in self._cache):
                break
            data: bytes | None = self._read(lambda: self._cache.get(name))
            if data is not None:
                return data
        else:
            raise CorruptEntryError("the file that held its bytes is gone")
        if name.startswith(_UNREADABLE) and name in self.names():
            raise CorruptEntryError("its name is pickled or not text; it was not read")
        return None

    def _unreadable(self, error: Exception) -> CacheDirectoryError:
        return CacheDirectoryError(
            f"the cache in {self.path} cannot be read: {error}", hint="Move it away, or choose another cache_dir"
        )

    def _check_schema(self) -> None:
        # SQLite's own place for it: no row, so nothing can evict it
        ((found,),) = self._select("PRAGMA user_version")
        if found > SCHEMA:
            raise CacheSchemaError(
                f"the cache in {self.path} has schema {found}; this stablegen reads up to {SCHEMA}",
                hint="Upgrade stablegen, or choose another cache_dir",
            )
        if found < SCHEMA:
            self._select(f"PRAGMA user_version = {SCHEMA}")


class _Files(NamedTuple):
    """The files that a transaction has written, and those whose values it has replaced."""

    written: list[str]
    replaced: list[str]


class _Closed:
    """Stands in for the database of a closed store: whatever is asked of it raises ``CacheError``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise CacheError(f"the store in {self._path} is closed", hint="Open it again")

    def __contains__(self, name: str) -> bool:
        return bool(self.get)


def _decoded(key: bytes | None) -> str | None:
    """Return a row's key as text; None where it is none."""
    try:
        return None if key is None else key.decode()
    except UnicodeDecodeError:
        return None


def _is_value_file(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and _VALUE_FILE.fullmatch(name) is not None


def _open(path: Path, size_limit: int | None) -> Any:
    policy = "none" if size_limit is None else "least-recently-stored"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (path / "cache.db").exists() and any(not file.name.startswith(_OWN) for file in path.iterdir()):
            raise FileExistsError("it holds other files and no cache")
        path.chmod(0o700)
        _probe(path)
        return _retry_locked(
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
    """Raise ``OSError`` where the directory or the database cannot be written."""
    # SQLite would open a database that it cannot write and fail at the first record
    for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
        if (path / name).exists() and not os.access(path / name, os.W_OK):
            raise PermissionError(f"{name} is read-only")
    probe = path / f".probe-{os.getpid()}"
    probe.touch()
    with contextlib.suppress(FileNotFoundError):
        probe.unlink()


def _retry_locked(action: Callable[[], _T]) -> _T:
    """Run an action, again with growing pauses while SQLite says that the database is locked."""
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
