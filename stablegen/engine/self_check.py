"""Measure whether a policy keeps its promise here: the same request alone, elsewhere in the batch, beside others.

What is compared are the hashes of full score rows, every step of them. A promise that fails is kept as failed, and
nothing is ever called ``exact`` under it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from stablegen.core.answer import SelfCheck
from stablegen.core.params import GenerationParams
from stablegen.core.policy import BUCKET, Batch, ExecutionPolicy, Invariant, Padded, Shape, load_policy
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Engine, ForcingEngine
from stablegen.engine.invariant.engine import GPT2Engine
from stablegen.errors import EngineError, NumericsChangedError
from stablegen.machine import plan

_EQUAL, _BESIDE, _SLOT = "equal", "beside other rows", "in another slot"
_STEPS = 4
_NEEDLES = (21, 130)
"""Prompt lengths whose bits must not move, in tokens: inside one block of keys, and over several."""
_LONG = 520
"""Tokens of long prompts that run in one pass with a needle's."""
_SHORT = tuple(1 + 7 * i % 32 for i in range(15))
"""Prompt lengths of those that stand before and behind it."""
_SAMPLED: Mapping[str, Any] = {
    "do_sample": True,
    "seed": 1,
    "temperature": 0.8,
    "top_k": 200,
    "top_p": 0.95,
    "typical_p": 0.95,
    "repetition_penalty": 1.2,
}
"""Processing that reduces whole rows, and so would show if it depended on others."""
_CROWD = 100
"""Rows around it where so many run at once: as they finish, its passes have more than 64, 32 and 16 rows."""


def self_check(
    engine: Engine,
    vocabulary: int,
    width: int | None = None,
    capacity: int | None = None,
    scored: int | None = None,
    *,
    processed: bool = False,
) -> SelfCheck:
    """Return what the engine's policy keeps of its promise under its numerics.

    Takes some seconds, and on a GPU those in which kernels are compiled for the first time.

    ``width``, ``capacity`` and ``scored``: the ``Shape`` to measure; ``padded:N`` needs a width. ``processed``:
    whether tokens are chosen from processed scores, sampled and penalised, in place of the model's own.
    """
    numerics = plan.processed(engine.numerics) if processed else engine.numerics
    policy = load_policy(numerics.policy)
    if not policy.promises:
        return SelfCheck(numerics=numerics, passed=False, checks={"policy": f"{policy} promises nothing"})
    try:
        needles = _Needles(vocabulary, _SAMPLED if processed else {}, scored is not None)
        checks = _checks(engine, policy, needles, Shape(width, capacity, scored))
    except NumericsChangedError:
        raise
    except EngineError as error:  # a model that cannot run everywhere proves nothing
        checks = {"run": str(error)}
    # a padded row can be kept in slot 0; under `invariant` the slot is part of the promise
    excused = {_SLOT} if isinstance(policy, Padded) else set()
    return SelfCheck(
        numerics=numerics,
        width=width,
        capacity=capacity,
        scored=scored,
        passed=all(result == _EQUAL for name, result in checks.items() if name not in excused),
        slot_free=checks.get(_SLOT) == _EQUAL,
        checks=checks,
    )


def _checks(engine: Engine, policy: ExecutionPolicy, needles: _Needles, shape: Shape) -> dict[str, str]:
    if isinstance(policy, Padded):
        return _check_padded(engine, needles, policy.rows, shape)
    checks: dict[str, str] = {}
    for seed, length in enumerate(_NEEDLES):
        needle = needles.make(seed, min(length, engine.limits.context - _STEPS))
        found = _check_row(engine, needle, shape)
        if isinstance(policy, Invariant):
            found |= _check_company(engine, needle, needles)
        for name, result in found.items():
            if checks.get(name, _EQUAL) == _EQUAL:  # what failed for one needle stays failed
                checks[name] = result
    return checks


