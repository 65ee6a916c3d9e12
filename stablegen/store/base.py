"""The one seam of a store: bytes by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Store(Protocol):
    """Bytes by name. What they mean is the ``Cache``'s, which stands above it.

    Threads may share a store. Names are text such as ``record/3f2a...``. Raises ``CacheError`` or a subclass of it for
    all that fails, never an exception of a library below: ``CacheDirectoryError`` where it cannot be read,
    ``CacheWriteError`` where it is full or fails to write, ``CorruptEntryError`` for an entry that is damaged or was
    written by something else.
    """

    @property
    def where(self) -> str:
        """Return what messages call its place: a directory, an address."""
        ...

    def get(self, name: str) -> bytes | None:
        """Return the bytes under a name; None where there are none."""
        ...

    def put(self, entries: Mapping[str, bytes]) -> None:
        """Write entries, in place of those that have their names: all of them or none."""
        ...

    def names(self, prefix: str = "") -> Sequence[str]:
        """Return the names that begin with ``prefix``, in the order in which they were first written.

        Entries that were written by something else and cannot be read are among those of the empty prefix.
        """
        ...

    def size(self) -> int:
        """Return how many bytes it takes."""
        ...

    def clear(self) -> None:
        """Remove every entry."""
        ...

    def close(self) -> None:
        """Release what it holds; may be called twice."""
        ...
