"""What the client asks of a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stablegen.core.answer import SelfCheck
from stablegen.core.audit import AuditReport
from stablegen.core.calibration import Calibration
from stablegen.core.flagged import FlaggedHit
from stablegen.core.record import Record


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds: counts, and its size on disk in bytes."""

    records: int
    flagged_hits: int
    self_checks: int
    calibrations: int
    audits: int
    foreign: int
    size: int
    size_limit: int | None


class Store(Protocol):
    """Records by request key, and beside them the flagged hits, the self-checks, the calibrations and the audits.

    An entry that fails its checks is reported (``CacheEntryWarning``) and treated as absent. Writing raises
    ``CacheWriteError`` where the disk is full or fails.
    """

    path: Path

    def get(self, key: str) -> Record | None:
        """Return the record of a request, or None."""
        ...

    def put(self, records: Iterable[Record]) -> None:
        """Write records in one transaction: all of them or none."""
        ...

    def keys(self, start: str = "") -> list[str]:
        """Return the keys that begin with ``start``, oldest first."""
        ...

    def records(self) -> Iterator[Record]:
        """Yield every readable record, oldest first."""
        ...

    def flag(self, hits: Iterable[FlaggedHit]) -> None:
        """Keep flagged hits, all of them or none.

        Of one request, app and numerics the newest judgement stays, and the newest proof.
        """
        ...

    def flagged(self) -> list[FlaggedHit]:
        """Return the flagged hits, oldest first."""
        ...

    def get_check(self, name: str) -> SelfCheck | None:
        """Return the self-check kept under a name, or None."""
        ...

    def put_check(self, name: str, check: SelfCheck) -> None:
        """Keep a self-check."""
        ...

    def checks(self) -> list[SelfCheck]:
        """Return every self-check."""
        ...

    def get_calibration(self, name: str) -> Calibration | None:
        """Return the calibration kept under a name, or None."""
        ...

    def put_calibration(self, name: str, calibration: Calibration) -> None:
        """Keep a calibration."""
        ...

    def calibrations(self) -> list[Calibration]:
        """Return every calibration."""
        ...

    def put_audit(self, name: str, report: AuditReport) -> None:
        """Keep what an audit found."""
        ...

    def audits(self) -> list[AuditReport]:
        """Return what the audits found, oldest first."""
        ...

    def stats(self) -> StoreStats:
        """Return what the store holds."""
        ...

    def clear(self) -> int:
        """Remove everything; return how many records went."""
        ...

    def close(self) -> None:
        """Release files."""
        ...
