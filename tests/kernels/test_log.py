"""The layout of what a step logs: what is packed is what a trace reads."""

from __future__ import annotations

import torch

from stablegen.core.trace import Trace
from stablegen.engine.log import trace_of
from stablegen.kernels import log
from stablegen.kernels.reference import summarise_rows


def test_what_is_packed_is_unpacked() -> None:
    scores = torch.randn(7, 131, generator=torch.Generator().manual_seed(0))
    scores[3, 5] = float("nan")
    summary = summarise_rows(scores)
    words = log.pack(summary)
    assert words.shape == (7, log.WIDTH)
    assert words.dtype == torch.int32
    found = log.unpack(words)
    for name in ("tokens", "hashes", "finite"):
        assert torch.equal(getattr(found, name), getattr(summary, name)), name
    assert torch.equal(found.scores.view(torch.int32), summary.scores.view(torch.int32))
    assert found.finite.tolist() == [row != 3 for row in range(7)]
    assert torch.equal(words[:, log.TOKEN].long(), summary.tokens[:, 0])
    assert torch.equal(words[:, log.RUNNER_UP].long(), summary.tokens[:, 1])
    assert not words[:, log.WIDTH - 1].any()


def test_a_traces_bytes_are_the_columns_of_the_log() -> None:
    summary = summarise_rows(torch.randn(5, 67, generator=torch.Generator().manual_seed(1)))
    expected = Trace.of(
        summary.tokens[:, 0].tolist(),
        summary.tokens[:, 1].tolist(),
        summary.scores[:, 0].tolist(),
        summary.scores[:, 1].tolist(),
        [value & 0xFFFFFFFFFFFFFFFF for value in summary.hashes.tolist()],
    )
    assert trace_of(log.pack(summary).numpy()) == expected
