"""Run requests in many companies, collect their full score rows, and count the rows whose bits moved.

Shared by the tests on a CPU and on a GPU. As a script, with the repository on PYTHONPATH, it computes for others:
``record FILE`` keeps what the ``invariant`` policy gives here, ``replay FILE`` says whether another GPU gives the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stablegen
from stablegen.client import Client
from stablegen.core.config import context_of
from stablegen.core.numerics import Numerics
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, load_policy
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.invariant.kv_cache import KVCache, Lease
from stablegen.engine.invariant.scheduler import Piece, Scheduler
from stablegen.engine.loading import kernels_for, wrap_model
from stablegen.kernels.base import LOG_WIDTH, PAGE, Cache, Linear, Placed, Rows
from stablegen.kernels.reference import ReferenceKernels, summarise_rows
from stablegen.machine.plan import find_device, numerics_on

DTYPES = ("float32", "float16", "bfloat16")
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
"""Batch sizes on both sides of every tile and bucket edge."""
OTHER_ARCHITECTURES = ("random-llama", "random-qwen2", "random-gpt_neox")
TINY = Path(stablegen.__file__).parent / "models" / "tiny-gpt2"


# --- models and engines -----------------------------------------------------------------------------------------------


@cache
def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """Return a transformers model by one of the names below, or from a directory."""
    import transformers

    if (dtype, device) != ("float32", "cpu"):
        return deepcopy(load_model(name)).to(device=device, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    if name == "random-gpt2":  # its sizes are no powers of two, its weights large enough to make attention choose
        shape = {"n_layer": 2, "n_embd": 320, "n_head": 5, "vocab_size": 1031, "n_positions": 256}
        config = transformers.GPT2Config(**shape, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(config)
    elif name == "gpt2-small":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    elif name in OTHER_ARCHITECTURES:
        shape = {"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 320, "vocab_size": 1031}
        heads = {"num_attention_heads": 6, "max_position_embeddings": 256}
        if name != "random-gpt_neox":
            heads["num_key_value_heads"] = 2
        config = transformers.AutoConfig.for_model(
            name.removeprefix("random-"), **shape, **heads, initializer_range=0.1, bos_token_id=0, eos_token_id=0
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        directory = TINY if name == "tiny-gpt2" else Path(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def make_engine(name: str, policy: str, dtype: str, device: str = "cpu") -> Engine:
    """Return a new engine of a policy over a model."""
    model = load_model(name, dtype, device)
    planned = numerics_on(find_device(str(model.device), dtype), load_policy(policy), dtype)
    return wrap_model(model, planned, context_of(model.config.to_dict()))


shared_engine = cache(make_engine)


def invariant_engine(name: str, dtype: str, device: str = "cpu", **settings: Any) -> InvariantEngine:
    """Return a new engine of ``invariant``, with the engine's own settings, over weights that are loaded once."""
    shared = shared_engine(name, "invariant", dtype, device)
    assert isinstance(shared, InvariantEngine)
    return InvariantEngine(shared.model, shared.numerics, **settings)


def own_model(name: str, dtype: str, device: str = "cpu") -> GPT2:
    """Return stablegen's own forward pass over a GPT-2."""
    engine = shared_engine(name, "invariant", dtype, device)
    assert isinstance(engine, InvariantEngine)
    return engine.model


def vocabulary_of(name: str) -> int:
    return int(load_model(name).config.vocab_size)


# --- requests and what they give --------------------------------------------------------------------------------------


def make_ids(seed: int, length: int, vocabulary: int) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(vocabulary) for _ in range(length))


def make_request(ids: Sequence[int], steps: int = 3) -> Request:
    """Return a request that runs for all of its steps, there being no end token."""
    params = GenerationParams(max_new_tokens=steps)
    return Request(tuple(ids), params, ModelIdentity(source="digest", digest="test"), "")


def make_pool(name: str, count: int = 33, longest: int = 12, seed: int = 0, least: int = 1) -> list[Request]:
    """Return requests of 1 to ``longest`` tokens and ``least`` to 2 more steps, so that batches shrink as they run."""
    vocabulary = vocabulary_of(name)
    budgets = [least + 2 - i % 3 for i in range(count)]
    return [make_request(make_ids(seed + i, 1 + 5 * i % longest, vocabulary), n) for i, n in enumerate(budgets)]


@dataclass(frozen=True)
class Answer:
    """One finished request: its trace, and the scores [steps, V] that it was made from."""

    trace: Trace
    scores: torch.Tensor


