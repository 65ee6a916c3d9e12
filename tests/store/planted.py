"""What another program could do to a cache on disk."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from stablegen.store.disk import DiskStore


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def sql(store: DiskStore, statement: str, *values: Any) -> None:
    """Change one row of the database."""
    with closing(sqlite3.connect(store.path / "cache.db")) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


def plant(store: DiskStore, name: Any, value: Any, *, mode: int = 1, raw: int = 1, file: str | None = None) -> None:
    """Add a row."""
    columns = "key, raw, store_time, access_time, access_count, tag, size, mode, filename, value"
    statement = f"INSERT INTO Cache({columns}) VALUES (?, ?, 0, 0, 0, NULL, 0, ?, ?, ?)"
    sql(store, statement, name, raw, mode, file, value)


def replace(store: DiskStore, name: str, value: Any, *, mode: int = 1) -> None:
    """Change the value of a row."""
    sql(store, "UPDATE Cache SET value = ?, mode = ? WHERE key = ?", value, mode, name)


def fill(store: DiskStore, *, spare: int = 0) -> None:
    """Let the database grow by ``spare`` pages of 4 KB and no further, as on a full disk."""
    (pages,) = store._cache._sql("PRAGMA page_count").fetchone()
    assert store._cache._sql(f"PRAGMA max_page_count = {pages + spare}").fetchone() == (pages + spare,)
