"""An engine under its policy: batches as the policy plans them, each shape measured once before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, ExecutionPolicy, Shape
from stablegen.core.request import Request
from stablegen.core.verdict import SelfCheck
from stablegen.engine.base import Engine
from stablegen.machine.plan import processed


class Planner:
    """Plans batches for an engine, by what a self-check of each shape has found.

    ``vocabulary``: the number of token ids, which self-checks draw from. ``find`` returns a self-check made before,
    ``keep`` takes one made now; without them they are kept here.
    """

    def __init__(
        self,
        engine: Engine,
        policy: ExecutionPolicy,
        vocabulary: int,
        *,
        find: Callable[[Numerics, Shape], SelfCheck | None] | None = None,
        keep: Callable[[SelfCheck], None] | None = None,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self._vocabulary = vocabulary
        self._checks: dict[tuple[str, Shape], SelfCheck] = {}
        self._find = find or self._remembered
        self._keep = keep or self._remember

    def groups(self, requests: Sequence[Request]) -> Iterator[tuple[list[Request], SelfCheck]]:
        """Yield requests by the shape in which they run, each group with the self-check of its shape."""
        shapes: dict[tuple[bool, Shape], list[Request]] = {}
        for request in requests:
            kind = request.params.processed, self.policy.shape_of(request, self.engine.limits)
            shapes.setdefault(kind, []).append(request)
        for (is_processed, shape), members in shapes.items():
            numerics = processed(self.engine.numerics) if is_processed else self.engine.numerics
            check = self._find(numerics, shape)
            yield members, self.measure(shape, is_processed=is_processed) if check is None else check

    def plan(self, requests: Sequence[Request], check: SelfCheck) -> list[Batch]:
        """Return the batches of requests of one group."""
        return self.policy.plan(requests, replace(self.engine.limits, slot_free=check.slot_free))

    def batches(self, requests: Sequence[Request]) -> Iterator[Batch]:
        """Yield the batches in which requests run."""
        for members, check in self.groups(requests):
            yield from self.plan(members, check)

    def measure(self, shape: Shape, *, is_processed: bool = False) -> SelfCheck:
        """Return what a self-check of a shape finds now; ``is_processed``: of tokens chosen from processed scores.

        It loads torch, and takes some seconds where kernels are compiled for the first time.
        """
        from stablegen.engine.self_check import self_check

        check = self_check(self.engine, self._vocabulary, shape, processed=is_processed)
        self._keep(check)
        return check

    @property
    def slot_matters(self) -> bool:
        """Return whether a slot was found to move a row's bits in any shape measured here."""
        return any(check.shape.width is not None and not check.slot_free for check in self._checks.values())

    def _remembered(self, numerics: Numerics, shape: Shape) -> SelfCheck | None:
        return self._checks.get((numerics.digest, shape))

    def _remember(self, check: SelfCheck) -> None:
        self._checks[check.numerics.digest, check.shape] = check
