"""Any causal language model of transformers, unchanged, for all policies that run it so.

Policies differ in the batches they plan. Rows are left-padded to the batch's width, the mask goes with them, and
positions come from the mask. Where the numerics say so, the KV cache has a fixed length and the step is replayed.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Limits, load_policy
from stablegen.core.request import Request
from stablegen.engine.base import NO_ANSWERS, Answers, Engine, Generated, Listener, Observer, Stopper
from stablegen.engine.compute import check_flags, closed_engine, release_memory
from stablegen.engine.sampling import BatchSampler, GraphedSampler
from stablegen.engine.stopping import stopper_for
from stablegen.engine.transformers.answers import GrowingAnswers
from stablegen.engine.transformers.attention import OneKernel
from stablegen.engine.transformers.decode import GrowingCache, decode
from stablegen.engine.transformers.padding import left_padded
from stablegen.engine.transformers.scoring import score
from stablegen.errors import ModelError, TeacherForcingError
from stablegen.kernels.reference import summarise_rows
from stablegen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stablegen.engine.transformers.static_decoding import StaticDecoding


class TransformersEngine(Engine):
    """Runs planned batches through a transformers model, unchanged.

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
        self.numerics = numerics
        self.tokenizer = tokenizer or Tokenizer.absent()
        self.limits = Limits(context=context, static_cache=numerics.static)
        self.sampler = GraphedSampler(model.device, graphs=graphs)
        self._model = model
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._attention = OneKernel if load_policy(numerics.policy).promises else nullcontext
        self._static: StaticDecoding | None = None
        if numerics.static:
            from stablegen.engine.transformers.static_decoding import StaticDecoding

            self._static = StaticDecoding(
                model, context=context, threads=numerics.threads, summarise=summarise_rows, graphs=graphs
            )

    @property
    def model(self) -> Any:
        """Return the transformers model; raise ``EngineError`` where the engine was closed."""
        if self._model is None:
            raise closed_engine()
        return self._model

    def generate(
        self,
        batch: Batch,
        observe: Observer | None = None,
        listen: Listener | None = None,
        *,
        begun: Answers = NO_ANSWERS,
    ) -> Generator[Generated, None, None]:
        """Yield each request of the batch as it finishes.

        Raises ``TeacherForcingError`` where answers are ``begun``: computing their tokens at once would give other
        scores than decoding them did.
        """
        if begun:
            raise TeacherForcingError(
                f"policy {self.numerics.policy!r} cannot resume answers from their first tokens: "
                "prefill and decode of a transformers model may give different scores",
                accepted="engines whose limits say prefill_equals_decode",
                hint="Generate these answers from their beginning",
            )
        self._check()
        if any(request.continuation for _, request in batch.requests):
            return score(
                self.model,
                batch,
                summarise_rows,
                observe,
                accepts=self._accepts,
                threads=self.numerics.threads,
                attention=self._attention,
            )
        return self._decode(batch, observe, listen, NO_ANSWERS)

    def follow(
        self, batch: Batch, answers: Answers, observe: Observer | None = None
    ) -> Generator[Generated, None, None]:
        """Teacher-force: yield the requests of a batch, each with what would be chosen at each step of its answer.

        One step is computed after the other, as when it was generated.
        """
        self._check()
        return self._decode(batch, observe, None, answers)

    def close(self) -> None:
        """Release the model, and the KV caches and graphs of its shapes; a closed engine raises ``EngineError``."""
        model, self._model = self._model, None
        if model is None:
            return
        if self._static is not None:
            self._static.close()
            self._static = None
        self.sampler.close()
        release_memory(model.device)

    def _check(self) -> None:
        if self.model.training:
            raise ModelError("the model is in training mode, where dropout is random", hint="Call model.eval()")
        check_flags(self.numerics)

    def _decode(
        self, batch: Batch, observe: Observer | None, listen: Listener | None, answers: Answers
    ) -> Generator[Generated, None, None]:
        model = self.model
        sampler = BatchSampler(batch, model.device, self.sampler, answers)
        start = partial(GrowingAnswers, batch, answers=answers, stopper=self._stopper, listen=listen)
        if self._static is not None:
            return self._static.decode(batch, *left_padded(batch), start, sampler, observe)
        prepare = partial(
            GrowingCache,
            model,
            batch,
            accepts=self._accepts,
            context=self.limits.context,
            threads=self.numerics.threads,
            attention=self._attention,
        )
        # a cache that grows has no capacity
        growing = start(batch.shape._replace(capacity=None, scored=None))
        return decode(prepare, batch, model.device, summarise_rows, growing, sampler, observe, self.numerics.threads)

    def _stopper(self, request: Request) -> Stopper | None:
        return stopper_for(request, self.tokenizer)
