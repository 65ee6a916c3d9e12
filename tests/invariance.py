"""Run requests in many companies, collect their full score rows, and count the rows whose bits moved.

Shared by the tests on a CPU and on a GPU. Run as a script it prints what another process computes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import stablegen
from stablegen.checkpoint import context_of
from stablegen.client import Client
from stablegen.engine.base import Engine
from stablegen.engine.gpt2 import GPT2, GPT2Engine
from stablegen.engine.kv_cache import KVCache
from stablegen.engine.loading import wrap_model
from stablegen.kernels.base import LOG_WIDTH, PAGE, Cache, Linear, Placed, Rows
from stablegen.kernels.reference import ReferenceKernels, best_two
from stablegen.numerics import find_device, numerics_on
from stablegen.policy import Batch, load_policy
from stablegen.record import Trace
from stablegen.request import GenerationParams, ModelIdentity, Request

DTYPES = ("float32", "float16", "bfloat16")
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
"""Batch sizes on both sides of every tile and bucket edge."""
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
    elif name == "random-llama":
        shape = {"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 320, "vocab_size": 1031}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
        config = transformers.LlamaConfig(**shape, **heads, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
        model = transformers.LlamaForCausalLM(config)
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


def own_model(name: str, dtype: str, device: str = "cpu") -> GPT2:
    """Return stablegen's own forward pass over a GPT-2."""
    engine = shared_engine(name, "invariant", dtype, device)
    assert isinstance(engine, GPT2Engine)
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


def make_pool(name: str, count: int = 33, longest: int = 12, seed: int = 0) -> list[Request]:
    """Return requests of 1 to ``longest`` tokens and 1 to 3 steps, so that batches shrink as they run."""
    vocabulary = vocabulary_of(name)
    return [make_request(make_ids(seed + i, 1 + 5 * i % longest, vocabulary), 3 - i % 3) for i in range(count)]


@dataclass(frozen=True)
class Answer:
    """One finished request: its trace, and the scores [steps, V] that it was made from."""

    trace: Trace
    scores: torch.Tensor


def run(engine: Engine, batch: Batch) -> dict[int, Answer]:
    """Return the answers of a batch by slot; the traces must say what the score rows are."""
    rows: dict[int, list[torch.Tensor]] = {}
    done = list(engine.generate(batch, lambda slot, scores: rows.setdefault(slot, []).append(scores.clone())))
    answers = {}
    for generated in done:
        slot = generated.composition.slot
        assert generated.request is batch.rows[slot]
        scores, trace = torch.stack(rows[slot]), generated.trace
        best = best_two(scores)
        assert [value & 0xFFFFFFFFFFFFFFFF for value in best.hashes.tolist()] == list(trace.score_hash)
        assert best.tokens.tolist() == [list(pair) for pair in zip(trace.tokens, trace.runner_ups, strict=True)]
        answers[slot] = Answer(trace, scores)
    assert len(answers) == len(batch.requests)
    return answers


def alone(engine: Engine, request: Request) -> Answer:
    return run(engine, Batch((request,)))[0]


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


def compare_prefill_with_decode(comparison: Comparison, engine: Engine, request: Request) -> None:
    """Prefill the prompt and the first tokens of its answer; compare with decoding them."""
    decoded = alone(engine, request)
    for step in range(1, len(decoded.trace)):
        longer = make_request((*request.prompt_ids, *decoded.trace.tokens[:step]), steps=1)
        comparison.add(f"prefilled to step {step}", decoded.scores[step : step + 1], alone(engine, longer).scores)


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
        for stale in (0.0, -1e4):
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
        return Client(self._model, self._tokenizer, policy=self._policy, cache_dir=cache, on_risk="serve")


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
        [sys.executable, __file__, name, device, str(torch.get_num_threads())],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


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


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(fingerprints(sys.argv[1], sys.argv[2])))
