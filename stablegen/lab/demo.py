"""The whole idea on a real model: variance under ``native``, none under the three policies, verdicts on hits.

Everything shown is measured when it runs; nothing is stored between runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from stablegen.client import Client
from stablegen.core.answer import Verdict
from stablegen.core.frozen import Frozen
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, Native, load_policy
from stablegen.core.request import Request
from stablegen.engine.base import Engine
from stablegen.engine.loading import load_engine
from stablegen.engine.transformers.decode import cpu_threads
from stablegen.lab.bits import same_bits
from stablegen.lab.planned import Planned
from stablegen.lab.progress import ticker
from stablegen.machine.digests import DigestMemory
from stablegen.machine.plan import allows_static_cache, find_device, numerics_on
from stablegen.sources.checkpoint import open_checkpoint
from stablegen.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from stablegen.client import Progress

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
POLICIES = ("single", "padded:4", "invariant")
STEPS = 24
"""Tokens an answer of the policies has; the control gets more, to find its first flip."""
LONG = 64


class Flip(Frozen):
    """The first step at which a prompt's answer beside others leaves its answer alone."""

    prompt: str
    situation: str
    step: int
    alone: str
    beside: str
    margin: float


class Measured(Frozen):
    """One policy and dtype over all situations: score rows compared, moved, by how much, and which tokens flipped.

    Rows are compared bit for bit, up to the first flip; ``largest`` is the greatest difference of a score.
    """

    policy: str
    dtype: str
    rows: int
    moved: int
    largest: float
    flips: list[Flip]
    note: str = ""


class Judged(Frozen):
    """One look-up: what the record was computed by, what the client would compute, and the verdict."""

    prompt: str
    recorded: str
    current: str
    cached: bool
    verdict: Verdict
    token: str | None = None
    runner_up: str | None = None
    truth: str = ""


class DemoReport(Frozen):
    """What ``stablegen demo`` measured; ``device`` and versions are in each ``numerics``."""

    model: str
    numerics: dict[str, Any]
    situations: list[str]
    measured: list[Measured]
    judged: list[Judged]
    seconds: float


def measure(progress: Progress | None = None) -> DemoReport:
    """Return the demo's measurements on this machine, with the embedded model.

    On a CPU it runs with one thread: a model this small gains nothing from more, and on a busy machine threads that
    wait for each other take minutes.
    """
    with cpu_threads(1):
        return _measure(progress)


def _measure(progress: Progress | None) -> DemoReport:
    started = time.perf_counter()
    runs = [(policy, dtype) for dtype in DTYPES for policy in ("native", *POLICIES)]
    tick = ticker(progress, len(runs) + 1)
    measured = []
    for policy, dtype in runs:
        measured.append(_measure_policy(policy, dtype))
        tick()
    judged = list(_judge_hits())
    tick()
    device = find_device("auto", "float32")
    return DemoReport(
        model="tiny-gpt2",
        numerics=numerics_on(device, Native(), "float32").model_dump(exclude_none=True, exclude={"policy", "dtype"}),
        situations=[name for name, _ in _situations(list(PROMPTS), list(NEIGHBOURS))],
        measured=measured,
        judged=judged,
        seconds=time.perf_counter() - started,
    )


def _situations(needles: list[Any], others: list[Any]) -> list[tuple[str, list[Any]]]:
    return [
        (f"{len(needles)} together, padded to the longest", needles),
        ("in another order", needles[::-1]),
        (f"beside {len(others)} others, one of them long", [*others, *needles]),
    ]


def _measure_policy(spec: str, dtype: str) -> Measured:
    memory = DigestMemory(None)
    checkpoint = open_checkpoint(None, None, memory)
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file, memory)
    policy = load_policy(spec)
    device = find_device("auto", dtype)
    planned = numerics_on(device, policy, dtype, static_cache=allows_static_cache(checkpoint.config))
    engine = load_engine(checkpoint, planned, device.name)
    params = GenerationParams(max_new_tokens=STEPS if policy.promises else LONG)

    def request(prompt: str) -> Request:
        return Request(tokenizer.encode(prompt), params, checkpoint.identity, tokenizer.digest, prompt)

    needles, others = [request(prompt) for prompt in PROMPTS], [request(prompt) for prompt in NEIGHBOURS]
    runs = Planned(engine, policy, checkpoint.vocabulary)
    alone = {id(needle): _rows(engine, runs.batches([needle]), [needle])[id(needle)] for needle in needles}
    rows = moved = 0
    largest, flips = 0.0, []
    for name, together in _situations(needles, others):
        found = _rows(engine, runs.batches(together), needles)
        for needle in needles:
            before, after = alone[id(needle)], found[id(needle)]
            for step, (mine, theirs) in enumerate(zip(before, after, strict=True)):
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
    note = "the slot moves bits here: each request runs in slot 0" if runs.slot_matters else ""
    return Measured(policy=spec, dtype=dtype, rows=rows, moved=moved, largest=largest, flips=flips, note=note)


