"""An engine's life under one lock: started at the first miss, replaced where its model has changed, closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stablegen.core.numerics import Numerics
from stablegen.core.request import ModelIdentity
from stablegen.engine.base import Engine
from stablegen.errors import EngineError, ModelError
from stablegen.sources.base import Source


class Runner:
    """Lends the engine to one thread at a time.

    ``completed`` counts the times that results were written: where it has grown while a call waited for the engine,
    another thread may have computed what the call is missing.
    """

    def __init__(self, source: Source) -> None:
        self.completed = 0
        self._source = source
        self._lock = threading.RLock()
        self._engine: Engine | None = None
        self._started_for: tuple[ModelIdentity, Numerics] | None = None
        self._users = 0

    @property
    def started(self) -> bool:
        """Return whether an engine is loaded."""
        return self._engine is not None

    @contextmanager
    def engine(self, identity: ModelIdentity, planned: Numerics) -> Iterator[Engine]:
        """Lend the engine for a model and the numerics planned for it, started where needed.

        Raises ``ModelError`` where the model was changed while this thread waited, and what ``Source.start`` raises.
        """
        waited = not self._lock.acquire(blocking=False)
        if waited:
            self._lock.acquire()
        try:
            engine = self._ready(identity, planned, waited=waited)
            self._users += 1
            try:
                yield engine
            finally:
                self._users -= 1
        finally:
            self._lock.release()

    def _ready(self, identity: ModelIdentity, planned: Numerics, *, waited: bool) -> Engine:
        known = self._started_for
        is_other = known is None or known[0] is not identity or known[1] is not planned
        if (waited or is_other) and self._source.identity.identity != identity.identity:
            raise ModelError(
                "another thread changed the model while this call waited for it",
                hint="Call again: the answers then come from the changed model",
            )
        if is_other:
            if self._users:
                raise EngineError(
                    "the model was changed while this thread was generating with it",
                    hint="Change a model only between calls",
                )
            self.close()
            self._engine = self._source.start(planned)
            self._started_for = identity, planned
        assert self._engine is not None
        return self._engine

    def close(self) -> None:
        """Release the engine; nobody may be using it."""
        with self._lock:
            engine, self._engine, self._started_for = self._engine, None, None
            if engine is not None:
                engine.close()
