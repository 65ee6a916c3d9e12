"""Experiment 4: greedy answers of GPT-2 that change with the rest of the batch, told apart by cause.

Row 0 of each batch is compared; the rest of the batch changes. A prompt's answer in a batch of ``baseline`` rows is the
reference. Other batches are teacher-forced along it, so that every step is a comparison of its own: the same tokens
precede it, and a step flips where another token has the highest score. The first step that flips is where free decoding
would diverge.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stablegen.core.policy import Batch, ExecutionPolicy, control_policy, load_policy, policy_forms
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.loading import torch_device
from stablegen.engine.planner import Planner
from stablegen.errors import ParameterError, PolicyError
from stablegen.lab.compared import promising_policies
from stablegen.lab.device import free_memory, machine_of
from stablegen.lab.flip_batches import Batches, Needle, own_prompts
from stablegen.lab.progress import ticker
from stablegen.lab.reports.flips import (
    Candidate,
    Cause,
    DtypeFlips,
    Flip,
    FlipsReport,
    PolicyTotal,
    PromptFlips,
    Trial,
)
from stablegen.lab.subject import DTYPES
from stablegen.machine.plan import find_device
from stablegen.sources.checkpoint import CheckpointSource

if TYPE_CHECKING:
    from stablegen.session.call import Progress

BASELINE = 2
BATCHES = (1, 2, 3, 4, 7, 8, 16, 32)
PADS = (1, 16, 64)
TOKENS = 8
COUNT = {"cuda": 48, "cpu": 24}
"""How many of stablegen's own prompts are used where the user names no number."""
TOP = 10
"""Tokens in each of a flip's two tables."""


