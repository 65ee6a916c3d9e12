"""What experiments compare, known without torch: the policies of the registry, and the benchmark's arms."""

from __future__ import annotations

from stablegen.core.policy import (
    BATCH_INVARIANT,
    ExecutionPolicy,
    Limits,
    load_policy,
    registered_policies,
    typical_policies,
)

VENDOR = "vendor"
EAGER = "eager"
STATIC = "static"
BATCH_INVARIANT_OPS = "batch_invariant_ops"


def promising_policies() -> tuple[ExecutionPolicy, ...]:
    """Return one policy of each kind that promises equal bits."""
    return tuple(policy for policy in typical_policies() if policy.promises)


def own_policy() -> ExecutionPolicy:
    """Return the policy that stablegen's own kernels run."""
    return next(policy for policy in typical_policies() if policy.engines == BATCH_INVARIANT)


def has_rows(kind: type[ExecutionPolicy]) -> bool:
    """Return whether a kind of policy is written with a number of rows."""
    return ":" in kind.form


def of_rows(kind: type[ExecutionPolicy], rows: int) -> ExecutionPolicy:
    """Return the policy of a kind whose batches have so many rows, where it has a fixed number of them."""
    return load_policy(f"{kind.name}:{rows}" if has_rows(kind) else kind.name)


def runs_one_by_one(kind: type[ExecutionPolicy]) -> bool:
    """Return whether a kind of policy runs each request in a batch of its own."""
    from stablegen.core.params import GenerationParams
    from stablegen.core.request import ModelIdentity, Request

    model, params = ModelIdentity(source="digest", digest="any"), GenerationParams(max_new_tokens=1)
    requests = [Request((token,), params, model, "") for token in range(2)]
    return len(of_rows(kind, len(requests)).plan(requests, Limits(context=2))) == len(requests)


def arm_names() -> tuple[str, ...]:
    """Return the names of the benchmark's arms; those that run a kind of policy have its name."""
    kinds = [kind for kind in registered_policies() if kind.promises]
    own = [kind.name for kind in kinds if kind.engines == BATCH_INVARIANT]
    others = [kind.name for kind in kinds if kind.engines != BATCH_INVARIANT]
    return (*own, VENDOR, *others, EAGER, STATIC, BATCH_INVARIANT_OPS)
