"""Any causal language model of transformers: the policies ``single``, ``padded:N`` and ``native``.

The three differ in the batches they plan. Rows are left-padded to the batch's width, the mask goes with them, and
positions come from the mask. Where the numerics say so, the KV cache has a fixed length and the step is replayed.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from stablegen.engine.attention import OneKernel
from stablegen.engine.base import Follow, Generated, Observer
from stablegen.engine.decode import check_flags, cpu_threads, decode
from stablegen.errors import ModelError
from stablegen.kernels.reference import best_two
from stablegen.numerics import Numerics
from stablegen.policy import Batch, Limits, Native, load_policy

if TYPE_CHECKING:
    from stablegen.engine.static_cache import StaticDecoding


class TransformersEngine:
    """Runs planned batches through a transformers model as it stands.

    ``graphs``: whether CUDA graphs replay the steps over a KV cache of fixed length; it moves no bit.
    """

    def __init__(self, model: Any, numerics: Numerics, *, context: int, graphs: bool = True) -> None:
        self.model = model
        self.numerics = numerics
        self.limits = Limits(context=context, static_cache=numerics.static_cache)
        self.accepts = frozenset(inspect.signature(model.forward).parameters)
        self.attention = nullcontext if isinstance(load_policy(numerics.policy), Native) else OneKernel
        self._static: StaticDecoding | None = None
        if numerics.static_cache:
            from stablegen.engine.static_cache import StaticDecoding

            self._static = StaticDecoding(
                model, context=context, threads=numerics.threads, best_two=best_two, graphs=graphs
            )

    def generate(self, batch: Batch, observe: Observer | None = None) -> Generator[Generated, None, None]:
        """Yield each request of the batch as it finishes.

        Raises ``NumericsChangedError`` where torch's precision flags are no longer those of ``numerics``.
        """
        return self._decode(batch, observe, None)

    def follow(self, batch: Batch, answers: Follow) -> Generator[Generated, None, None]:
        """Yield the requests of a batch, each with what would have been chosen at each step of its answer."""
        return self._decode(batch, None, answers)

    def _decode(
        self, batch: Batch, observe: Observer | None, follow: Follow | None
    ) -> Generator[Generated, None, None]:
        if self.model.training:
            raise ModelError("the model is in training mode, where dropout is random", hint="Call model.eval()")
        check_flags(self.numerics)
        if self._static is not None:
            return self._static.decode(batch, *left_padded(batch), observe, follow)
        return decode(lambda: _LeftPadded(self, batch), batch, self.model.device, best_two, observe, follow)


def left_padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's prompts [S, W], padded on the left, and their mask; filler rows hold one token."""
    prompts = [(0,) if row is None else row.prompt_ids for row in batch.rows]
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
