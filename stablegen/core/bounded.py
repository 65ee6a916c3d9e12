"""A mapping of limited size: the memory of a long-lived client must not grow with the number of calls."""

from __future__ import annotations

from threading import Lock
from typing import Generic, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Bounded(Generic[_K, _V]):
    """A mapping of at most ``limit`` entries that drops the one written longest ago; threads may share it.

    Reading what is there takes no lock and keeps no order: every hit does it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[_K, _V] = {}
        self._lock = Lock()

    def get(self, key: _K, default: _V | None = None) -> _V | None:
        """Return the value under a key, ``default`` where there is none."""
        found = self._entries.get(key, default)
        if found is default:  # another thread may be writing it at this moment
            with self._lock:
                return self._entries.get(key, default)
        return found

    def __setitem__(self, key: _K, value: _V) -> None:
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = value
            if len(self._entries) > self._limit:
                del self._entries[next(iter(self._entries))]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)
