"""What an engine reads of its log; how its words are laid out stands in ``kernels.log``, beside the kernels."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from stablegen.core.trace import Trace
from stablegen.kernels.log import HASH, RUNNER_UP, RUNNER_UP_SCORE, SCORE, TOKEN

_COLUMNS = (TOKEN, RUNNER_UP, SCORE, RUNNER_UP_SCORE, slice(HASH, HASH + 2))
"""A trace's columns, in their order."""


def trace_of(words: npt.NDArray[Any]) -> Trace:
    """Return the trace of N steps whose log is ``words`` [N, WIDTH] int32."""
    return Trace(b"".join(words[:, column].tobytes() for column in _COLUMNS))
