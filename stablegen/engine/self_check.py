"""Measure whether a policy keeps its promise here: the same request alone, elsewhere in the batch, beside others.

What is compared are the hashes of full score rows, every step of them. A promise that fails is kept as failed, and
nothing is ever called ``exact`` under it.
"""

from __future__ import annotations

from collections.abc import Iterable

from stablegen.engine.base import Engine
from stablegen.policy import Batch, Invariant, Padded, bucket_width, load_policy
from stablegen.record import SelfCheck, Trace
from stablegen.request import GenerationParams, ModelIdentity, Request

_STEPS = 5
_LENGTHS = (21, 40)
"""Prompt lengths of the needles, in tokens: inside one key block, and reaching towards the next."""


def self_check(engine: Engine, vocabulary: int) -> SelfCheck:
    """Return what the engine's policy keeps of its promise under its numerics, in a few seconds."""
    policy = load_policy(engine.numerics.policy)
    if not policy.promises:
        return SelfCheck(numerics=engine.numerics, passed=False, checks={"policy": f"{policy} promises nothing"})
    context = engine.limits.context
    needles = [_request(seed, min(length, context - _STEPS - 1), vocabulary) for seed, length in enumerate(_LENGTHS)]
    others = [_request(100 + i, 1 + (7 * i) % min(60, context - _STEPS - 1), vocabulary) for i in range(40)]
    checks: dict[str, str] = {}
    for needle in needles:
        alone = _alone(engine, needle)
        checks |= _compare("repeated", alone, [_alone(engine, needle)])
        if isinstance(policy, Padded):
            same_bucket = [
                other
                for other in others
                if bucket_width(len(other.prompt_ids), context) == bucket_width(len(needle.prompt_ids), context)
            ]
            rows = policy.rows
            beside = [Batch((needle, *same_bucket[start : start + rows - 1])) for start in (0, 5)]
            moved = [Batch((*same_bucket[: rows - 1], needle)), Batch((*[None] * (rows // 2), needle))]
            checks |= _compare("beside other rows", alone, _needle(engine, policy, beside, needle))
            checks |= _compare("in another slot", alone, _needle(engine, policy, moved, needle))
        if isinstance(policy, Invariant):
            batches = [
                Batch((needle, *others[:2])),
                Batch((*others[:8], needle)),
                Batch((*others[8:20], needle, *others[20:25])),
                Batch((*others[:33], needle)),
            ]
            checks |= _compare("beside other rows", alone, _needle(engine, None, batches[:1], needle))
            checks |= _compare("in another slot", alone, _needle(engine, None, batches[1:], needle))
            checks |= _prefill_against_decode(engine, needle, alone)
    slot_free = checks.get("in another slot", "equal") == "equal"
    # a padded row can be kept in slot 0; under `invariant` the slot is part of the promise
    excused = {"in another slot"} if isinstance(policy, Padded) else set()
    passed = all(result == "equal" for name, result in checks.items() if name not in excused)
    return SelfCheck(numerics=engine.numerics, passed=passed, slot_free=slot_free, checks=checks)


def _request(seed: int, length: int, vocabulary: int) -> Request:
    state, ids = seed * 2654435761 + 12345, []
    for _ in range(max(length, 1)):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocabulary)
    params = GenerationParams(max_new_tokens=_STEPS)
    return Request(tuple(ids), params, ModelIdentity(source="digest", digest="self-check"), "")


def _alone(engine: Engine, needle: Request) -> Trace:
    policy = load_policy(engine.numerics.policy)
    (batch,) = policy.plan([needle], engine.limits)
    return next(iter(engine.generate(batch))).trace


def _needle(engine: Engine, policy: Padded | None, batches: Iterable[Batch], needle: Request) -> list[Trace]:
    traces = []
    for batch in batches:
        planned = batch
        if policy is not None:
            filler = (None,) * (policy.rows - len(batch.rows))
            width = bucket_width(len(needle.prompt_ids), engine.limits.context)
            planned = Batch((*batch.rows, *filler), width)
        traces += [done.trace for done in engine.generate(planned) if done.request is needle]
    return traces


def _prefill_against_decode(engine: Engine, needle: Request, decoded: Trace) -> dict[str, str]:
    for step in (1, _STEPS - 1):
        longer = Request(
            needle.prompt_ids + decoded.tokens[:step],
            GenerationParams(max_new_tokens=1),
            needle.model,
            needle.tokenizer,
        )
        prefilled = _alone(engine, longer)
        if prefilled.score_hash[0] != decoded.score_hash[step]:
            return {"prefill against decode": f"score rows differ at step {step}"}
    return {"prefill against decode": "equal"}


def _compare(name: str, alone: Trace, others: list[Trace]) -> dict[str, str]:
    for other in others:
        for step, (mine, theirs) in enumerate(zip(alone.score_hash, other.score_hash, strict=True)):
            if mine != theirs:
                return {name: f"score rows differ at step {step}"}
    return {name: "equal"}
