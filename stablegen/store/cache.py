"""The typed cache above a store: records, flagged hits, self-checks, calibrations and audits.

It alone knows under which names they stand::

    record/KEY
    flag/KEY/NUMERICS/proof or judgement[/APP]
    check/MODEL/NUMERICS/SHAPE
    calibration/MODEL/NUMERICS/NUMERICS      recorded under the first, recomputed under the second
    audit/MODEL/NUMERICS

KEY is a request's, MODEL a model's identity, NUMERICS the digest of one. Every other name is foreign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from stablegen.core.audit import AuditReport
from stablegen.core.calibration import VERSION, Calibration
from stablegen.core.caller import warn
from stablegen.core.numerics import Numerics
from stablegen.core.policy import Shape
from stablegen.core.record import Record
from stablegen.core.request import ModelIdentity
from stablegen.core.verdict import FlaggedHit, SelfCheck
from stablegen.errors import CacheEntryWarning, CacheSchemaError, ConfigError, CorruptEntryError
from stablegen.store.base import Store
from stablegen.store.codec import decode, encode

_T = TypeVar("_T")

_RECORD, _FLAG, _CHECK, _CALIBRATION, _AUDIT = "record/", "flag/", "check/", "calibration/", "audit/"
_OLDER = ("record:", "flag:", "check:", "calibration:", "audit:")
"""How names began in caches of record format 1."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """How many entries of each kind a cache holds, and how many bytes it takes; ``foreign``: not this version's."""

    records: int
    flagged_hits: int
    self_checks: int
    calibrations: int
    audits: int
    foreign: int
    size: int


class Cache:
    """Records by request key, and beside them flagged hits, self-checks, calibrations and audits, in any store.

    An entry that fails its checks is reported (``CacheEntryWarning``) and counts as absent; so is, once, what an older
    stablegen left. Threads may share a cache. Writing raises ``CacheWriteError`` where the store is full or fails.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        older = sum(len(store.names(prefix)) for prefix in _OLDER)
        if older:
            held = "1 entry" if older == 1 else f"{older} entries"
            warn(
                f"the cache in {self.where} holds {held} of an older stablegen (record format 1), not read and counted "
                "as foreign; `stablegen cache clear` empties the cache",
                CacheEntryWarning,
            )

    @property
    def where(self) -> str:
        """Return what messages call its place: a directory, an address."""
        return self.store.where

    def get(self, key: str) -> Record | None:
        """Return the record of a request; None where there is none that can be read."""
        return self._read(_RECORD + key, decode, key)

    def put(self, records: Iterable[Record]) -> None:
        """Write records in one transaction: all of them or none."""
        self.store.put({_RECORD + record.key: encode(record) for record in records})

    def keys(self, start: str = "") -> list[str]:
        """Return the keys of records that begin with ``start``, oldest first."""
        return [name.removeprefix(_RECORD) for name in self.store.names(_RECORD + start)]

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
        self.store.put({_flag_name(hit): hit.model_dump_json().encode() for hit in hits})

    def flagged(self) -> list[FlaggedHit]:
        """Return the flagged hits, oldest first."""
        return self._read_all(_FLAG, FlaggedHit.model_validate_json)

    def self_check(self, model: ModelIdentity, numerics: Numerics, shape: Shape) -> SelfCheck | None:
        """Return the self-check of a shape under one numerics with a model, or None."""
        return self._read(_check_name(model, numerics, shape), SelfCheck.model_validate_json)

    def put_self_check(self, model: ModelIdentity, check: SelfCheck) -> None:
        """Keep a self-check that was made with a model."""
        data = check.model_dump_json(exclude_defaults=True).encode()
        self.store.put({_check_name(model, check.numerics, check.shape): data})

    def self_checks(self) -> list[SelfCheck]:
        """Return every self-check, oldest first."""
        return self._read_all(_CHECK, SelfCheck.model_validate_json)

    def calibration(self, model: ModelIdentity, recorded: Numerics, current: Numerics) -> Calibration | None:
        """Return what was measured between two numerics of a model, or None; one of another version is none."""
        found = self._read(_calibration_name(model, recorded, current), Calibration.model_validate_json)
        return found if found is not None and found.version == VERSION else None

    def put_calibration(self, calibration: Calibration) -> None:
        """Keep a calibration."""
        name = _calibration_name(calibration.model, calibration.recorded, calibration.current)
        self.store.put({name: calibration.model_dump_json().encode()})

    def calibrations(self) -> list[Calibration]:
        """Return every calibration, oldest first."""
        found = self._read_all(_CALIBRATION, Calibration.model_validate_json)
        return [calibration for calibration in found if calibration.version == VERSION]

    def put_audit(self, model: ModelIdentity, report: AuditReport) -> None:
        """Keep what an audit of a model's answers found; of each model and numerics the newest stays."""
        name = f"{_AUDIT}{_model_name(model)}/{report.numerics.digest}"
        self.store.put({name: report.model_dump_json().encode()})

    def audits(self) -> list[AuditReport]:
        """Return what the audits found, in the order in which they were made."""
        return sorted(self._read_all(_AUDIT, AuditReport.model_validate_json), key=lambda report: report.made)

    def stats(self) -> CacheStats:
        """Return how much the cache holds."""
        names = self.store.names()
        kinds = (_RECORD, _FLAG, _CHECK, _CALIBRATION, _AUDIT)
        records, flags, checks, calibrations, audits = (sum(name.startswith(kind) for name in names) for kind in kinds)
        foreign = len(names) - records - flags - checks - calibrations - audits
        return CacheStats(records, flags, checks, calibrations, audits, foreign, self.store.size())

    def clear(self) -> int:
        """Remove everything, foreign entries too; return how many records went."""
        count = len(self.keys())
        self.store.clear()
        return count

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _read(self, name: str, parse: Callable[..., _T], *context: str) -> _T | None:
        try:
            data = self.store.get(name)
            return None if data is None else parse(data, *context)
        except (CorruptEntryError, CacheSchemaError, ValueError) as error:
            warn(f"cache entry {name} in {self.where} was ignored: {error}", CacheEntryWarning)
            return None

    def _read_all(self, prefix: str, parse: Callable[[bytes], _T]) -> list[_T]:
        found = (self._read(name, parse) for name in self.store.names(prefix))
        return [entry for entry in found if entry is not None]


