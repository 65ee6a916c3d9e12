"""Models, engines and requests for the tests on a CPU and on a GPU, and what an engine gives for a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import stablegen
from stablegen.core.config import context_of
from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, load_policy
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Engine
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.invariant.kv_cache import KVCache, Lease
from stablegen.engine.invariant.model import Model
from stablegen.engine.invariant.scheduler import Piece, Scheduler
from stablegen.engine.loading import make_engine_around
from stablegen.kernels import log
from stablegen.kernels.base import PAGE, Rows
from stablegen.kernels.reference import summarise_rows
from stablegen.machine.plan import find_device, numerics_on

DTYPES = ("float32", "float16", "bfloat16")
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
    return make_engine_around(model, planned, context=context_of(model.config.to_dict()))


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
    assert isinstance(engine.model, GPT2)
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
    if not warm:
        engine.forget()
    # requests of a batch may be equal: each row runs as an object of its own, by which it is told apart
    own = Batch(tuple(row and replace(row, prompt=f"slot {slot}") for slot, row in enumerate(batch.rows)), batch.shape)
    slots = {id(request): slot for slot, request in own.requests}
    rows: dict[int, list[torch.Tensor]] = {}

    def observe(request: Request, scores: torch.Tensor) -> None:
        rows.setdefault(slots[id(request)], []).append(scores.clone())

    done = list(engine.generate(own, observe))
    assert sorted(one.composition.slot for one in done) == [slot for slot, _ in batch.requests]
    assert all(one.request is own.rows[one.composition.slot] for one in done)
    assert all(one.composition.shape.width == batch.shape.width for one in done)
    seen = [scores for one in done for scores in rows[one.composition.slot]]
    said = [step for one in done for step in _steps(one.trace)]
    assert len(seen) == len(said)
    for start in range(0, len(seen), 128):
        summary = summarise_rows(torch.stack(seen[start : start + 128]))
        hashes = [value & 0xFFFFFFFFFFFFFFFF for value in summary.hashes.tolist()]
        found = [(*pair, value) for pair, value in zip(summary.tokens.tolist(), hashes, strict=True)]
        assert found == said[start : start + 128]
    return {one.composition.slot: Answer(one.trace, torch.stack(rows[one.composition.slot])) for one in done}


def _steps(trace: Trace) -> list[tuple[int, int, int]]:
    return list(zip(trace.tokens, trace.runner_ups, trace.score_hash, strict=True))


def traces(engine: Engine, batch: Batch) -> dict[int, Trace]:
    """Return the traces of a batch by slot, as the engine runs where its scores are not observed."""
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "compose", watched)
        yield passes


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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "lease", watched)
        yield shared


@contextmanager
def out_of_memory_once(model: Model, operation: str, call: int) -> Iterator[None]:
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

    def __init__(self, model: Model, slots: int = 1, capacity: int = 256, stale: float = 0.0) -> None:
        self.model = model
        each = -(-capacity // PAGE)
        self.cache = KVCache(
            model.layer_count,
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
        self.cache.log = self.cache.log.new_empty(1, 4096, log.WIDTH)  # every token's scores are asked for here
        self.cache.table[:slots] = torch.arange(slots * each, 0, -1).view(slots, each)
        self.lengths = [0] * slots

    def feed(self, *pieces: tuple[int, Sequence[int]]) -> list[torch.Tensor]:
        """Append tokens to slots, in the order given; return each piece's scores [length, V]."""
        tile = self.model.kernels.tile
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        first: list[int] = []
        counts: list[int] = []
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
        device = self.model.device
        a, b, c, d, e, last, tick = (torch.tensor(part, dtype=torch.int32, device=device) for part in parts)
        rows = Rows(a, b, c, d, e, last, tick, tile=tile, spans=spans)
        scores = torch.empty(len(tokens), self.model.vocabulary, device=self.model.device)
        with torch.inference_mode():
            self.model.forward(rows, self.cache, scores)
        return list(torch.split(scores, [len(piece) for _, piece in pieces]))

    def feed_cut(self, ids: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
        """Append tokens to slot 0, cut into pieces; return all scores [length, V]."""
        edges = [0, *cuts, len(ids)]
        pieces = [ids[start:stop] for start, stop in pairwise(edges) if start < stop]
        return torch.cat([self.feed((0, piece))[0] for piece in pieces])
