"""Measure whether a policy keeps its promise here: the same request alone, elsewhere in the batch, beside others.

The hashes of full score rows are compared, at every step. A promise that fails is kept as failed, and nothing is ever
called ``exact`` under it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from stablegen.core.params import GenerationParams
from stablegen.core.policy import SLOT, Batch, ExecutionPolicy, Shape, Trial, load_policy
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.core.verdict import SelfCheck
from stablegen.engine.base import Engine
from stablegen.errors import EngineError, NumericsChangedError
from stablegen.machine import plan

EQUAL = "equal"
"""What a self-check says of bits that did not move."""
PREFILL = "prefill against decode"
"""What is compared where prefill and decode must give the same bits, besides what the policy names."""
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


def self_check(engine: Engine, vocabulary: int, shape: Shape | None = None, *, processed: bool = False) -> SelfCheck:
    """Return what the engine's policy keeps of its promise under its numerics, in one shape.

    Takes some seconds; on a GPU also those in which kernels are compiled for the first time. ``vocabulary``: the number
    of token ids. ``shape``: as the policy gives it to requests; by default one that fixes nothing. ``processed``:
    whether tokens are chosen from processed scores, sampled and penalised, in place of the model's own.
    """
    shape = Shape() if shape is None else shape
    numerics = plan.processed(engine.numerics) if processed else engine.numerics
    policy = load_policy(numerics.policy)
    if not policy.promises:
        return SelfCheck(numerics=numerics, shape=shape, passed=False, checks={"policy": f"{policy} promises nothing"})
    try:
        requests = _Requests(vocabulary, _SAMPLED if processed else {}, scored=shape.scored is not None)
        checks = _measured(engine, policy, requests, shape)
    except NumericsChangedError:
        raise
    except EngineError as error:  # a model that cannot run everywhere proves nothing
        checks = {"run": str(error)}
    # where a slot is not promised, rows can be kept in slot 0
    excused = set() if policy.slot_promised else {SLOT}
    return SelfCheck(
        numerics=numerics,
        shape=shape,
        passed=all(result == EQUAL for name, result in checks.items() if name not in excused),
        slot_free=checks.get(SLOT) == EQUAL,
        checks=checks,
    )


def _measured(engine: Engine, policy: ExecutionPolicy, requests: _Requests, shape: Shape) -> dict[str, str]:
    """Return what came of each comparison by its name; one that fails in any trial is reported as failed."""
    checks: dict[str, str] = {}
    for trial in policy.trials(requests.make, shape, engine.limits):
        for name, result in _try(engine, trial):
            if checks.get(name, EQUAL) == EQUAL:
                checks[name] = result
    return checks or {"policy": f"{policy} names nothing to compare"}


def _try(engine: Engine, trial: Trial) -> Iterator[tuple[str, str]]:
    engine.forget()
    alone = _trace(engine, trial.alone, trial.needle)
    for company in trial.companies:
        if company.anew:
            engine.forget()  # or keys and values of an earlier run would be reused, whatever this one computes
        yield company.compared, _compare(alone, _trace(engine, company.batch, trial.needle))
    if engine.limits.prefill_equals_decode and not trial.needle.continuation:
        for step in sorted({1, len(alone) - 1} - {0, len(alone)}):
            yield PREFILL, _compare_prefill(engine, trial, alone, step)


@dataclass(frozen=True, slots=True)
class _Requests:
    """Makes the requests whose bits are compared: of random tokens, ``settings`` the same in all."""

    vocabulary: int
    settings: Mapping[str, Any]
    scored: bool

    def make(self, seed: int, length: int, steps: int) -> Request:
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


def _compare(alone: Trace, other: Trace) -> str:
    for step, (mine, theirs) in enumerate(zip(alone.score_hash, other.score_hash, strict=True)):
        if mine != theirs:
            return f"score rows differ at step {step}"
    return EQUAL


def _compare_prefill(engine: Engine, trial: Trial, decoded: Trace, step: int) -> str:
    """Compare a step's score row with the one that a prefill of all tokens before it gives."""
    engine.forget()
    begun = {trial.needle: decoded.tokens[:step]}
    with closing(engine.generate(trial.alone, begun=begun)) as resumed:
        prefilled = next(done.trace for done in resumed if done.request is trial.needle)
    return EQUAL if prefilled.score_hash[0] == decoded.score_hash[step] else f"score rows differ at step {step}"