def _check_padded(engine: Engine, needles: _Needles, rows: int, shape: Shape) -> dict[str, str]:
    assert shape.width is not None
    steps = _STEPS if shape.capacity is None else min(_STEPS, shape.capacity - shape.width + 1)
    longest = min(shape.width, engine.limits.context - steps) - 1
    shortest = max(1, longest - BUCKET + 2)
    needle, *others = [
        needles.make(seed, max(shortest, longest - 11 * seed % BUCKET), steps) for seed in range(1, min(rows, 8) + 1)
    ]
    filler = (None,) * (rows - 1 - len(others))
    alone = _trace(engine, Batch((needle, *[None] * (rows - 1)), *shape), needle)
    beside = _trace(engine, Batch((needle, *others, *filler), *shape), needle)
    checks = _compare(_BESIDE, alone, [beside])
    if rows > 1:
        moved = [Batch((*others, *filler, needle), *shape)]
        if rows > 2:
            moved.append(Batch((*filler, *others[:1], needle, *others[1:]), *shape))
        checks |= _compare(_SLOT, alone, [_trace(engine, batch, needle) for batch in moved])
    return checks


def _check_row(engine: Engine, needle: Request, shape: Shape) -> dict[str, str]:
    alone = _trace(engine, Batch((needle,), *shape), needle)
    return _compare("repeated", alone, [_trace(engine, Batch((needle,), *shape), needle)])


def _check_company(engine: Engine, needle: Request, needles: _Needles) -> dict[str, str]:
    longest = max(1, engine.limits.context - _STEPS)
    # where the context is short, several prompts make the pass long
    long = [needles.make(200 + i, min(_LONG, longest)) for i in range(-(-_LONG // longest))]
    short = [needles.make(100 + i, min(length, longest)) for i, length in enumerate(_SHORT)]
    alone = _trace_anew(engine, Batch((needle,)), needle)
    batches = {
        _BESIDE: [Batch((needle, *long, short[0]))],
        _SLOT: [Batch((*short[:8], needle)), Batch((*short[:11], needle, *short[11:]))],
    }
    if isinstance(engine, GPT2Engine) and engine.max_rows > len(short) + 1:
        crowd = [needles.make(300 + i, min(1 + i % 5, longest), 1 + i % _STEPS) for i in range(_CROWD)]
        batches[_BESIDE].append(Batch((*crowd[: _CROWD // 2], needle, *crowd[_CROWD // 2 :])))
    checks: dict[str, str] = {}
    for name, companies in batches.items():
        checks |= _compare(name, alone, [_trace_anew(engine, batch, needle) for batch in companies])
    return checks | _prefill_against_decode(engine, needle, alone)


@dataclass(frozen=True, slots=True)
class _Needles:
    """Makes the requests whose bits are compared: of random tokens, ``settings`` the same in all."""

    vocabulary: int
    settings: Mapping[str, Any]
    scored: bool

    def make(self, seed: int, length: int, steps: int = _STEPS) -> Request:
        """Return a request of ``length`` tokens; where continuations are scored, its last ones are one."""
        state, ids = seed * 2654435761 + 12345, []
        for _ in range(max(length, 2 if self.scored else 1)):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            ids.append((state >> 33) % self.vocabulary)
        scored = min(steps, len(ids) - 1) if self.scored else 0
        params = GenerationParams(max_new_tokens=scored or steps, **self.settings)
        model, prompt = ModelIdentity(source="digest", digest="self-check"), ids[: len(ids) - scored]
        return Request(tuple(prompt), params, model, "", continuation=tuple(ids[len(ids) - scored :]))


def _trace(engine: Engine, batch: Batch, needle: Request) -> Trace:
    return next(done.trace for done in list(engine.generate(batch)) if done.request is needle)


def _trace_anew(engine: Engine, batch: Batch, needle: Request) -> Trace:
    _forget(engine)
    return _trace(engine, batch, needle)


def _forget(engine: Engine) -> None:
    if isinstance(engine, GPT2Engine):
        engine.forget()  # or keys and values of an earlier run would be taken, whatever this one computes


def _prefill_against_decode(engine: Engine, needle: Request, decoded: Trace) -> dict[str, str]:
    for step in (1, _STEPS - 1):
        _forget(engine)
        assert isinstance(engine, ForcingEngine)
        with closing(engine.resume([(needle, decoded.tokens[:step])])) as resumed:
            prefilled = next(resumed).trace
        if prefilled.score_hash[0] != decoded.score_hash[step]:
            return {"prefill against decode": f"score rows differ at step {step}"}
    return {"prefill against decode": _EQUAL}


def _compare(name: str, alone: Trace, others: list[Trace]) -> dict[str, str]:
    for other in others:
        for step, (mine, theirs) in enumerate(zip(alone.score_hash, other.score_hash, strict=True)):
            if mine != theirs:
                return {name: f"score rows differ at step {step}"}
    return {name: _EQUAL}
