"""Run requests in many companies, collect their full score rows, and count the rows whose bits moved."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from engines import (
    Packed,
    alone,
    make_ids,
    make_request,
    out_of_memory_once,
    run,
    traces,
    watch_leases,
    watch_passes,
)

from stablegen.core.policy import Batch, Shape
from stablegen.core.request import Request
from stablegen.engine.base import Engine
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.invariant.model import Model
from stablegen.kernels.base import PAGE

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
"""Batch sizes on both sides of every tile and bucket edge."""


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

    def add_hashes(self, situation: str, expected: Sequence[object], found: Sequence[object]) -> None:
        """Compare the hashes of score rows, or of answers."""
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
                {piece.row.slot for piece in pieces if piece.start < 0 or piece.row.request == long}
                for pieces in passes
                if any(piece.row.request == long and piece.start >= 0 for piece in pieces)
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
    layers = make().model.layer_count
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


def compare_teacher_forced(comparison: Comparison, engine: InvariantEngine, requests: Sequence[Request]) -> None:
    """Teacher-force answers that the engine has decoded, then with a token edited; compare every step's hash."""
    batch = Batch(tuple(requests))
    decoded = traces(engine, batch)
    answers = {request: decoded[slot].tokens for slot, request in enumerate(requests)}
    assert len(answers) == len(requests)
    engine.forget()
    for done in engine.follow(batch, answers):
        slot = done.composition.slot
        comparison.add_hashes(f"answer {slot} of {len(answers)}", decoded[slot].score_hash, done.trace.score_hash)
    edited = {}
    for slot, (request, tokens) in enumerate(answers.items()):
        step = 7 * slot % len(tokens)
        edited[request] = (*tokens[:step], tokens[step] ^ 1, *tokens[step + 1 :])
    for done in engine.follow(batch, edited):
        slot = done.composition.slot
        step = 7 * slot % len(done.trace)
        shared = decoded[slot].score_hash[: step + 1]
        comparison.add_hashes(f"answer {slot}, edited at {step}", shared, done.trace.score_hash[: step + 1])
        assert done.trace.tokens[step] == decoded[slot].tokens[step], (slot, step)


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


def compare_cuts(comparison: Comparison, model: Model, ids: Sequence[int], cuts: Sequence[Sequence[int]]) -> None:
    """Prefill one prompt in pieces; compare the scores behind every one of its tokens."""
    whole = Packed(model, capacity=len(ids)).feed_cut(ids, [])
    for pieces in cuts:
        comparison.add(f"cut at {pieces}"[:60], whole, Packed(model, capacity=len(ids)).feed_cut(ids, pieces))


def compare_phases(comparison: Comparison, model: Model, vocabulary: int, chunks: Sequence[int]) -> None:
    """Decode one row while another is prefilled in chunks beside it, before and behind it in the packed order."""
    prompt, answer = make_ids(1, 20, vocabulary), make_ids(2, 12, vocabulary)
    arriving = make_ids(3, 150, vocabulary)
    expected = Packed(model).feed((0, (*prompt, *answer)))[0][len(prompt) :]
    expected_other = Packed(model).feed((0, arriving))[0]
    for chunk in chunks:
        for first in (True, False):
            packed = Packed(model, slots=3, capacity=200)
            packed.feed((1, prompt))
            mine: list[torch.Tensor] = []
            others: list[torch.Tensor] = []
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


def compare_capacities(comparison: Comparison, model: Model, vocabulary: int) -> None:
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
    return {name: Batch(company, Shape(width)) for name, company in companies.items()}
