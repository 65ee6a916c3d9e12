"""Any causal language model of transformers: the policies ``single``, ``padded:N`` and ``native``.

The three differ in the batches they plan. Rows are left-padded to the batch's width, the mask goes with them, and
positions come from the mask. Where the numerics say so, the KV cache has a fixed length and the step is replayed.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Limits, Native, load_policy
from stablegen.core.record import Composition
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Follow, Generated, Listener, Observer, Stopper
from stablegen.engine.sampling import Choosers, Selector
from stablegen.engine.stopping import stopper_for
from stablegen.engine.transformers.attention import OneKernel
from stablegen.engine.transformers.decode import (
    Answers,
    check_flags,
    cpu_threads,
    decode,
    raise_failed,
    run_on,
    unsigned,
)
from stablegen.errors import ModelError
from stablegen.kernels.base import BestTwo
from stablegen.kernels.reference import best_two, log_probs
from stablegen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stablegen.engine.transformers.static_cache import StaticDecoding


class TransformersEngine:
    """Runs planned batches through a transformers model as it stands.

    ``graphs``: whether CUDA graphs replay the steps over a KV cache of fixed length; it moves no bit.
    """

    def __init__(
        self,
        model: Any,
        numerics: Numerics,
        *,
        context: int,
        graphs: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model = model
        self.numerics = numerics
        self.tokenizer = tokenizer or Tokenizer.absent()
        self.selector = Selector(model.device, graphs=graphs)
        self.limits = Limits(context=context, static_cache=numerics.static_cache)
        self.accepts = frozenset(inspect.signature(model.forward).parameters)
        self.attention = nullcontext if isinstance(load_policy(numerics.policy), Native) else OneKernel
        self._static: StaticDecoding | None = None
        if numerics.static_cache:
            from stablegen.engine.transformers.static_cache import StaticDecoding

            self._static = StaticDecoding(
                model, context=context, threads=numerics.threads, best_two=best_two, graphs=graphs
            )

    def generate(
        self, batch: Batch, observe: Observer | None = None, listen: Listener | None = None
    ) -> Generator[Generated, None, None]:
        """Yield each request of the batch as it finishes.

        Raises ``NumericsChangedError`` where torch's precision flags are no longer those of ``numerics``.
        """
        self._check()
        if any(request.continuation for _, request in batch.requests):
            return self._score(batch, observe)
        return self._decode(batch, observe, None, listen)

    def follow(
        self, batch: Batch, answers: Follow, observe: Observer | None = None
    ) -> Generator[Generated, None, None]:
        """Yield the requests of a batch, each with what would have been chosen at each step of its answer."""
        self._check()
        return self._decode(batch, observe, answers, None)

    def _check(self) -> None:
        if self.model.training:
            raise ModelError("the model is in training mode, where dropout is random", hint="Call model.eval()")
        check_flags(self.numerics)

    def _decode(
        self, batch: Batch, observe: Observer | None, follow: Follow | None, listen: Listener | None
    ) -> Generator[Generated, None, None]:
        choosers = Choosers(batch, self.model.device, self.selector, follow)
        made = partial(Answers, batch, follow=follow, stopper=self._stopper, listen=listen)
        if self._static is not None:
            return self._static.decode(batch, *left_padded(batch), made, choosers, observe)
        return decode(
            lambda: _LeftPadded(self, batch),
            batch,
            self.model.device,
            best_two,
            made(),
            choosers,
            observe,
            self.numerics.threads,
        )

    def _stopper(self, request: Request) -> Stopper | None:
        return stopper_for(request, self.tokenizer)

    def _score(self, batch: Batch, observe: Observer | None) -> Generator[Generated, None, None]:
        """Yield what one pass over prompts and continuations tells of each continuation's steps."""
        started = time.perf_counter()
        ids, mask = left_padded(batch)
        kept = batch.scored or max(len(request.continuation) for _, request in batch.requests)

        def run() -> torch.Tensor:
            arguments: dict[str, Any] = {"logits_to_keep": kept, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            arguments = {name: value for name, value in arguments.items() if name in self.accepts}
            arguments |= {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            placed = {
                name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            with cpu_threads(self.numerics.threads), self.attention():
                out: torch.Tensor = self.model(**placed).logits
            return out

        logits = run_on(self.model.device, batch, run)  # [S, W or kept, V]
        failed: list[tuple[Request, int]] = []
        for slot, request in batch.requests:
            steps = len(request.continuation)
            scores = logits[slot, -steps:].float()  # [N, V]
            for row in scores if observe is not None else ():
                assert observe is not None
                observe(slot, row)
            tokens = torch.tensor(request.continuation, device=scores.device)
            best, found = run_on(self.model.device, batch, partial(_scored, scores, tokens, self.numerics.threads))
            finite = best.finite.tolist()
            if not all(finite):
                failed.append((request, finite.index(False)))
                continue
            yield Generated(
                request,
                _trace(best),
                "length",
                Composition(len(batch.rows), len(batch.requests), slot, batch.width, None, batch.scored),
                time.perf_counter() - started,
                tuple(found.tolist()),
            )
        raise_failed(failed)


def _trace(best: BestTwo) -> Trace:
    tokens, runner_ups = best.tokens.T.tolist()
    scores, runner_up_scores = best.scores.T.tolist()
    return Trace.of(tokens, runner_ups, scores, runner_up_scores, unsigned(best.hashes.tolist()))


def _scored(scores: torch.Tensor, tokens: torch.Tensor, threads: int | None) -> tuple[BestTwo, torch.Tensor]:
    with cpu_threads(threads):
        return best_two(scores), log_probs(scores, tokens)


def left_padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a batch's rows are given [S, W], padded on the left, and the mask; filler rows hold one token."""
    prompts = [(0,) if row is None else row.given for row in batch.rows]
    width = max(map(len, prompts)) if batch.width is None else batch.width
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


class _LeftPadded:
    """One batch over a KV cache that grows."""

    def __init__(self, engine: TransformersEngine, batch: Batch) -> None:
        self._engine = engine
        ids, mask = left_padded(batch)
        self._ids, self._mask = ids.to(engine.model.device), mask.to(engine.model.device)
        self._past: Any = None

    def prefill(self, live: list[int]) -> torch.Tensor:
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        return self._forward(self._ids, positions, live)

    def step(self, tokens: list[int], live: list[int]) -> torch.Tensor:
        rows = len(self._mask)
        newest = torch.zeros(rows, 1, dtype=torch.int64)
        newest[live, 0] = torch.tensor(tokens)
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], dim=1)
        # rows that have finished run on, shapes being fixed; their positions must stay inside the context
        positions = (self._mask.sum(1, keepdim=True) - 1).clamp(max=self._engine.limits.context - 1)
        return self._forward(newest.to(self._mask.device), positions, live)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, live: list[int]) -> torch.Tensor:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        arguments = {name: value for name, value in optional.items() if name in self._engine.accepts}
        with cpu_threads(self._engine.numerics.threads), self._engine.attention():
            out = self._engine.model(
                input_ids=ids, attention_mask=self._mask, past_key_values=self._past, use_cache=True, **arguments
            )
        self._past = out.past_key_values
        scores: torch.Tensor = out.logits[:, -1].float()  # [S, V]
        return scores if len(live) == len(scores) else scores[live]