def measure(
    *,
    model: str | None = None,
    revision: str | None = None,
    dtypes: Sequence[str] = (),
    batches: Sequence[int] = BATCHES,
    baseline: int = BASELINE,
    pads: Sequence[int] = PADS,
    tokens: int = TOKENS,
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    policies: Sequence[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> FlipsReport:
    """Answer each prompt in many batches, under the control policy by cause, and under the others at mixed lengths.

    ``model``: the embedded ``tiny-gpt2`` if None. ``batches``: rows, compared with ``baseline`` rows; ``pads``: tokens
    of padding, compared with none. ``tokens``: the most that an answer has. ``dtypes``: those that suit the device if
    empty. ``prompts``: stablegen's own if None; ``count``: how many of them, from the beginning (None: all, and of
    stablegen's own ``COUNT``). Prompts that do not fit are left out and named. ``policies``: if None one of each kind
    that promises equal bits, as far as the model can run under it. Raises ``ParameterError`` or ``PolicyError`` for
    settings that cannot be measured, ``DeviceError`` or ``ModelError`` where device or model cannot be used.
    """
    started = time.perf_counter()
    place = find_device(device, "float32")
    kind = "cuda" if place.is_cuda else "cpu"
    if count is None and prompts is None:
        count = COUNT[kind]
    asked = list(own_prompts() if prompts is None else prompts)
    for name, values, least in (("batch", batches, 1), ("padding", pads, 1), ("baseline", (baseline,), 2)):
        if any(value < least for value in values):
            raise ParameterError(f"{name}={','.join(map(str, values))}", accepted=f"whole numbers from {least} on")
    if not asked or (count is not None and count < 1):
        raise ParameterError(f"count={count} of {len(asked)} prompts", accepted="at least one")
    torch_device(place.name)
    chosen = tuple(dict.fromkeys(dtypes)) or DTYPES[kind]
    for dtype in chosen:
        find_device(device, dtype)
    source = CheckpointSource.open(model, revision)
    compared, unavailable = _compared(policies, source)
    set_up = Batches(source, place, tokens, baseline, tuple(batches), tuple(pads))
    needles, skipped = set_up.needles(asked, count)
    tick = ticker(progress, len(chosen) * len(needles) * (1 + len(compared)))
    found = []
    for dtype in chosen:
        control = _Control(set_up, dtype)
        seen = []
        for needle in needles:
            seen.append(control.prompt(needle))
            tick()
        del control
        free_memory(place.name)
        totals: list[PolicyTotal] = []
        notes: list[str] = []
        for policy in compared:
            planner = Planner(set_up.start(policy, dtype), policy, source.vocabulary)
            totals += _under_policy(set_up, planner, needles, tick)
            if planner.slot_matters:
                notes.append(f"{policy}: a row's slot moves its bits here, so each request runs in slot 0")
            del planner
            free_memory(place.name)
        found.append(DtypeFlips(dtype=dtype, prompts=tuple(seen), policies=tuple(totals), notes=tuple(notes)))
    return FlipsReport(
        model=source.identity.name,
        machine=machine_of(place),
        control=control_policy().spec,
        baseline=baseline,
        tokens=tokens,
        skipped=tuple(skipped),
        dtypes=tuple(found),
        unavailable=unavailable,
        seconds=time.perf_counter() - started,
    )


def _compared(asked: Sequence[str] | None, source: CheckpointSource) -> tuple[list[ExecutionPolicy], dict[str, str]]:
    """Return the policies to measure and, where none were asked for, why others cannot run this model."""
    if asked is None:
        problems: dict[str, str] = {}
        compared = []
        for policy in promising_policies():
            try:
                source.check(policy)
            except PolicyError as error:
                problems[policy.spec] = error.problem
            else:
                compared.append(policy)
        return compared, problems
    compared = [load_policy(policy) for policy in asked]
    for policy in compared:
        if not policy.promises:
            raise PolicyError(
                f"policy {policy.spec!r} is the control that the others are compared with",
                accepted=", ".join(policy_forms(promising=True)),
            )
        source.check(policy)
    return compared, {}


# --- under the control policy -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """What row 0 of a batch gave: its trace, and its score rows [T, V]."""

    trace: Trace
    scores: torch.Tensor


class _Control:
    """Transformers as it is, in batches of every kind."""

    def __init__(self, set_up: Batches, dtype: str) -> None:
        self._engine = set_up.start(control_policy(), dtype)
        self._set_up = set_up

    def prompt(self, needle: Needle) -> PromptFlips:
        """Return what happens to one prompt."""
        set_up = self._set_up
        mine, length = set_up.request(needle.ids, set_up.tokens), len(needle.ids)
        equal = self._run([mine, *set_up.equal(needle, set_up.baseline, length)])
        mixed = self._run(set_up.mixed(needle, set_up.baseline, 1))
        trials: list[Trial] = []
        shown: dict[Cause, Flip] = {}
        for cause, setting, requests in set_up.trials(needle):
            baseline = mixed if cause == "mixed lengths" else equal
            trial, flip = self._compare(baseline, cause, setting, requests)
            trials.append(trial)
            if flip is not None:
                shown.setdefault(cause, flip)
        return PromptFlips(
            prompt=needle.prompt,
            length=length,
            answer=set_up.source.tokenizer.decode(equal.trace.tokens),
            steps=len(equal.trace),
            trials=tuple(trials),
            shown=tuple(shown.values()),
        )

    def _run(self, requests: Sequence[Request], answer: Sequence[int] | None = None) -> _Run:
        """Return what row 0 of a batch gives: decoding freely, or teacher-forced along an answer."""
        mine = requests[0]
        rows: list[torch.Tensor] = []

        def observe(request: Request, row: torch.Tensor) -> None:
            if request is mine:
                rows.append(row.clone())

        batch = Batch(tuple(requests))
        running = (
            self._engine.generate(batch, observe)
            if answer is None
            else self._engine.follow(batch, {mine: answer}, observe)
        )
        with closing(running):
            trace = next(generated.trace for generated in running if generated.request is mine)
        return _Run(trace, torch.stack(rows[: len(trace)]))

    def _compare(
        self, baseline: _Run, cause: Cause, setting: int, requests: Sequence[Request]
    ) -> tuple[Trial, Flip | None]:
        run = self._run(requests, baseline.trace.tokens)
        hashes = zip(baseline.trace.score_hash, run.trace.score_hash, strict=True)
        tokens = zip(baseline.trace.tokens, run.trace.tokens, strict=True)
        flips = tuple(step for step, (mine, theirs) in enumerate(tokens) if mine != theirs)
        trial = Trial(
            cause=cause,
            setting=setting,
            moved=sum(mine != theirs for mine, theirs in hashes),
            largest=(baseline.scores - run.scores).abs().max().item(),
            flips=flips,
        )
        if not flips:
            return trial, None
        step = flips[0]
        return trial, Flip(
            cause=cause,
            setting=setting,
            step=step,
            margin=baseline.trace.margins[step],
            baseline=self._best(baseline.scores[step], baseline.trace.tokens[step]),
            other=self._best(run.scores[step], run.trace.tokens[step]),
        )

    def _best(self, scores: torch.Tensor, winner: int) -> tuple[Candidate, ...]:
        """Return the best tokens of a score row, the chosen one first where several are equal."""
        best = scores.topk(min(TOP, len(scores)))
        pairs = sorted(
            zip(best.indices.tolist(), best.values.tolist(), strict=True),
            key=lambda pair: (-pair[1], pair[0] != winner, pair[0]),
        )
        text = self._set_up.source.tokenizer.token
        return tuple(Candidate(token=token, text=text(token), score=score) for token, score in pairs)


# --- under the policies -----------------------------------------------------------------------------------------------


def _under_policy(
    set_up: Batches, planner: Planner, needles: Sequence[Needle], tick: Callable[[], None]
) -> list[PolicyTotal]:
    """Return the totals of a policy at mixed lengths: each batch size against the baseline's."""
    sizes = [size for size in set_up.sizes if size != set_up.baseline]
    counts: Counter[tuple[int, str]] = Counter()
    for needle in needles:
        baseline = _trace_of_first(planner, set_up.mixed(needle, set_up.baseline, set_up.beside))
        for size in sizes:
            other = _trace_of_first(planner, set_up.mixed(needle, size, set_up.beside))
            diverged = baseline.first_difference(other)
            pairs = list(zip(baseline.score_hash, other.score_hash, strict=False))
            if diverged is not None:  # other tokens precede the steps after it
                pairs = pairs[: diverged + 1]
            counts[size, "flipped"] += diverged is not None
            counts[size, "steps"] += len(pairs)
            counts[size, "moved"] += sum(mine != theirs for mine, theirs in pairs)
        tick()
    return [
        PolicyTotal(
            policy=planner.policy.spec,
            batch=size,
            prompts=len(needles),
            flipped=counts[size, "flipped"],
            steps=counts[size, "steps"],
            moved_steps=counts[size, "moved"],
        )
        for size in sizes
    ]


def _trace_of_first(planner: Planner, requests: Sequence[Request]) -> Trace:
    """Return the trace of the first of several requests that are generated together."""
    mine = requests[0]
    # those of other batches run before or after it, and share nothing with it
    batch = next(one for one in planner.batches(requests) if any(request is mine for _, request in one.requests))
    with closing(planner.engine.generate(batch)) as running:
        return next(generated.trace for generated in running if generated.request is mine)
