"""The log of an answer's steps: tokens, runner-ups, scores, margins, hashes."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import Any

# tokens, runner-ups, scores, runner-up scores, hashes
_COLUMNS = ("I", "I", "f", "f", "Q")
_OFFSETS = (0, 4, 8, 12, 16)
STEP_BYTES = 24


class Trace:
    """The log of an answer's steps; every attribute has one entry a step.

    ``tokens`` and ``runner_ups`` are token ids, ``scores`` and ``runner_up_scores`` float32, ``margins`` their
    difference rounded to float32, ``score_hash`` a 64-bit hash of the bits of the step's full score row. Columns stay
    bytes until they are read: most hits are served without reading them.
    """

    __slots__ = ("_columns", "_data", "_steps")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._steps = len(data) // STEP_BYTES
        self._columns: dict[int, tuple[Any, ...]] = {}

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        runner_ups: Sequence[int],
        scores: Sequence[float],
        runner_up_scores: Sequence[float],
        score_hash: Sequence[int],
    ) -> Trace:
        """Return the trace with these columns, scores rounded to float32."""
        columns = (tokens, runner_ups, scores, runner_up_scores, score_hash)
        assert len({len(column) for column in columns}) == 1
        return cls(b"".join(pack_column(code, column) for code, column in zip(_COLUMNS, columns, strict=True)))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the token chosen at each step."""
        return self._column(0)

    @property
    def runner_ups(self) -> tuple[int, ...]:
        """Return the second-best token of each step."""
        return self._column(1)

    @property
    def scores(self) -> tuple[float, ...]:
        """Return the score of each step's token."""
        return self._column(2)

    @property
    def runner_up_scores(self) -> tuple[float, ...]:
        """Return the score of each step's runner-up."""
        return self._column(3)

    @property
    def score_hash(self) -> tuple[int, ...]:
        """Return the 64-bit hash of each step's full score row."""
        return self._column(4)

    @property
    def margins(self) -> tuple[float, ...]:
        """Return best minus second-best score of each step, rounded to float32."""
        pairs = zip(self.scores, self.runner_up_scores, strict=True)
        return tuple(array("f", [best - second for best, second in pairs]))

    def __len__(self) -> int:
        return self._steps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self._data == other._data

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return f"Trace({self._steps} steps, tokens={self.tokens})"

    def __bytes__(self) -> bytes:
        """Return the columns one after the other, little-endian, 24 bytes a step."""
        return self._data

    def upto(self, stop: int) -> Trace:
        """Return the trace of the steps before ``stop``."""
        if stop >= self._steps:
            return self
        return Trace.of(*(self._column(index)[:stop] for index in range(len(_COLUMNS))))

    def __add__(self, later: Trace) -> Trace:
        """Return the trace of these steps followed by the ``later`` ones."""
        return Trace.of(*(self._column(index) + later._column(index) for index in range(len(_COLUMNS))))

    def digest(self) -> str:
        """Return the digest of all score rows, 16 hexadecimal digits."""
        return hashlib.sha256(pack_column("Q", self.score_hash)).hexdigest()[:16]

    def first_difference(self, other: Trace) -> int | None:
        """Return the first step at which the tokens differ; None where they are the same."""
        return first_difference(self.tokens, other.tokens)

    def _column(self, index: int) -> tuple[Any, ...]:
        column = self._columns.get(index)
        if column is None:
            start = self._steps * _OFFSETS[index]
            size = self._steps * array(_COLUMNS[index]).itemsize
            column = self._columns[index] = unpack_column(_COLUMNS[index], self._data[start : start + size])
        return column


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the first step at which two answers' token ids differ, or one of them ends; None where they are equal."""
    if mine == theirs:
        return None
    for step, (one, other) in enumerate(zip(mine, theirs, strict=False)):
        if one != other:
            return step
    return None if len(mine) == len(theirs) else min(len(mine), len(theirs))


def pack_column(code: str, values: Sequence[Any]) -> bytes:
    """Return the bytes of a column of numbers, little-endian."""
    column = array(code, values)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return column.tobytes()


def unpack_column(code: str, data: bytes) -> tuple[Any, ...]:
    """Return a column of numbers from its bytes."""
    column = array(code)
    column.frombytes(data)
    if sys.byteorder == "big":  # pragma: no cover - no such machine in CI
        column.byteswap()
    return tuple(column)
