"""A source and an engine without a model: what sits around them is tested with these, and loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from hashlib import sha256
from typing import Any

from support import TINY, numerics

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, ExecutionPolicy, Limits
from stablegen.core.record import Composition
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.engine.base import NO_ANSWERS, Answers, Engine, Generated, Listener, Observer
from stablegen.sources.base import Source
from stablegen.tokenizer import Tokenizer

Rule = Callable[[Request, int], int]
"""The token that an answer has at a step."""


def by_key(request: Request, step: int) -> int:
    """Return a token that only the request's prompt and the step decide."""
    return sha256(f"{request.prompt_ids} {step}".encode()).digest()[0] + 1


class FakeEngine(Engine):
    """Answers by a rule, one score row a step; ``ran`` keeps the batches, ``closed`` whether it was closed."""

    def __init__(
        self, under: Numerics, *, rule: Rule = by_key, margin: float = 1.0, limits: Limits | None = None
    ) -> None:
        self.numerics = under
        self.limits = Limits(context=256, prefill_equals_decode=True) if limits is None else limits
        self.rule = rule
        self.margin = margin
        self.ran: list[Batch] = []
        self.closed = False

    def generate(
        self,
        batch: Batch,
        observe: Observer | None = None,
        listen: Listener | None = None,
        *,
        begun: Answers = NO_ANSWERS,
    ) -> Generator[Generated, None, None]:
        self.ran.append(batch)
        for slot, request in batch.requests:
            first = len(begun.get(request, ()))
            tokens = [self.rule(request, step) for step in range(first, request.params.max_new_tokens)]
            if listen is not None:
                listen(request, first, tokens)
            yield self._finish(batch, slot, request, tokens, first)

    def follow(
        self, batch: Batch, answers: Answers, observe: Observer | None = None
    ) -> Generator[Generated, None, None]:
        for slot, request in batch.requests:
            yield self._finish(batch, slot, request, [self.rule(request, i) for i in range(len(answers[request]))], 0)

    def close(self) -> None:
        self.closed = True

    def _finish(self, batch: Batch, slot: int, request: Request, tokens: Sequence[int], first: int) -> Generated:
        steps = range(first, first + len(tokens))
        best = [20.0] * len(tokens)
        hashes = [int.from_bytes(sha256(f"{request.prompt_ids} {step}".encode()).digest()[:8], "big") for step in steps]
        trace = Trace.of(tokens, [300] * len(tokens), best, [20.0 - self.margin] * len(tokens), hashes)
        where = Composition(len(batch.rows), len(batch.requests), slot, batch.shape)
        return Generated(request, trace, "length", where, 0.01, (0.0,) * len(request.continuation))


class FakeSource(Source):
    """A model that is not there; ``started`` keeps its engines. Change ``identity`` and it is another model."""

    identity = ModelIdentity(source="digest", digest="f" * 64, name="fake")
    context = 256
    vocabulary = 4096

    def __init__(self, made: Callable[[Numerics], Engine] = FakeEngine, **numerics_fields: Any) -> None:
        self.tokenizer = Tokenizer.from_file(TINY / "tokenizer.json", "7" * 64)
        self.started: list[Any] = []
        self._made = made
        self._fields = numerics_fields
        self._planned: dict[str, Numerics] = {}

    def check(self, policy: ExecutionPolicy) -> None:
        """Run under any policy."""

    def plan(self, policy: ExecutionPolicy, dtype: str, device: str) -> Numerics:
        return self._planned.setdefault(f"{policy} {dtype}", numerics(policy=policy.spec, dtype=dtype, **self._fields))

    def start(self, numerics: Numerics) -> Engine:
        engine = self._made(numerics)
        self.started.append(engine)
        return engine
