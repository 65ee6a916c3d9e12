"""An engine under its policy: batches as the client would plan them, each shape measured once before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from stablegen.core.answer import SelfCheck
from stablegen.core.policy import Batch, ExecutionPolicy, Shape
from stablegen.core.request import Request
from stablegen.engine.base import Engine
from stablegen.engine.self_check import self_check


@dataclass(frozen=True, slots=True)
class Planned:
    """``vocabulary``: the number of token ids, which the self-check draws from."""

    engine: Engine
    policy: ExecutionPolicy
    vocabulary: int
    checks: dict[Shape, SelfCheck] = field(default_factory=dict)

    def batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """Yield the batches in which requests run."""
        limits = self.engine.limits
        shapes: dict[Shape, list[Request]] = {}
        for one in requests:
            shape = self.policy.shape(len(one.prompt_ids), one.params.max_new_tokens, limits)
            shapes.setdefault(shape, []).append(one)
        for shape, members in shapes.items():
            if shape not in self.checks:
                self.checks[shape] = self_check(self.engine, self.vocabulary, *shape)
            yield from self.policy.plan(members, replace(limits, slot_free=self.checks[shape].slot_free))

    @property
    def slot_matters(self) -> bool:
        """Return whether a row's slot was found to move its bits, so that each request runs in slot 0."""
        return any(check.width is not None and not check.slot_free for check in self.checks.values())