def _flag_name(hit: FlaggedHit) -> str:
    kind = "proof" if hit.verdict.basis == "verified" else "judgement"
    app = "" if hit.app is None else f"/{hit.app}"
    return f"{_FLAG}{hit.key}/{hit.current_digest}/{kind}{app}"


def _check_name(model: ModelIdentity, numerics: Numerics, shape: Shape) -> str:
    fixed = ",".join(f"{name}={value}" for name, value in shape._asdict().items() if value is not None)
    return f"{_CHECK}{_model_name(model)}/{numerics.digest}/{fixed or 'any'}"


def _calibration_name(model: ModelIdentity, recorded: Numerics, current: Numerics) -> str:
    return f"{_CALIBRATION}{_model_name(model)}/{recorded.digest}/{current.digest}"


def _model_name(model: ModelIdentity) -> str:
    """Return a model's identity as part of a name: ``hub/REPO@COMMIT`` or ``digest/DIGEST``."""
    return f"{model.source}/{'@'.join(model.identity.values())}"


def open_cache(cache_dir: str | Path | None, size_limit: int | None) -> Cache:
    """Return the cache in a directory (None: the user's own cache folder), of at most so many bytes (None: any)."""
    check_size("size_limit", size_limit)
    from stablegen.store.disk import DiskStore

    store = DiskStore(cache_path(cache_dir), size_limit=size_limit)
    try:
        return Cache(store)
    except BaseException:
        store.close()
        raise


def cache_path(cache_dir: str | Path | None) -> Path:
    """Return the cache's directory; None means the user's own cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("stablegen")


def check_size(name: str, size: int | None) -> None:
    """Raise ``ConfigError`` for a number of bytes that is not positive."""
    if size is not None and (isinstance(size, bool) or size < 1):
        raise ConfigError(f"{name}={size!r}", accepted="a positive number of bytes, or None for the default")