def run(engine: Engine, batch: Batch, *, warm: bool = False) -> dict[int, Answer]:
    """Return the answers of a batch by slot; the traces must say what the score rows are.

    Unless ``warm``, nothing is taken from an earlier batch: what was right there would hide what is wrong here.
    """
    if isinstance(engine, InvariantEngine) and not warm:
        engine.forget()
    rows: dict[int, list[torch.Tensor]] = {}
    done = list(engine.generate(batch, lambda slot, scores: rows.setdefault(slot, []).append(scores.clone())))
    assert sorted(one.composition.slot for one in done) == [slot for slot, _ in batch.requests]
    assert all(one.request is batch.rows[one.composition.slot] for one in done)
    seen = [scores for one in done for scores in rows[one.composition.slot]]
    said = [step for one in done for step in _steps(one.trace)]
    assert len(seen) == len(said)
    for start in range(0, len(seen), 128):
        best = summarise_rows(torch.stack(seen[start : start + 128]))
        hashes = [value & 0xFFFFFFFFFFFFFFFF for value in best.hashes.tolist()]
        assert [(*pair, value) for pair, value in zip(best.tokens.tolist(), hashes, strict=True)] == said[
            start : start + 128
        ]
    return {one.composition.slot: Answer(one.trace, torch.stack(rows[one.composition.slot])) for one in done}


def _steps(trace: Trace) -> list[tuple[int, int, int]]:
    return list(zip(trace.tokens, trace.runner_ups, trace.score_hash, strict=True))


def traces(engine: Engine, batch: Batch) -> dict[int, Trace]:
    """Return the traces of a batch by slot, as the engine runs where nobody looks at its scores."""
    if isinstance(engine, InvariantEngine):
        engine.forget()
    return {one.composition.slot: one.trace for one in engine.generate(batch)}


def alone(engine: Engine, request: Request) -> Answer:
    return run(engine, Batch((request,)))[0]


@contextmanager
def watch_passes() -> Iterator[list[list[Piece]]]:
    """Gather what each pass is composed of."""
    passes: list[list[Piece]] = []
    compose = Scheduler.compose

    def watched(self: Scheduler) -> tuple[list[Piece], int]:
        pieces, times = compose(self)
        passes.append(list(pieces))
        return pieces, times

    Scheduler.compose = watched
    try:
        yield passes
    finally:
        Scheduler.compose = compose


@contextmanager
def watch_leases() -> Iterator[list[int]]:
    """Gather how many positions each request took from others."""
    shared: list[int] = []
    lease = KVCache.lease

    def watched(self: KVCache, prompt: Sequence[int], positions: int, **named: Any) -> Lease | None:
        given = lease(self, prompt, positions, **named)
        if given is not None:
            shared.append(given.shared)
        return given

    KVCache.lease = watched
    try:
        yield shared
    finally:
        KVCache.lease = lease


