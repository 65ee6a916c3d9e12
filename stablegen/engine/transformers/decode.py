"""Decoding, one step at a time, over a KV cache that grows."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeVar

import torch

from stablegen.core.policy import Batch
from stablegen.engine.base import Generated, Observer
from stablegen.engine.compute import cpu_threads, run_on
from stablegen.engine.sampling import BatchSampler
from stablegen.engine.transformers.answers import GrowingAnswers
from stablegen.engine.transformers.padding import left_padded
from stablegen.kernels.base import RowSummary

_T = TypeVar("_T")


class Forward(Protocol):
    """One batch's forward pass, with its KV cache; R live rows of S slots, V tokens."""

    def prefill(self, live: list[int]) -> torch.Tensor:
        """Return the scores [R, V] float32 that follow the prompts of the live slots."""
        ...

    def step(self, tokens: list[int], live: list[int]) -> torch.Tensor:
        """Return the scores [R, V] float32 that follow ``tokens`` [R], the newest of each live slot."""
        ...


def decode(
    prepare: Callable[[], Forward],
    batch: Batch,
    device: torch.device,
    summarise: Callable[[torch.Tensor], RowSummary],
    answers: GrowingAnswers,
    sampler: BatchSampler,
    observe: Observer | None = None,
    threads: int | None = None,
) -> Generator[Generated, None, None]:
    """Yield each request of a batch as it finishes; a row that fails is reported when the others are done.

    ``prepare`` allocates what the batch needs on ``device`` and returns its forward pass. ``summarise`` reduces score
    rows [R, V]. ``threads``: a CPU's, by which the sums of long rows are cut.
    """
    forward = run_on(device, batch, prepare)
    scores = run_on(device, batch, lambda: forward.prefill(answers.live))

    for step in count():
        if observe is not None:
            for slot, row_scores in zip(answers.live, scores, strict=True):
                observe(answers.request(slot), row_scores)
        refine = partial(sampler.refine, scores=scores, slots=list(answers.live), step=step)
        summary = run_on(device, batch, partial(_chain, partial(summarise, scores), refine, threads))
        yield from answers.add(list(answers.live), summary)
        if not answers.live:
            break
        scores = run_on(device, batch, lambda: forward.step(answers.newest(), answers.live))
    answers.check()


def _chain(first: Callable[[], _T], then: Callable[[_T], _T], threads: int | None) -> _T:
    with cpu_threads(threads):
        return then(first())


class GrowingCache:
    """One batch over a transformers model's own KV cache, which grows with the answers.

    ``accepts``: the names of the model's arguments. ``context``: the longest sequence in tokens. ``attention``: the
    context in which the model runs.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        *,
        accepts: frozenset[str],
        context: int,
        threads: int | None,
        attention: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model = model
        self._accepts = accepts
        self._context = context
        self._threads = threads
        self._attention = attention
        ids, mask = left_padded(batch)
        self._ids, self._mask = ids.to(model.device), mask.to(model.device)
        self._past: Any = None

    def prefill(self, live: list[int]) -> torch.Tensor:
        """Return the scores [R, V] float32 that follow the prompts of the live slots."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        return self._forward(self._ids, positions, live)

    def step(self, tokens: list[int], live: list[int]) -> torch.Tensor:
        """Return the scores [R, V] float32 that follow ``tokens`` [R], the newest of each live slot."""
        rows = len(self._mask)
        newest = torch.zeros(rows, 1, dtype=torch.int64)
        newest[live, 0] = torch.tensor(tokens)
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], dim=1)
        # rows that have finished run on, shapes being fixed; their positions must stay inside the context
        positions = (self._mask.sum(1, keepdim=True) - 1).clamp(max=self._context - 1)
        return self._forward(newest.to(self._mask.device), positions, live)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, live: list[int]) -> torch.Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        arguments = {name: value for name, value in optional.items() if name in self._accepts}
        with cpu_threads(self._threads), self._attention():
            out = self._model(
                input_ids=ids, attention_mask=self._mask, past_key_values=self._past, use_cache=True, **arguments
            )
        self._past = out.past_key_values
        scores: torch.Tensor = out.logits[:, -1].float()  # [S, V]
        return scores if len(live) == len(scores) else scores[live]
