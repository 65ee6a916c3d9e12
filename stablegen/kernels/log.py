"""What a step logs of each of its rows, as int32 words: the one layout that all kernels write and all engines read."""

from __future__ import annotations

import torch

from stablegen.kernels.base import RowSummary

TOKEN = 0
"""The column of the best token's id."""
RUNNER_UP = 1
"""The column of the second-best token's id."""
SCORE = 2
"""The column of the bits of the best token's float32 score."""
RUNNER_UP_SCORE = 3
"""The column of the bits of the runner-up's float32 score."""
HASH = 4
"""The first of two columns of the row's 64-bit hash, the low word first."""
FINITE = 6
"""The column that is 0 where a score of the row is NaN or infinite, else 1."""
WIDTH = 8
"""Words of a row; the last is 0."""


def pack(summary: RowSummary) -> torch.Tensor:
    """Return what a step keeps of M rows as words [M, WIDTH] int32."""
    return torch.cat(
        [
            summary.tokens.int(),
            summary.scores.view(torch.int32),
            summary.hashes[:, None].view(torch.int32),  # little-endian: the low word first
            torch.stack([summary.finite, torch.zeros_like(summary.finite)], 1).int(),
        ],
        dim=1,
    )


def unpack(words: torch.Tensor) -> RowSummary:
    """Return what words [M, WIDTH] int32 say of M rows."""
    return RowSummary(
        tokens=words[:, TOKEN : RUNNER_UP + 1].long(),
        scores=words[:, SCORE : RUNNER_UP_SCORE + 1].view(torch.float32),
        hashes=unpack_hashes(words),
        finite=words[:, FINITE] != 0,
    )


def unpack_hashes(words: torch.Tensor) -> torch.Tensor:
    """Return the hashes [M] int64 of words [M, WIDTH] int32."""
    return words[:, HASH : HASH + 2].contiguous().view(torch.int64)[:, 0]
