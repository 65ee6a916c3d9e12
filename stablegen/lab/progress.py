"""Count the finished parts of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stablegen.session.call import Progress


def ticker(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return a function to call after each of ``total`` parts; it tells ``progress``, where there is one."""
    if progress is None:
        return lambda: None
    done = iter(range(1, total + 1))
    progress(0, total)
    return lambda: progress(next(done), total)