def _rows(engine: Engine, batches: Iterator[Batch], needles: list[Request]) -> dict[int, list[torch.Tensor]]:
    wanted: dict[int, list[torch.Tensor]] = {id(needle): [] for needle in needles}
    for batch in batches:
        names = {slot: id(request) for slot, request in batch.requests}
        if not wanted.keys() & set(names.values()):
            continue

        def observe(slot: int, row: torch.Tensor, names: dict[int, int] = names) -> None:
            if names[slot] in wanted:
                wanted[names[slot]].append(row.cpu().clone())

        for _ in engine.generate(batch, observe):
            pass
    return wanted


def _judge_hits() -> Iterator[Judged]:
    prompts = list(PROMPTS)
    with tempfile.TemporaryDirectory(prefix="stablegen-demo-") as folder:
        with Client.from_pretrained(
            "tiny-gpt2", policy="invariant", dtype="float32", device="auto", cache_dir=f"{folder}/own"
        ) as client:
            for _ in range(2):
                completion = client.complete(prompts[0], max_new_tokens=LONG)
                yield _judged(client, completion.record, completion.cached, completion.verdict)
        for policy, dtype in (("single", "float32"), ("native", "bfloat16")):
            where = f"{folder}/{policy}-{dtype}"
            with Client.from_pretrained("tiny-gpt2", policy=policy, dtype=dtype, cache_dir=where) as client:
                client.complete(prompts, max_new_tokens=LONG)
            with Client.from_pretrained(
                "tiny-gpt2", policy="invariant", dtype="float32", device="auto", cache_dir=where, on_risk="serve"
            ) as client:
                hits = client.complete(prompts, max_new_tokens=LONG)
                # the truth, beside the judgement: computed apart, under the client's own numerics
                with Client.from_pretrained(
                    "tiny-gpt2", policy="invariant", dtype="float32", device="auto", cache_dir=f"{folder}/own"
                ) as fresh:
                    truth = fresh.complete(prompts, max_new_tokens=LONG)
                for hit, real in zip(hits, truth, strict=True):
                    assert hit.trace is not None
                    assert real.trace is not None
                    step = hit.trace.first_difference(real.trace)
                    said = "same" if step is None else f"differs from step {step}"
                    yield _judged(client, hit.record, hit.cached, hit.verdict, said)


def _judged(client: Client, record: Any, cached: bool, verdict: Verdict, truth: str = "") -> Judged:
    show = client.token_text(record)
    return Judged(
        prompt=record.request.prompt,
        recorded=f"{record.numerics.policy} {record.numerics.dtype}",
        current=f"{client.numerics.policy} {client.numerics.dtype}",
        cached=cached,
        verdict=verdict,
        token=None if verdict.token is None else show(verdict.token),
        runner_up=None if verdict.runner_up is None else show(verdict.runner_up),
        truth=truth,
    )


def render(report: DemoReport, console: Console) -> None:
    """Print a report as tables."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False)

    def table(*columns: str) -> Table:
        made = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            made.add_column(column, no_wrap=True)
        return made

    device = report.numerics["device_model"]
    say(f"{report.model} on {device}, torch {report.numerics['torch']}, {len(PROMPTS)} prompts")
    say("each prompt alone, then " + "; ".join(report.situations))
    for title, native in (("(a) native: what transformers gives", True), ("(b) the three policies", False)):
        say(f"\n{title}")
        sheet = table("policy", "dtype", "score rows", "moved", "largest difference", "answers that flip", "")
        rows = [m for m in report.measured if (m.policy == "native") == native]
        for m in rows:
            largest = f"{m.largest:.3g}" if m.moved else "0: not one bit"
            sheet.add_row(m.policy, m.dtype, str(m.rows), str(m.moved), largest, str(len(m.flips)), m.note)
        console.print(sheet)
        if native:
            for flip in (flip for m in rows for flip in m.flips):
                say(
                    f"  {flip.prompt!r} {flip.situation}: step {flip.step} says {flip.beside!r}, "
                    f"alone {flip.alone!r} (margin {flip.margin:.3g})"
                )
            if not any(m.flips for m in rows):
                say("  the scores moved, no token flipped on this machine in these situations")
    say("\n(c) the cache: a miss, a hit, and hits recorded under other numerics")
    sheet = table(
        "prompt", "recorded by", "asked by", "", "verdict", "p(diverges)", "step", "tokens", "margin", "really"
    )
    for j in report.judged:
        v = j.verdict
        sheet.add_row(
            repr(j.prompt)[:24],
            j.recorded,
            j.current,
            "hit" if j.cached else "miss",
            v.status,
            "" if v.probability is None else f"{v.probability:.2g} {v.basis}",
            "" if v.step is None else str(v.step),
            "" if v.step is None else f"{j.token} or {j.runner_up}",
            "" if v.margin is None else f"{v.margin:.3g}",
            j.truth,
        )
    console.print(sheet)
    say(f"measured in {report.seconds:.0f} s")
