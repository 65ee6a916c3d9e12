"""Scoring continuations: one pass over prompts and continuations tells of every step of each continuation."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from stablegen.core.policy import Batch
from stablegen.core.record import Composition
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Generated, Observer
from stablegen.engine.compute import cpu_threads, raise_failed, run_on, unsigned
from stablegen.engine.transformers.padding import left_padded
from stablegen.kernels.base import RowSummary
from stablegen.kernels.reference import log_probs


def score(
    model: Any,
    batch: Batch,
    summarise: Callable[[torch.Tensor], RowSummary],
    observe: Observer | None = None,
    *,
    accepts: frozenset[str],
    threads: int | None,
    attention: Callable[[], AbstractContextManager[Any]],
) -> Generator[Generated, None, None]:
    """Yield the requests of a batch, each with the log-probabilities of its continuation.

    ``accepts``: the names of the model's arguments. ``attention``: the context in which the model runs.
    """
    started = time.perf_counter()
    ids, mask = left_padded(batch)
    kept = batch.shape.scored or max(len(request.continuation) for _, request in batch.requests)

    def run() -> torch.Tensor:
        arguments: dict[str, Any] = {"logits_to_keep": kept, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        arguments = {name: value for name, value in arguments.items() if name in accepts}
        arguments |= {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        placed = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        with cpu_threads(threads), attention():
            out: torch.Tensor = model(**placed).logits
        return out

    logits = run_on(model.device, batch, run)  # [S, W or kept, V]
    failed: list[tuple[Request, int]] = []
    for slot, request in batch.requests:
        steps = len(request.continuation)
        scores = logits[slot, -steps:].float()  # [N, V]
        for row in scores if observe is not None else ():
            assert observe is not None
            observe(request, row)
        tokens = torch.tensor(request.continuation, device=scores.device)
        summary, found = run_on(model.device, batch, partial(_measured, scores, tokens, summarise, threads))
        finite = summary.finite.tolist()
        if not all(finite):
            failed.append((request, finite.index(False)))
            continue
        yield Generated(
            request,
            _trace(summary),
            "length",
            Composition(len(batch.rows), len(batch.requests), slot, batch.shape._replace(capacity=None)),
            time.perf_counter() - started,
            tuple(found.tolist()),
        )
    raise_failed(failed)


def _trace(summary: RowSummary) -> Trace:
    tokens, runner_ups = summary.tokens.T.tolist()
    scores, runner_up_scores = summary.scores.T.tolist()
    return Trace.of(tokens, runner_ups, scores, runner_up_scores, unsigned(summary.hashes.tolist()))


def _measured(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    summarise: Callable[[torch.Tensor], RowSummary],
    threads: int | None,
) -> tuple[RowSummary, torch.Tensor]:
    with cpu_threads(threads):
        return summarise(scores), log_probs(scores, tokens)
