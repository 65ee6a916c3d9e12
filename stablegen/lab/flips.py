"""Experiment 4: greedy answers of GPT-2 that change with the company, the causes told apart.

Request 0 is fixed and looked at; what else is in the batch changes. A prompt's answer in a batch of ``baseline`` rows
is what others are held against, each of them led along that answer's tokens, so that every step is a comparison of its
own: the same tokens went before, and a step flips where another token has the highest score. The first step that flips
is where free decoding would part.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from stablegen.core.frozen import Frozen
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, ExecutionPolicy, Invariant, load_policy
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures import check_invariant
from stablegen.engine.loading import load_engine, torch_device
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.errors import ParameterError, PolicyError, StablegenError
from stablegen.lab.machine import Machine, free_memory, machine_of
from stablegen.lab.planned import Planned
from stablegen.lab.progress import ticker
from stablegen.lab.prompts import read_prompts
from stablegen.lab.subject import DTYPES
from stablegen.lab.tables import grouped, say, sheet
from stablegen.machine.device import Device
from stablegen.machine.digests import DigestMemory
from stablegen.machine.plan import allows_static_cache, find_device, numerics_on
from stablegen.sources.checkpoint import Checkpoint, open_checkpoint
from stablegen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress

Cause = Literal["batch size", "padding", "missing mask", "as they come"]
CAUSES: dict[Cause, str] = {
    "batch size": "rows of equal length, nothing padded: the number of rows alone changes",
    "padding": "as many rows every time: the prompt is padded on the left, with its mask",
    "missing mask": "the same padding without a mask: the model reads it as text, which is a mistake and no rounding",
    "as they come": "other prompts as they are, padded to the longest, with their mask: both causes at once",
}
BASELINE = 2
BATCHES = (1, 2, 3, 4, 7, 8, 16, 32)
PADS = (1, 16, 64)
TOKENS = 8
CPU_BESIDE = 4
"""Tokens that other rows give on a CPU under a policy: its invariant kernels take one row after the other."""
COUNT = {"cuda": 48, "cpu": 24}
"""Prompts of stablegen's own where the user names no number."""
POLICIES = ("single", "padded:8", "invariant")
TOP = 10
"""Tokens of each of the two tables that are kept of a flip."""
PROMPTS = Path(__file__).with_name("prompts.jsonl")
MEANING = (
    "Where two tokens nearly tie, a rounding error decides between them, and everything that follows is another text. "
    "Batch size and padding may each move the scores by rounding errors; a missing mask gives the model another text, "
    "and is a mistake of the caller."
)


class Candidate(Frozen):
    """A token and its score, float32."""

    token: int
    text: str
    score: float


class Flip(Frozen):
    """The first step of a trial at which another token has the highest score: the two tables of the best tokens.

    ``margin``: the baseline's best score less its second; ``setting`` as in ``Trial``.
    """

    cause: Cause
    setting: int
    step: int
    margin: float
    baseline: tuple[Candidate, ...]
    other: tuple[Candidate, ...]


class Trial(Frozen):
    """One prompt in one company, along the baseline's answer.

    ``setting``: the rows of the batch or, of ``padding`` and ``missing mask``, the tokens of padding. ``moved``: steps
    whose score row has other bits; ``largest``: the largest difference of a score; ``flips``: the steps that flip.
    """

    cause: Cause
    setting: int
    moved: int
    largest: float
    flips: tuple[int, ...]


class PromptFlips(Frozen):
    """What happened to one prompt: ``length`` of the prompt and ``steps`` of its answer in tokens.

    ``shown``: of each cause, the first flip of the first trial that has one.
    """

    prompt: str
    length: int
    answer: str
    steps: int
    trials: tuple[Trial, ...]
    shown: tuple[Flip, ...]


class Total(Frozen):
    """All prompts in one setting: how many flipped at all, and of their steps how many moved and how many flipped."""

    cause: Cause
    setting: int
    prompts: int
    flipped: int
    steps: int
    moved_steps: int
    flipped_steps: int
    largest: float


class PolicyTotal(Frozen):
    """All prompts as they come under one policy, in batches of one size against batches of the baseline's."""

    policy: str
    batch: int
    prompts: int
    flipped: int
    steps: int
    moved_steps: int


