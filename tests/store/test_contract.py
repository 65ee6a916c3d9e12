"""Every store of this package keeps the contract."""

from __future__ import annotations

from pathlib import Path

from store.contract import StoreContract

from stablegen.store.base import Store
from stablegen.store.disk import DiskStore
from stablegen.store.memory import MemoryStore


class TestDisk(StoreContract):
    def make(self, folder: Path) -> Store:
        return DiskStore(folder / "cache")


class TestMemory(StoreContract):
    def make(self, folder: Path) -> Store:
        return MemoryStore()
