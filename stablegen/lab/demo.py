"""The whole idea on a real model: variance under the control policy, none under the others, and verdicts on hits.

Everything that is shown is measured when it runs; nothing is stored between runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from stablegen.client import Client
from stablegen.core.answer import Completion
from stablegen.core.params import GenerationParams
from stablegen.core.policy import ExecutionPolicy, control_policy
from stablegen.core.request import Request
from stablegen.engine.compute import cpu_threads
from stablegen.engine.planner import Planner
from stablegen.lab.bits import same_bits
from stablegen.lab.compared import of_rows, own_policy, promising_policies
from stablegen.lab.progress import ticker
from stablegen.lab.reports.demo import DemoReport, Flip, Judged, Measured
from stablegen.machine.plan import find_device, numerics_on
from stablegen.sources.checkpoint import EMBEDDED, CheckpointSource

if TYPE_CHECKING:
    from stablegen.session.call import Progress

PROMPTS = (
    "Tell me about yourself.\nanswer : ",
    "The old man began to speak about music, and",
    "What do you think about history?\nanswer : ",
    "She had never cared for books; but",
)
"""The source article's, and three chosen because two tokens nearly tie in bfloat16 within ``LONG`` tokens."""
NEIGHBOURS = (
    "Yes.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of light and",
    "Who is your favourite singer?\nanswer : ",
    "He opened the letter with trembling hands, and read it twice before he",
)
DTYPES = ("float32", "bfloat16")
STEPS = 24
"""Tokens of an answer under a policy that promises; the control gets more, to find its first flip."""
LONG = 64

_T = TypeVar("_T")


def measure(progress: Progress | None = None) -> DemoReport:
    """Return the demo's measurements on this machine, with the embedded model.

    On a CPU it runs with one thread: a model this small gains nothing from more, and on a busy machine threads that
    wait for each other take minutes.
    """
    with cpu_threads(1):
        return _measure(progress)


def _measure(progress: Progress | None) -> DemoReport:
    started = time.perf_counter()
    source = CheckpointSource.open(None)
    # a fixed number of rows suits the prompts: more would only take longer
    promising = [of_rows(type(policy), len(PROMPTS)) for policy in promising_policies()]
    runs = [(policy, dtype) for dtype in DTYPES for policy in (control_policy(), *promising)]
    tick = ticker(progress, len(runs) + 1)
    measured = []
    for policy, dtype in runs:
        measured.append(_measure_policy(source, policy, dtype))
        tick()
    judged = list(_judge_hits())
    tick()
    numerics = numerics_on(find_device("auto", DTYPES[0]), control_policy(), DTYPES[0])
    return DemoReport(
        model=source.identity.name,
        numerics=numerics.model_dump(exclude_none=True, exclude={"policy", "dtype"}),
        prompts=len(PROMPTS),
        situations=[name for name, _ in _situations(list(PROMPTS), list(NEIGHBOURS))],
        measured=measured,
        judged=judged,
        seconds=time.perf_counter() - started,
    )


def _situations(needles: list[_T], others: list[_T]) -> list[tuple[str, list[_T]]]:
    return [
        (f"{len(needles)} together, padded to the longest", needles),
        ("in another order", needles[::-1]),
        (f"beside {len(others)} others, one of them long", [*others, *needles]),
    ]


def _measure_policy(source: CheckpointSource, policy: ExecutionPolicy, dtype: str) -> Measured:
    engine = source.start(source.plan(policy, dtype, "auto"))
    params = GenerationParams(max_new_tokens=STEPS if policy.promises else LONG)
    tokenizer = source.tokenizer

    def request(prompt: str) -> Request:
        return Request(tokenizer.encode(prompt), params, source.identity, tokenizer.digest, prompt)

    needles, others = [request(prompt) for prompt in PROMPTS], [request(prompt) for prompt in NEIGHBOURS]
    planner = Planner(engine, policy, source.vocabulary)
    alone = {needle: _score_rows(planner, [needle], [needle])[needle] for needle in needles}
    rows = moved = 0
    largest, flips = 0.0, []
    for name, together in _situations(needles, others):
        found = _score_rows(planner, together, needles)
        for needle in needles:
            for step, (mine, theirs) in enumerate(zip(alone[needle], found[needle], strict=True)):
                rows += 1
                if not same_bits(mine, theirs):
                    moved += 1
                    largest = max(largest, float((mine - theirs).abs().max()))
                if mine.argmax() != theirs.argmax():
                    best = mine.topk(2).values
                    flips.append(
                        Flip(
                            prompt=str(needle.prompt),
                            situation=name,
                            step=step,
                            alone=tokenizer.token(int(mine.argmax())),
                            beside=tokenizer.token(int(theirs.argmax())),
                            margin=float(best[0] - best[1]),
                        )
                    )
                    break
    note = "a row's slot moves its bits here: each request runs in slot 0" if planner.slot_matters else ""
    return Measured(policy=policy.spec, dtype=dtype, rows=rows, moved=moved, largest=largest, flips=flips, note=note)


def _score_rows(planner: Planner, requests: list[Request], needles: list[Request]) -> dict[Request, list[torch.Tensor]]:
    """Return the score rows [V] of the needles among requests that are generated together."""
    rows: dict[Request, list[torch.Tensor]] = {needle: [] for needle in needles}

    def observe(request: Request, row: torch.Tensor) -> None:
        if request in rows:
            rows[request].append(row.cpu().clone())

    for batch in planner.batches(requests):
        if any(request in rows for _, request in batch.requests):
            for _ in planner.engine.generate(batch, observe):
                pass
    return rows


def _judge_hits() -> Iterator[Judged]:
    """Yield a miss, a hit, and hits that were recorded under another policy and under the control."""
    own, other = own_policy(), next(policy for policy in promising_policies() if policy != own_policy())
    prompts = list(PROMPTS)
    with tempfile.TemporaryDirectory(prefix="stablegen-demo-") as folder:
        with _client(own, DTYPES[0], f"{folder}/own") as client:
            for _ in range(2):
                yield _judged(client, client.complete(prompts[0], max_new_tokens=LONG))
            # computed under the client's own numerics, to compare the judgements with
            truth = client.complete(prompts, max_new_tokens=LONG)
        for policy, dtype in ((other, DTYPES[0]), (control_policy(), DTYPES[-1])):
            where = f"{folder}/{policy.name}-{dtype}"
            with _client(policy, dtype, where) as client:
                client.complete(prompts, max_new_tokens=LONG)
            with _client(own, DTYPES[0], where) as client:
                for hit, fresh in zip(client.complete(prompts, max_new_tokens=LONG), truth, strict=True):
                    assert hit.trace is not None and fresh.trace is not None
                    step = hit.trace.first_difference(fresh.trace)
                    yield _judged(client, hit, "same" if step is None else f"differs from step {step}")


def _client(policy: ExecutionPolicy, dtype: str, cache: str) -> Client:
    return Client.from_pretrained(
        EMBEDDED, policy=policy.spec, dtype=dtype, device="auto", cache_dir=cache, on_risk="serve"
    )


def _judged(client: Client, found: Completion, truth: str = "") -> Judged:
    record, verdict, text = found.record, found.verdict, client.tokenizer.token
    return Judged(
        prompt=str(record.request.prompt),
        recorded=f"{record.numerics.policy} {record.numerics.dtype}",
        current=f"{client.numerics.policy} {client.numerics.dtype}",
        cached=found.cached,
        verdict=verdict,
        token=None if verdict.token is None else text(verdict.token),
        runner_up=None if verdict.runner_up is None else text(verdict.runner_up),
        truth=truth,
    )