class DtypeFlips(Frozen):
    """What was found in one dtype: under ``native`` prompt by prompt, under the policies in all.

    ``notes``: what a reader must know of a policy's figures.
    """

    dtype: str
    prompts: tuple[PromptFlips, ...]
    policies: tuple[PolicyTotal, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def totals(self) -> list[Total]:
        """Return the totals by cause and setting."""
        causes = list(CAUSES)
        trials: dict[tuple[Cause, int], list[tuple[PromptFlips, Trial]]] = {}
        for one in self.prompts:
            for trial in one.trials:
                trials.setdefault((trial.cause, trial.setting), []).append((one, trial))
        return [
            Total(
                cause=cause,
                setting=setting,
                prompts=len(found),
                flipped=sum(bool(trial.flips) for _, trial in found),
                steps=sum(one.steps for one, _ in found),
                moved_steps=sum(trial.moved for _, trial in found),
                flipped_steps=sum(len(trial.flips) for _, trial in found),
                largest=max(trial.largest for _, trial in found),
            )
            for (cause, setting), found in sorted(
                trials.items(), key=lambda item: (causes.index(item[0][0]), item[0][1])
            )
        ]


class FlipsReport(Frozen):
    """What the experiment found; ``tokens`` an answer has at most, ``baseline`` rows of what is held against.

    ``skipped``: prompts that were left out; ``unavailable``: policies under which the model cannot run. Each says why.
    """

    model: str
    machine: Machine
    baseline: int
    tokens: int
    skipped: tuple[str, ...]
    dtypes: tuple[DtypeFlips, ...]
    unavailable: dict[str, str] = Field(default_factory=dict)
    seconds: float

    @property
    def meaning(self) -> str:
        """Return in words what was seen."""
        totals = [total for one in self.dtypes for total in one.policies]
        if not totals:
            return MEANING
        names = ", ".join(dict.fromkeys(total.policy for total in totals))
        moved, steps = sum(total.moved_steps for total in totals), sum(total.steps for total in totals)
        return f"{MEANING} Under {names}, {moved:,} of {steps:,} score rows moved."


def own_prompts() -> list[str]:
    """Return the prompts that come with stablegen, the source article's first."""
    with PROMPTS.open("rb") as stream:
        return [str(line.prompt) for line in read_prompts(stream, PROMPTS.name)]


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
    """Answer each prompt in many companies, under ``native`` by cause and under the policies as they come.

    ``model``: the embedded ``tiny-gpt2`` if None. ``batches``: rows, compared with ``baseline`` rows; ``pads``: tokens
    of padding, compared with none. ``tokens`` an answer has at most. ``dtypes``: those that suit the device if none.
    ``prompts``: stablegen's own if None; ``count``: so many from the beginning, of its own ``COUNT`` if None. Prompts
    that do not fit are left out and named. ``policies``: those of ``POLICIES`` under which the model can run if None.
    Raises ``ParameterError`` for what cannot be measured, ``DeviceError`` or ``ModelError`` where device or model
    cannot be had.
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
        raise ParameterError(f"{len(asked)} prompts, of them {count}", accepted="at least one")
    torch_device(place.name)
    chosen = tuple(dict.fromkeys(dtypes)) or DTYPES[kind]
    for dtype in chosen:
        find_device(device, dtype)
    memory = DigestMemory(None)
    checkpoint = open_checkpoint(model, revision, memory)
    plans, unavailable = _plans(policies, checkpoint)
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file, memory)
    set_up = _SetUp(checkpoint, tokenizer, place, tokens, baseline, tuple(batches), tuple(pads))
    subjects, skipped = set_up.subjects(asked, count)
    tick = ticker(progress, len(chosen) * len(subjects) * (1 + len(plans)))
    found = []
    for dtype in chosen:
        native = _Native(set_up, dtype)
        seen = []
        for subject in subjects:
            seen.append(native.prompt(subject))
            tick()
        del native
        free_memory(place.name)
        totals: list[PolicyTotal] = []
        notes: list[str] = []
        for plan in plans:
            engine = set_up.load(plan.spec, dtype)
            planned = Planned(engine, plan, checkpoint.vocabulary)
            totals += _under_policy(set_up, planned, subjects, tick)
            if planned.slot_matters:
                notes.append(f"{plan.spec}: the slot moves bits here, so each request runs in slot 0")
            del engine, planned
            free_memory(place.name)
        found.append(DtypeFlips(dtype=dtype, prompts=tuple(seen), policies=tuple(totals), notes=tuple(notes)))
    return FlipsReport(
        model=checkpoint.identity.name,
        machine=machine_of(place),
        baseline=baseline,
        tokens=tokens,
        skipped=tuple(skipped),
        dtypes=tuple(found),
        unavailable=unavailable,
        seconds=time.perf_counter() - started,
    )


def _plans(policies: Sequence[str] | None, checkpoint: Checkpoint) -> tuple[list[ExecutionPolicy], dict[str, str]]:
    """Return the policies to compare with, and of those that were not asked for by name why some cannot run."""
    plans = [load_policy(policy) for policy in (POLICIES if policies is None else policies)]
    if any(not plan.promises for plan in plans):
        raise PolicyError("policy 'native' is what others are compared with", accepted="single, padded:N, invariant")
    if Invariant() in plans:
        try:
            check_invariant(checkpoint.config)
        except PolicyError as error:
            if policies is not None:
                raise
            plans.remove(Invariant())
            return plans, {"invariant": error.problem}
    return plans, {}


@dataclass(frozen=True, slots=True)
class _Subject:
    """A prompt that is looked at, and what stands beside it: as many other prompts as the largest batch wants."""

    prompt: str
    ids: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]

    def other(self, index: int, length: int) -> tuple[int, ...]:
        """Return the ``index``-th other prompt brought to a length by what comes after it."""
        ids: list[int] = []
        while len(ids) < length:
            ids += self.others[index % len(self.others)]
            index += 1
        return tuple(ids[:length])


@dataclass(frozen=True, slots=True)
class _SetUp:
    """What all runs of the experiment share."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    device: Device
    tokens: int
    baseline: int
    batches: tuple[int, ...]
    pads: tuple[int, ...]

    def load(self, policy: str, dtype: str) -> Engine:
        """Return the engine of a policy."""
        static = allows_static_cache(self.checkpoint.config)
        numerics = numerics_on(self.device, load_policy(policy), dtype, static_cache=static)
        return load_engine(self.checkpoint, numerics, self.device.name, None, self.tokenizer)

    @property
    def beside(self) -> int:
        """Return how many tokens other rows give under a policy at most."""
        return min(self.tokens, self.tokens if self.device.is_cuda else CPU_BESIDE)

    def subjects(self, prompts: Sequence[str], count: int | None) -> tuple[list[_Subject], list[str]]:
        """Return the first ``count`` prompts with their company of all, and those that do not fit the model."""
        most = self.checkpoint.context - self.tokens - max(self.pads, default=0)
        if self.tokens < 1 or most < 1:
            raise ParameterError(
                f"tokens={self.tokens}", accepted=f"1 to {self.checkpoint.context - 1} with the padding"
            )
        fitting: list[tuple[str, tuple[int, ...]]] = []
        skipped = []
        for prompt in prompts:
            try:
                ids = self.tokenizer.encode(prompt)
            except StablegenError as error:
                skipped.append(f"{prompt!r:.60}: {error}")
                continue
            if 1 <= len(ids) <= most:
                fitting.append((prompt, ids))
            else:
                skipped.append(f"{prompt!r:.60}: {len(ids)} tokens, from 1 to {most} fit")
        if not fitting:
            raise ParameterError(f"none of the {len(prompts)} prompts fits the model", accepted=f"1 to {most} tokens")
        company = [ids for _, ids in fitting]
        if len(company) == 1:
            company += [self.tokenizer.encode(prompt) for prompt in own_prompts()]
        found = []
        for place, (prompt, ids) in enumerate(fitting[:count]):
            # other ones beside each prompt, and the same ones in every run
            turned = company[place + 1 :] + company[:place]
            found.append(_Subject(prompt, ids, tuple(turned)))
        return found, skipped

    def request(self, ids: Sequence[int], tokens: int) -> Request:
        """Return the request for an answer of so many tokens at most."""
        ends = self.checkpoint.eos_token_ids
        params = GenerationParams(max_new_tokens=tokens, eos_token_ids=ends)
        return Request(tuple(ids), params, self.checkpoint.identity, self.tokenizer.digest)

    def as_they_come(self, subject: _Subject, batch: int, tokens: int) -> list[Request]:
        """Return the prompt and other prompts as they are; the others give ``tokens`` each."""
        others = [subject.others[index % len(subject.others)] for index in range(batch - 1)]
        return [self.request(subject.ids, self.tokens), *(self.request(ids, tokens) for ids in others)]

    def trials(self, subject: _Subject) -> Iterator[tuple[Cause, int, list[Request]]]:
        """Yield each cause and setting with its batch, the prompt in row 0.

        The others give one token and then run on idle, as rows do in ``generate`` that have finished.
        """
        length = len(subject.ids)
        ids = subject.ids
        mine = self.request(ids, self.tokens)
        for batch in self.batches:
            if batch != self.baseline:
                beside = [self.request(subject.other(index, length), 1) for index in range(batch - 1)]
                yield "batch size", batch, [mine, *beside]
        for pad in self.pads:
            beside = [self.request(subject.other(index, length + pad), 1) for index in range(self.baseline - 1)]
            yield "padding", pad, [mine, *beside]
            filler = (self.checkpoint.eos_token_ids or (0,))[0]  # what GPT-2 is padded with
            unmasked = self.request((filler,) * pad + ids, self.tokens)
            yield "missing mask", pad, [unmasked, *beside]
        for batch in self.batches:
            if batch != self.baseline:
                yield "as they come", batch, self.as_they_come(subject, batch, 1)


# --- under native -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """What row 0 showed: its trace, and its score rows [T, V]."""

    trace: Trace
    scores: torch.Tensor


class _Native:
    """Transformers as it is, in batches of every kind."""

    def __init__(self, set_up: _SetUp, dtype: str) -> None:
        engine = set_up.load("native", dtype)
        assert isinstance(engine, TransformersEngine)
        self._engine = engine
        self._set_up = set_up
        self._text = set_up.tokenizer.token

    def prompt(self, subject: _Subject) -> PromptFlips:
        """Return what happens to one prompt."""
        set_up = self._set_up
        equal = [set_up.request(subject.other(i, len(subject.ids)), 1) for i in range(set_up.baseline - 1)]
        alone = self._run([set_up.request(subject.ids, set_up.tokens), *equal])
        mixed = self._run(set_up.as_they_come(subject, set_up.baseline, 1))
        trials: list[Trial] = []
        shown: dict[Cause, Flip] = {}
        for cause, setting, requests in set_up.trials(subject):
            baseline = mixed if cause == "as they come" else alone
            trial, flip = self._held_against(baseline, cause, setting, requests)
            trials.append(trial)
            if flip is not None:
                shown.setdefault(cause, flip)
        return PromptFlips(
            prompt=subject.prompt,
            length=len(subject.ids),
            answer=set_up.tokenizer.decode(alone.trace.tokens),
            steps=len(alone.trace),
            trials=tuple(trials),
            shown=tuple(shown.values()),
        )

    def _run(self, requests: Sequence[Request], along: Sequence[int] | None = None) -> _Run:
        """Return what row 0 of a batch shows, free or led along given tokens."""
        rows: list[torch.Tensor] = []

        def observe(slot: int, row: torch.Tensor) -> None:
            if slot == 0:
                rows.append(row.clone())

        batch = Batch(tuple(requests))
        running = (
            self._engine.generate(batch, observe) if along is None else self._engine.follow(batch, {0: along}, observe)
        )
        with closing(running):
            mine = next(generated for generated in running if generated.composition.slot == 0)
        return _Run(mine.trace, torch.stack(rows[: len(mine.trace)]))

    def _held_against(
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
        return tuple(Candidate(token=token, text=self._text(token), score=score) for token, score in pairs)


# --- under the policies -----------------------------------------------------------------------------------------------


def _under_policy(
    set_up: _SetUp, planned: Planned, subjects: Sequence[_Subject], tick: Callable[[], None]
) -> list[PolicyTotal]:
    """Return the totals of a policy: prompts as they come, in each batch size against the baseline's."""
    counts: Counter[tuple[int, str]] = Counter()
    for subject in subjects:
        baseline = _mine(planned, set_up.as_they_come(subject, set_up.baseline, set_up.beside))
        for batch in set_up.batches:
            if batch == set_up.baseline:
                continue
            other = _mine(planned, set_up.as_they_come(subject, batch, set_up.beside))
            parted = baseline.first_difference(other)
            pairs = list(zip(baseline.score_hash, other.score_hash, strict=False))
            if parted is not None:  # what follows has other tokens before it
                pairs = pairs[: parted + 1]
            counts[batch, "flipped"] += parted is not None
            counts[batch, "steps"] += len(pairs)
            counts[batch, "moved"] += sum(mine != theirs for mine, theirs in pairs)
        tick()
    return [
        PolicyTotal(
            policy=planned.policy.spec,
            batch=batch,
            prompts=len(subjects),
            flipped=counts[batch, "flipped"],
            steps=counts[batch, "steps"],
            moved_steps=counts[batch, "moved"],
        )
        for batch in set_up.batches
        if batch != set_up.baseline
    ]


def _mine(planned: Planned, requests: Sequence[Request]) -> Trace:
    """Return the trace of the first request among what is asked together."""
    mine = requests[0]
    for batch in planned.batches(requests):
        if not any(request is mine for _, request in batch.requests):
            continue  # it runs before or after, and shares nothing
        for generated in planned.engine.generate(batch):
            if generated.request is mine:
                found = generated.trace
    return found


# --- showing ----------------------------------------------------------------------------------------------------------


def render(report: FlipsReport, console: Console) -> None:
    """Print a report as tables, and of each dtype the flips of widest margin."""
    from rich.text import Text

    say(console, f"flips: {report.model}, greedy, {report.tokens} tokens at most, on {report.machine.summary()}")
    for found in report.dtypes:
        say(console, f"{found.dtype}: {len(found.prompts)} prompts under native, against {report.baseline} rows")
        table = sheet(
            "cause", "rows or padding", "prompts that flip", "steps that flip", "score rows moved", "by at most"
        )
        for cause, settings, cells in grouped((t.cause, t.setting, _total_cells(t)) for t in found.totals):
            table.add_row(cause, settings, *cells)
        console.print(table)
        table = sheet("policy", "rows", "prompts that flip", "score rows moved")
        for policy, batches, told in grouped((t.policy, t.batch, _policy_cells(t)) for t in found.policies):
            table.add_row(policy, batches, *told)
        if found.policies:
            console.print(table)
        for note in found.notes:
            say(console, note)
        for prompt, flip in first_flips(found):
            company = f"{flip.cause} {flip.setting}"
            say(console, f"  {prompt!r:.60} {company}, step {flip.step}, margin {flip.margin:.3g}")
            table = sheet("  baseline", "score", company, "score")
            for mine, theirs in zip(flip.baseline, flip.other, strict=True):
                texts = (f"  {mine.text!r}", repr(theirs.text))
                scores = (f"{mine.score:.6g}", f"{theirs.score:.6g}")
                table.add_row(Text(texts[0]), scores[0], Text(texts[1]), scores[1])
            console.print(table)
    for line in report.skipped:
        say(console, f"left out: {line}")
    for name, reason in report.unavailable.items():
        say(console, f"not measured: {name}: {reason}")
    say(console, report.meaning)


def _total_cells(total: Total) -> tuple[str, ...]:
    return (
        f"{total.flipped} of {total.prompts}",
        f"{total.flipped_steps} of {total.steps}",
        f"{total.moved_steps} of {total.steps}",
        f"{total.largest:.3g}",
    )


def _policy_cells(total: PolicyTotal) -> tuple[str, ...]:
    return f"{total.flipped} of {total.prompts}", f"{total.moved_steps} of {total.steps}"


def first_flips(found: DtypeFlips, most: int = 2) -> list[tuple[str, Flip]]:
    """Return ``most`` prompts that flip by rounding, those of the widest margins, each with its first flip."""
    flips = [(one.prompt, flip) for one in found.prompts for flip in one.shown[:1] if flip.cause != "missing mask"]
    return sorted(flips, key=lambda pair: -pair[1].margin)[:most]
