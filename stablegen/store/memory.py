"""The store in memory: a dictionary that is gone when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from stablegen.errors import CacheError


class MemoryStore:
    """Bytes by name in this process alone; nothing is ever evicted.

    Raises ``CacheError`` once it is closed.
    """

    where = "memory"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, bytes] | None = {}

    def get(self, name: str) -> bytes | None:
        """Return the bytes under a name; None where there are none."""
        with self._lock:
            return self._opened().get(name)

    def put(self, entries: Mapping[str, bytes]) -> None:
        """Write entries, in place of those that have their names: all of them or none."""
        new = dict(entries)
        with self._lock:
            self._opened().update(new)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that begin with ``prefix``, in the order in which they were first written."""
        with self._lock:
            return [name for name in self._opened() if name.startswith(prefix)]

    def size(self) -> int:
        """Return how many bytes names and values take."""
        with self._lock:
            return sum(len(name.encode()) + len(data) for name, data in self._opened().items())

    def clear(self) -> None:
        """Remove every entry."""
        with self._lock:
            self._opened().clear()

    def close(self) -> None:
        """Forget every entry; may be called twice."""
        with self._lock:
            self._entries = None

    def _opened(self) -> dict[str, bytes]:
        if self._entries is None:
            raise CacheError("the store in memory is closed", hint="Make a new one")
        return self._entries