@contextmanager
def out_of_memory_once(model: GPT2, operation: str, call: int) -> Iterator[None]:
    """Let one call of a kernel operation, counted from 1, find no memory."""
    original = getattr(model.kernels, operation)
    calls = 0

    def failing(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError(f"a test lets call {call} of {operation} find no memory")
        return original(*args, **named)

    setattr(model.kernels, operation, failing)
    try:
        yield
    finally:
        delattr(model.kernels, operation)
    assert calls > call, "what failed was not tried again"


class Packed:
    """A KV cache that is filled by hand: any pieces of any slots in one forward pass; its pages lie in no order."""

    def __init__(self, model: GPT2, slots: int = 1, capacity: int = 256, stale: float = 0.0) -> None:
        self.model = model
        each = -(-capacity // PAGE)
        self.cache = KVCache(
            len(model.layers),
            model.heads,
            model.size,
            pages=slots * each,
            slots=slots,
            context=capacity,
            dtype=model.dtype,
            device=model.device,
            paired=model.kernels.paired and model.dtype == torch.float32,
        )
        self.cache.keys.fill_(stale)
        self.cache.values.fill_(stale)
        self.cache.log = self.cache.log.new_empty(1, 4096, LOG_WIDTH)  # every token's scores are asked for here
        self.cache.table[:slots] = torch.arange(slots * each, 0, -1).view(slots, each)
        self.lengths = [0] * slots

    def feed(self, *pieces: tuple[int, Sequence[int]]) -> list[torch.Tensor]:
        """Append tokens to slots, in the order given; return each piece's scores [length, V]."""
        tile = self.model.kernels.tile
        tokens, slots, positions, first, counts = [], [], [], [], []
        for slot, ids in pieces:
            for at in range(0, len(ids), tile):
                first.append(len(tokens) + at)
                counts.append(min(tile, len(ids) - at))
            tokens += ids
            slots += [slot] * len(ids)
            positions += range(self.lengths[slot], self.lengths[slot] + len(ids))
            self.lengths[slot] += len(ids)
        parts = (tokens, slots, positions, first, counts, list(range(len(tokens))), [0] * len(tokens))
        spans = tuple((at, 1, place) for at, place in enumerate(positions))
        tensors = (torch.tensor(part, dtype=torch.int32, device=self.model.device) for part in parts)
        scores = torch.empty(len(tokens), self.model.vocabulary, device=self.model.device)
        with torch.inference_mode():
            self.model.forward(Rows(*tensors, tile=tile, spans=spans), self.cache, scores)
        return list(scores.split([len(ids) for _, ids in pieces]))

    def feed_cut(self, ids: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
        """Append tokens to slot 0, cut into pieces; return all scores [length, V]."""
        edges = [0, *cuts, len(ids)]
        pieces = [ids[start:stop] for start, stop in pairwise(edges) if start < stop]
        return torch.cat([self.feed((0, piece))[0] for piece in pieces])


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """How many score rows were compared for one property, and in which situations how many had other bits."""

    test: str
    promise: str
    model: str
    policy: str
    dtype: str
    device: str
    rows: int = 0
    situations: int = 0
    moved: dict[str, int] = field(default_factory=dict)

    def add(self, situation: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Compare score rows [steps, V] bit for bit: also the sign of a zero counts."""
        assert expected.shape == found.shape, (situation, expected.shape, found.shape)
        mine, theirs = expected.contiguous().view(torch.int32), found.contiguous().view(torch.int32)
        self._count(situation, len(mine), 0 if torch.equal(mine, theirs) else int((mine != theirs).any(1).sum()))

    def add_hashes(self, situation: str, expected: Sequence[int], found: Sequence[int]) -> None:
        """Compare the hashes of score rows."""
        assert len(expected) == len(found), situation
        self._count(situation, len(expected), sum(a != b for a, b in zip(expected, found, strict=True)))

    def _count(self, situation: str, rows: int, moved: int) -> None:
        self.rows += rows
        self.situations += 1
        if moved:
            self.moved[situation] = self.moved.get(situation, 0) + moved

    @property
    def differing(self) -> int:
        return sum(self.moved.values())

    def assert_equal(self) -> None:
        """Fail if any bit moved, or if nothing was compared."""
        assert self.rows > 0
        assert self.moved == {}

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"differing": self.differing}


def compare_sizes(comparison: Comparison, engine: Engine, pool: list[Request], sizes: Sequence[int]) -> None:
    """Run batches of these sizes, in which every row is a request of the pool; compare each with itself alone."""
    expected = [alone(engine, request).scores for request in pool]
    for size in sizes:
        chosen = [(size + 7 * row) % len(pool) for row in range(size)]
        for slot, answer in run(engine, Batch(tuple(pool[i] for i in chosen))).items():
            comparison.add(f"batch of {size}", expected[chosen[slot]], answer.scores)


def compare_slots(comparison: Comparison, engine: Engine, needle: Request, others: list[Request]) -> None:
    """Put the needle in each slot, and all rows in several orders."""
    expected = alone(engine, needle).scores
    for slot in range(len(others) + 1):
        answers = run(engine, Batch((*others[:slot], needle, *others[slot:])))
        comparison.add(f"slot {slot} of {len(others) + 1}", expected, answers[slot].scores)
    rows = [needle, *others]
    base = run(engine, Batch(tuple(rows)))
    for seed in range(3):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        for slot, answer in run(engine, Batch(tuple(rows[i] for i in order))).items():
            comparison.add(f"permutation {seed}", base[order[slot]].scores, answer.scores)


def compare_neighbours(
    comparison: Comparison, engine: Engine, needle: Request, vocabulary: int, lengths: Sequence[int]
) -> None:
    """Change what the neighbours say, how long they are and how long they run; the needle stays in slot 1."""
    steps = needle.params.max_new_tokens
    expected = alone(engine, needle).scores
    companies = {f"neighbours of {n} tokens": [make_ids(n + i, n, vocabulary) for i in range(3)] for n in lengths}
    companies["neighbours of one token id"] = [(0,) * 9, (vocabulary - 1,) * 9, (1,) * 9]
    companies["neighbours like itself"] = [needle.prompt_ids, needle.prompt_ids[:-1], (*needle.prompt_ids, 1)]
    for name, ids in companies.items():
        for budget in (1, steps + 2):
            others = [make_request(row, budget) for row in ids]
            answers = run(engine, Batch((others[0], needle, *others[1:])))
            comparison.add(f"{name}, {budget} steps", expected, answers[1].scores)


def compare_needle(
    comparison: Comparison, engine: Engine, needle: Request, vocabulary: int, *, trials: int, rows: int, longest: int
) -> None:
    """Put the needle anywhere among ``rows`` to twice as many rows; most are short, some reach ``longest`` tokens."""
    expected = alone(engine, needle).scores
    for trial in range(trials):
        draw = random.Random(trial)
        lengths = [longest, *(int(longest ** draw.random()) for _ in range(draw.randrange(rows - 2, 2 * rows - 2)))]
        draw.shuffle(lengths)
        fillers = [make_request(make_ids(i, n, vocabulary), draw.randrange(1, 9)) for i, n in enumerate(lengths)]
        slot = draw.randrange(len(fillers) + 1)
        answers = run(engine, Batch((*fillers[:slot], needle, *fillers[slot:])))
        comparison.add(f"trial {trial}: slot {slot} of {len(fillers) + 1}", expected, answers[slot].scores)


def compare_interleaved(
    comparison: Comparison, engine: InvariantEngine, needle: Request, vocabulary: int, lengths: Sequence[int]
) -> None:
    """Compute a long neighbour's prompt in chunks while the needle decodes, in the very same passes."""
    expected = alone(engine, needle).scores
    short = make_request(make_ids(7, 9, vocabulary), 2 * len(expected))
    for length in lengths:
        long = make_request(make_ids(length, length, vocabulary), 2)
        expected_long = alone(engine, long).scores
        for rows in ((needle, long), (short, needle, long), (needle, long, short)):
            slot = rows.index(needle)
            with watch_passes() as passes:
                answers = run(engine, Batch(rows))
            together = [
                {piece.row.slot for piece in pieces if piece.start < 0 or piece.row.request is long}
                for pieces in passes
                if any(piece.row.request is long and piece.start >= 0 for piece in pieces)
            ]
            beside = sum(slot in slots for slots in together)
            assert beside >= min(len(expected) - 1, length // engine.chunk - 1), (length, engine.chunk, beside)
            where = f"{length} tokens in chunks of {engine.chunk}, slot {slot} of {len(rows)}"
            comparison.add(where, expected, answers[slot].scores)
            comparison.add(f"{where}, the long one", expected_long, answers[rows.index(long)].scores)


def compare_limits(comparison: Comparison, make: Callable[..., InvariantEngine], requests: Sequence[Request]) -> None:
    """Bound rows, pages and chunks so that requests wait for each other and take each other's slots and pages."""
    batch = Batch(tuple(requests))
    expected = run(make(), batch)
    page = make().model.kv_cache_bytes_per_page()
    longest = max(len(request.prompt_ids) + request.params.max_new_tokens for request in requests)
    needed = -(-longest // PAGE)
    for settings in (
        {"max_rows": 1},
        {"max_rows": 3, "chunk": 7},
        {"max_rows": 5, "kv_cache_size": needed * page},
        {"kv_cache_size": (needed + 2) * page, "chunk": 65},
    ):
        engine = make(**settings)
        for again in ("", ", again"):  # over what the first time has left behind
            for slot, answer in run(engine, batch, warm=bool(again)).items():
                comparison.add(f"{settings}{again}", expected[slot].scores, answer.scores)


def compare_prefixes(comparison: Comparison, make: Callable[..., InvariantEngine], vocabulary: int) -> None:
    """Share beginnings of 64 and 192 tokens in one batch and with a batch before; compare with engines that are new."""
    base = make_ids(50, 192, vocabulary)
    shapes = [(192, 20), (64, 1), (192, 1), (64, 30), (192, 0), (0, 5), (64, 0), (192, 45)]
    prompts = [(*base[:kept], *make_ids(60 + i, own, vocabulary)) for i, (kept, own) in enumerate(shapes)]
    prompts.append(prompts[0])
    requests = [make_request(ids, 2 + i % 3) for i, ids in enumerate(prompts)]
    # full pages are shared, but never that of a prompt's last token, whose scores are wanted
    known = [(len(ids) - 1) // PAGE * PAGE for ids in prompts]
    expected = [alone(make(), request).scores for request in requests]
    for chunk in (None, 64, 100):
        engine = make(chunk=chunk)
        for number, chosen in enumerate(([0, 1, 2, 3, 4], [8, 0, 1, 2, 3, 4, 5, 6, 7], [3, 0, 8])):
            with watch_leases() as shared:
                answers = run(engine, Batch(tuple(requests[i] for i in chosen)), warm=True)
            assert shared == [0 if number == 0 and i == 0 else known[i] for i in chosen]
            for slot, answer in answers.items():
                comparison.add(f"batch {number}, chunks of {chunk}", expected[chosen[slot]], answer.scores)


def compare_out_of_memory(
    comparison: Comparison, make: Callable[..., InvariantEngine], vocabulary: int, operations: Sequence[str]
) -> None:
    """Let an operation find no memory: in a prefill, in decoding, in recording a graph, when some have finished."""
    budgets = (3, 12, 40)
    prompts = [make_ids(70 + i, 1 + 5 * i % 40, vocabulary) for i in range(21)]
    batch = Batch(tuple(make_request(ids, budgets[(i > 10) + (i > 19)]) for i, ids in enumerate(prompts)))
    expected = traces(make(), batch)
    layers = len(make().model.layers)
    for operation in operations:
        each = {"attention": layers, "partial": 2 * layers}[operation]
        for passes in (0, 1, 2, 5):  # on a GPU the second and the sixth come before a recording, the third is one
            engine = make()
            rows = engine.max_rows
            with out_of_memory_once(engine.model, operation, passes * each + 2):
                found = traces(engine, batch)
            assert engine.max_rows == rows // 2
            for slot, trace in found.items():
                where = f"in {operation} of pass {passes + 1}"
                comparison.add_hashes(where, expected[slot].score_hash, trace.score_hash)


def compare_prefill_with_decode(comparison: Comparison, engine: Engine, request: Request) -> None:
    """Prefill the prompt and the first tokens of its answer; compare with decoding them."""
    decoded = alone(engine, request)
    for step in range(1, len(decoded.trace)):
        longer = make_request((*request.prompt_ids, *decoded.trace.tokens[:step]), steps=1)
        comparison.add(f"prefilled to step {step}", decoded.scores[step : step + 1], alone(engine, longer).scores)


def compare_forced(comparison: Comparison, engine: InvariantEngine, requests: Sequence[Request]) -> None:
    """Give the engine answers that it has decoded, all at once, then with a token edited; compare every step's hash."""
    decoded = traces(engine, Batch(tuple(requests)))
    answers = [(request, decoded[slot].tokens) for slot, request in enumerate(requests)]
    engine.forget()
    for slot, trace in engine.force(answers):
        comparison.add_hashes(f"answer {slot} of {len(answers)}", decoded[slot].score_hash, trace.score_hash)
    edited = []
    for slot, (request, tokens) in enumerate(answers):
        step = 7 * slot % len(tokens)
        edited.append((request, (*tokens[:step], tokens[step] ^ 1, *tokens[step + 1 :])))
    for slot, trace in engine.force(edited):
        step = 7 * slot % len(trace)
        shared = decoded[slot].score_hash[: step + 1]
        comparison.add_hashes(f"answer {slot}, edited at {step}", shared, trace.score_hash[: step + 1])
        assert trace.tokens[step] == decoded[slot].tokens[step], (slot, step)


def compare_edges(comparison: Comparison, engine: InvariantEngine, vocabulary: int) -> None:
    """Decode over every edge of a page, up to the context's end; compare with one prefill of prompt and answer."""
    model = engine.model
    starts = [*range(PAGE - 3, model.context - 6, PAGE), model.context - 6]
    requests = [make_request(make_ids(start, start, vocabulary), 6) for start in starts]
    others = [make_request(make_ids(i, 1 + i, vocabulary), 6) for i in range(20)]
    batches = {"alone": requests, "beside short ones": [*others, *requests]}
    found = {name: run(engine, Batch(tuple(rows))) for name, rows in batches.items()}
    for i, request in enumerate(requests):
        length = len(request.prompt_ids)
        first = found["alone"][i]
        ids = (*request.prompt_ids, *first.trace.tokens[:-1])
        prefilled = Packed(model, capacity=len(ids)).feed((0, ids))[0][length - 1 :]
        comparison.add(f"decoded from {length} on", prefilled, first.scores)
        comparison.add(f"decoded from {length} on, beside", prefilled, found["beside short ones"][20 + i].scores)


def compare_whole_context(comparison: Comparison, engine: InvariantEngine, vocabulary: int) -> None:
    """Decode from the first token to the context's end; compare with one prefill of it all."""
    model = engine.model
    request = make_request(make_ids(6, 1, vocabulary), model.context - 1)
    decoded = alone(engine, request)
    ids = (*request.prompt_ids, *decoded.trace.tokens[:-1])
    prefilled = Packed(model, capacity=model.context).feed((0, ids))[0]
    comparison.add("decoded from the first token on", prefilled, decoded.scores)


def compare_cuts(comparison: Comparison, model: GPT2, ids: Sequence[int], cuts: Sequence[Sequence[int]]) -> None:
    """Prefill one prompt in pieces; compare the scores behind every one of its tokens."""
    whole = Packed(model, capacity=len(ids)).feed_cut(ids, [])
    for pieces in cuts:
        comparison.add(f"cut at {pieces}"[:60], whole, Packed(model, capacity=len(ids)).feed_cut(ids, pieces))


def compare_phases(comparison: Comparison, model: GPT2, vocabulary: int, chunks: Sequence[int]) -> None:
    """Decode one row while another is prefilled in chunks beside it, before and behind it in the packed order."""
    prompt, answer = make_ids(1, 20, vocabulary), make_ids(2, 12, vocabulary)
    arriving = make_ids(3, 150, vocabulary)
    expected = Packed(model).feed((0, (*prompt, *answer)))[0][len(prompt) :]
    expected_other = Packed(model).feed((0, arriving))[0]
    for chunk in chunks:
        for first in (True, False):
            packed = Packed(model, slots=3, capacity=200)
            packed.feed((1, prompt))
            mine, others = [], []
            for step, token in enumerate(answer):
                piece = arriving[step * chunk : (step + 1) * chunk]
                pieces = [(2, piece), (1, (token,))] if first else [(1, (token,)), (2, piece)]
                results = packed.feed(*(pieces if piece else [(1, (token,))]))
                mine.append(results[1] if first and piece else results[0])
                if piece:
                    others.append(results[0 if first else 1])
            where = f"beside chunks of {chunk}, {'behind' if first else 'before'} them"
            comparison.add(where, expected, torch.cat(mine))
            comparison.add(where, expected_other[: packed.lengths[2]], torch.cat(others))


def compare_capacities(comparison: Comparison, model: GPT2, vocabulary: int) -> None:
    """Give the KV cache other lengths, other slots, and what an earlier request left behind."""
    ids = make_ids(4, 90, vocabulary)
    expected = Packed(model, capacity=len(ids)).feed_cut(ids, [80, *range(81, 90)])
    for capacity in (256, 512, 1024):
        for stale in (0.0, -1e4, float("nan")):
            packed = Packed(model, slots=2, capacity=capacity, stale=stale)
            comparison.add(f"capacity {capacity}, stale {stale}", expected, packed.feed_cut(ids, [80, *range(81, 90)]))


def padded_companies(needle: Request, others: list[Request], rows: int, width: int, *, moved: bool) -> dict[str, Batch]:
    """Return batches of one shape around the needle; with ``moved`` it also changes its slot."""
    others = others[: rows - 1]
    filler: tuple[None, ...] = (None,) * (rows - 1)
    companies = {
        "alone": (needle, *filler),
        "one other": (needle, others[0], *filler[1:]),
        "one other, last": (needle, *filler[1:], others[0]),
        "full": (needle, *others),
        "full, reversed": (needle, *reversed(others)),
        "full of itself": (needle,) * rows,
    }
    if moved:
        companies |= {f"slot {slot}": (*others[:slot], needle, *others[slot:]) for slot in range(1, rows)}
    return {name: Batch(company, width) for name, company in companies.items()}


# --- through the client -----------------------------------------------------------------------------------------------


class Clients:
    """Make clients around one model whose caches are empty but for one shared self-check."""

    def __init__(self, folder: Path, name: str, policy: str, dtype: str, device: str = "cpu") -> None:
        from tokenizers import Tokenizer

        self._folder, self._count = folder, 0
        self._model, self._policy = load_model(name, dtype, device), policy
        self._tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        with self._open(folder / "checked") as client:
            self.check = client.self_check()
            self.numerics = client.numerics

    def fresh(self) -> Client:
        """Return a client that has not answered anything."""
        self._count += 1
        cache = self._folder / str(self._count)
        shutil.copytree(self._folder / "checked", cache)
        return self._open(cache)

    def _open(self, cache: Path) -> Client:
        return Client(
            self._model,
            self._tokenizer,
            policy=self._policy,
            cache_dir=cache,
            on_risk="serve",
            kv_cache_size=2**29,  # many of them share a device with other processes
        )


def compare_companies_of_client(comparison: Comparison, clients: Clients, prompts: list[tuple[int, ...]]) -> list[Any]:
    """Ask for the same prompts alone, together, in other orders and half cached; return all records."""
    needle, others = prompts[0], prompts[1:]
    calls = {
        "alone": [[prompt] for prompt in prompts],
        "together": [prompts],
        "needle last": [[*others, needle]],
        "reversed": [prompts[::-1]],
        "half cached": [others[::2], [*others, needle]],
        "needle cached": [[needle], prompts],
    }
    expected: dict[str, Trace] = {}
    records = []
    for name, asked in calls.items():
        with clients.fresh() as client:
            for call in asked:
                for done in client.run([client.make_request(ids, {"max_new_tokens": 4}) for ids in call]):
                    if done.cached:
                        continue
                    assert done.trace is not None
                    first = expected.setdefault(done.key, done.trace)
                    comparison.add_hashes(name, first.score_hash, done.trace.score_hash)
                    records.append(done.record)
    return records


# --- in another process -----------------------------------------------------------------------------------------------


def fingerprints(name: str, device: str) -> dict[str, dict[str, Any]]:
    """Return, for each policy and dtype, the digest of the numerics and the hashes of every score row."""
    pool = make_pool(name, count=5)
    result = {}
    for policy, dtypes in (("invariant", DTYPES), ("single", DTYPES), ("padded:4", ("float32", "bfloat16"))):
        for dtype in dtypes:
            engine = make_engine(name, policy, dtype, device)
            if policy == "invariant":
                batches = [Batch(tuple(pool))]
            elif policy == "single":
                batches = [Batch((request,)) for request in pool[:3]]
            else:
                batches = [Batch((*pool[:3], None), 64)]
            answers = [answer for batch in batches for _, answer in sorted(run(engine, batch).items())]
            hashes = [value for answer in answers for value in answer.trace.score_hash]
            result[f"{policy} {dtype}"] = {"numerics": engine.numerics.digest, "hashes": hashes}
    return result


def fingerprints_elsewhere(name: str, device: str) -> dict[str, dict[str, Any]]:
    """Return ``fingerprints`` as another process computes them."""
    package = str(Path(stablegen.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, "fingerprints", name, device, str(torch.get_num_threads())],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- on another GPU ---------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).parent / "benchmarks" / "results"
SIZES_OF_MODEL: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    "tiny": {"n_layer": 1, "n_embd": 96, "n_head": 3, "vocab_size": 211, "n_positions": 256},
}
ONE_ARCHITECTURE = frozenset({"device_model", "sm_count"})
"""Fields of ``Numerics`` that must not matter among GPUs of one compute capability."""


@cache
def exact_weights(size: str) -> dict[str, torch.Tensor]:
    """Return a GPT-2's random weights that are the same wherever they are made: integers times powers of two."""
    shape = SIZES_OF_MODEL[size]
    width = shape["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (shape["vocab_size"], width),
        "wpe.weight": (shape["n_positions"], width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for i in range(shape["n_layer"]):
        for name, k, n in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"h.{i}.{name}.weight": (k, n), f"h.{i}.{name}.bias": (n,)}
        shapes |= {f"h.{i}.ln_{j}.{part}": (width,) for j in (1, 2) for part in ("weight", "bias")}
    bits = np.random.PCG64(0)  # the raw stream of a seed never changes
    weights = {}
    for name, dims in shapes.items():
        count = int(np.prod(dims))
        numbers = bits.random_raw(-(-count // 4)).astype("<u8").view("<i2")[:count].astype(np.float32)
        # queries and keys large enough to make attention choose
        scaled = torch.from_numpy(numbers).view(dims) * 2.0 ** (-18 if "c_attn.weight" in name else -20)
        weights[name] = scaled + 1.0 if ".weight" in name and "ln_" in name else scaled
    return weights


def exact_engine(size: str, dtype: str, device: str = "cpu", kernels: Any = None, **settings: Any) -> InvariantEngine:
    """Return an engine of ``invariant`` over ``exact_weights``."""
    target = torch.device(device)
    kernels = kernels or kernels_for(target)
    config = {"model_type": "gpt2", **SIZES_OF_MODEL[size]}
    model = GPT2(config, exact_weights(size), kernels, dtype=getattr(torch, dtype), device=target)
    numerics = numerics_on(find_device(device, dtype), load_policy("invariant"), dtype)
    return InvariantEngine(model, numerics, **settings)


def answers_to_keep(engine: InvariantEngine) -> list[str]:
    """Return a digest of each answer to a fixed set of requests: its tokens, and the hashes of its score rows."""
    vocabulary, context = engine.model.vocabulary, engine.model.context
    lengths = [min(length, context - 8) for length in (1, 21, 63, 64, 65, 130, 200, 300, 513, 900)]
    lengths += [1 + 7 * i % 40 for i in range(30)]
    requests = [make_request(make_ids(i, n, vocabulary), 8 - i % 3) for i, n in enumerate(lengths)]
    found = traces(engine, Batch(tuple(requests)))
    digests = []
    for slot, request in enumerate(requests):
        if slot % 10 == 1:
            assert traces(engine, Batch((request,)))[0] == found[slot], "not even invariant here"
        trace = found[slot]
        said = json.dumps([list(trace.tokens), list(trace.score_hash)])
        digests.append(hashlib.sha256(said.encode()).hexdigest()[:32])
    return digests


def record_answers(device: str, size: str = "small") -> dict[str, Any]:
    """Return what is kept for another machine: the numerics and the answers of each dtype."""
    kept: dict[str, Any] = {"model": f"GPT-2, {size}, random weights", "size": size, "dtypes": {}}
    for dtype in DTYPES:
        engine = exact_engine(size, dtype, device)
        kept["device"] = engine.numerics.device_model
        kept["compute_capability"] = engine.numerics.compute_capability
        kept["dtypes"][dtype] = {
            "numerics": engine.numerics.model_dump(mode="json", exclude_none=True),
            "answers": answers_to_keep(engine),
        }
    return kept


def slug_of(device: str) -> str:
    """Return a device's name as it stands in the names of files."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def obstacle(kept: Mapping[str, Any], dtype: str, here: Numerics) -> str | None:
    """Return why recorded answers need not be those of these numerics; None where they must be."""
    there = Numerics(**kept["dtypes"][dtype]["numerics"])
    differences = there.differences(here)
    told = [
        f"{name} {old} there, {new} here" for name, (old, new) in differences.items() if name not in ONE_ARCHITECTURE
    ]
    return f"recorded on {kept['device']} under other numerics: {', '.join(told)}" if told else None


def compare_replayed(comparison: Comparison, kept: Mapping[str, Any], dtype: str, engine: InvariantEngine) -> None:
    """Compare what another machine recorded with what this one computes."""
    there, here = kept["dtypes"][dtype]["answers"], answers_to_keep(engine)
    for i, (old, new) in enumerate(zip(there, here, strict=True)):
        comparison.add_hashes(f"request {i} of {kept['device']}", [old], [new])


def replay_answers(kept: Mapping[str, Any], device: str) -> dict[str, str]:
    """Return, for each dtype, what came of a replay: ``equal``, ``N answers differ``, or why it says nothing."""
    told = {}
    for dtype in kept["dtypes"]:
        engine = exact_engine(kept["size"], dtype, device)
        reason = obstacle(kept, dtype, engine.numerics)
        comparison = Comparison("", "replay", kept["size"], "invariant", dtype, engine.numerics.device_model)
        if reason is None:
            compare_replayed(comparison, kept, dtype, engine)
        told[dtype] = reason or (f"{comparison.differing} answers differ" if comparison.differing else "equal")
    return told


# --- kernels that break the promise -----------------------------------------------------------------------------------


class SplitByBatch(ReferenceKernels):
    """Sums in two halves where the batch has 8 rows or more, as a library does that picks split-K by M."""

    rows = 8

    def linear(self, x: torch.Tensor, layer: Linear, *, gelu: bool = False) -> torch.Tensor:
        if len(x) < self.rows or gelu:
            return super().linear(x, layer, gelu=gelu)
        return self._split(x, layer)

    def _split(self, x: torch.Tensor, layer: Linear) -> torch.Tensor:
        half = layer.k // 2
        first = Linear(layer.weight[:half], layer.bias, half, layer.n)
        second = Linear(layer.weight[half:], None, layer.k - half, layer.n)
        return super().linear(x[:, :half], first) + super().linear(x[:, half:], second)


class SplitBySlot(SplitByBatch):
    """Sums in two halves in the rows behind the first eight, as a library does at the end of its tile."""

    def linear(self, x: torch.Tensor, layer: Linear, *, gelu: bool = False) -> torch.Tensor:
        out = ReferenceKernels.linear(self, x, layer, gelu=gelu)
        if len(x) > 8 and not gelu:
            out[8:] = self._split(x[8:], layer)
        return out


class SplitByLargeBatch(SplitByBatch):
    """Sums in two halves in large batches only."""

    rows = 300


class ScaledOtherwise(ReferenceKernels):
    """Scales the queries, not their products, where ``applies`` says so: another order of rounding."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        raise NotImplementedError

    def attention(
        self,
        query: torch.Tensor,
        layer: Linear,
        cache: Cache,
        index: int,
        rows: Rows,
        placed: Placed,
        scale: float,
    ) -> torch.Tensor:
        if self.applies(query, cache, rows, placed):
            query, scale = (query.float() * 3).to(query.dtype), scale / 3
        return super().attention(query, layer, cache, index, rows, placed, scale)


class AttentionByTokens(ScaledOtherwise):
    """Differs where there are 24 tokens or more, as another attention kernel would."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return len(query) >= 24


class AttentionByPages(ScaledOtherwise):
    """Differs where the keys lie far behind in the cache."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return int(cache.table[rows.slots.long(), 0].max()) > 6


class LoneDecode(ScaledOtherwise):
    """Differs where one token is decoded behind the first block of keys."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return len(query) == 1 and int(placed.positions[0]) >= 64


class ManyRowsDecode(ScaledOtherwise):
    """Differs where more than 64 rows decode together."""

    def applies(self, query: torch.Tensor, cache: Cache, rows: Rows, placed: Placed) -> bool:
        return rows.tile == 1 and len(query) > 64


# --- as a script ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print fingerprints, record answers, or replay them; return 1 where a replay differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    computing = commands.add_parser("fingerprints", help="print what another process compares")
    computing.add_argument("name")
    computing.add_argument("device")
    computing.add_argument("threads", type=int)
    recording = commands.add_parser("record", help="write what this device answers")
    recording.add_argument("--size", choices=sorted(SIZES_OF_MODEL), default="small")
    replaying = commands.add_parser("replay", help="compare with what was recorded")
    for command in (recording, replaying):
        command.add_argument("file", type=Path, help="a file, or a folder for replay-DEVICE.json")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    if given.command == "fingerprints":
        torch.set_num_threads(given.threads)
        print(json.dumps(fingerprints(given.name, given.device)))
        return 0
    if given.command == "record":
        kept = record_answers(given.device, given.size)
        path = given.file / f"replay-{slug_of(kept['device'])}.json" if given.file.is_dir() else given.file
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(path)
        return 0
    told = replay_answers(json.loads(given.file.read_text(encoding="utf-8")), given.device)
    print(json.dumps(told, indent=1))
    return int(any(result.endswith("differ") for result in told.values()))


if __name__ == "__main__":
    sys.exit(main())
