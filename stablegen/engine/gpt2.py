"""GPT-2 over the checkpoint's own weights, through batch-invariant kernels: the ``invariant`` policy.

Tokens of all requests are packed into one list; each carries its slot and absolute position, so prefill, a chunk of
one, and decode are the same call. Nothing is padded, and no operation sees more of the batch than its own row, its
own slot's keys and values, and their positions. The residual stream and the scores stay in float32.

The device decides nothing and the host waits for nothing: each pass feeds its winners to the next by itself and logs
them, the host reads the log some passes later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from stablegen.checkpoint import check_invariant
from stablegen.engine.base import Answer, Generated, Listener, Observer, Stopper
from stablegen.engine.choosing import Chooser, Selector, upload
from stablegen.engine.cuda_graph import Recorder
from stablegen.engine.decode import check_flags, computing, cpu_threads, raise_failed
from stablegen.engine.kv_cache import TICKS, KVCache
from stablegen.engine.packed import PackedPasses
from stablegen.engine.scheduler import Piece, Row, Scheduler, Task
from stablegen.engine.steps import Steps
from stablegen.engine.stopping import stopper_for
from stablegen.engine.weights import check_finite
from stablegen.errors import CheckpointError, DeviceMemoryError, EngineError
from stablegen.kernels.base import LOG_WIDTH, PAGE, KernelSet, Linear, Norm, Rows
from stablegen.kernels.reference import log_probs, words_of
from stablegen.numerics import Numerics
from stablegen.policy import Batch, Limits
from stablegen.record import Composition, Trace
from stablegen.request import Request
from stablegen.tokenizer import Tokenizer

CHUNK = {"cuda": 4096, "cpu": 2048}
"""Tokens of one pass at most, by device: longer prefills are cut, which moves no bit."""
CHOICES = {"cuda": 4096, "cpu": 128}
"""Scores of one pass at most, by device, rows of the vocabulary's size."""
MAX_ROWS = {"cuda": 256, "cpu": 16}
"""Requests that run at once at most, by device."""
READ_EVERY = 8
"""Passes between two looks at the log."""
UNREAD = 3
"""Looks that may be under way before the host waits for the first of them."""
DEFAULT_KV_CACHE = {"cuda": 2 * 2**30, "cpu": 2**30}
"""Bytes of keys and values at most, by device, where no setting says otherwise."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    norm_1: Norm
    qkv: Linear
    projection: Linear
    norm_2: Norm
    up: Linear
    down: Linear
    scale: float


class GPT2:
    """The forward pass; T packed tokens, E wide, H heads of D, V tokens in the vocabulary."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        kernels: KernelSet,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_invariant(config)
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.heads = int(config["n_head"])
        self.size, rest = divmod(int(config["n_embd"]), self.heads)
        if rest:
            raise CheckpointError(f"config.json asks for {self.heads} heads in a width of {config['n_embd']}")
        self.context = int(config["n_positions"])
        eps = float(config.get("layer_norm_epsilon", 1e-5))
        prefix = "transformer." if "transformer.wte.weight" in tensors else ""

        width, vocabulary = int(config["n_embd"]), int(config["vocab_size"])
        self.vocabulary = vocabulary
        inner = int(config.get("n_inner") or 4 * width)

        def tensor(name: str, *shape: int) -> torch.Tensor:
            found = tensors.get(name)
            if found is None:
                raise CheckpointError(f"the checkpoint has no tensor {name}", accepted="the weights of a GPT-2")
            if tuple(found.shape) != shape:
                raise CheckpointError(
                    f"the checkpoint's {name} has shape {tuple(found.shape)}, its config.json asks for {shape}",
                    hint="Weights and config.json are not of one GPT-2; save or download the model again",
                )
            found = found.to(device=device, dtype=dtype).contiguous()
            check_finite([(name, found)])
            return found

        def norm(name: str) -> Norm:
            return Norm(tensor(f"{prefix}{name}.weight", width), tensor(f"{prefix}{name}.bias", width), eps)

        def linear(name: str, k: int, n: int) -> Linear:
            return kernels.prepare(tensor(f"{prefix}{name}.weight", k, n), tensor(f"{prefix}{name}.bias", n))

        scaled = config.get("scale_attn_weights", True)
        by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
        self.layers = [
            _Layer(
                norm(f"h.{i}.ln_1"),
                linear(f"h.{i}.attn.c_attn", width, 3 * width),
                linear(f"h.{i}.attn.c_proj", width, width),
                norm(f"h.{i}.ln_2"),
                linear(f"h.{i}.mlp.c_fc", width, inner),
                linear(f"h.{i}.mlp.c_proj", inner, width),
                (self.size**-0.5 if scaled else 1.0) / (i + 1 if by_layer else 1),
            )
            for i in range(int(config["n_layer"]))
        ]
        self.final_norm = norm("ln_f")
        embedding = tensor(f"{prefix}wte.weight", vocabulary, width)
        self.token_embedding = kernels.prepare(embedding.t(), None)
        self.position_embedding = tensor(f"{prefix}wpe.weight", self.context, width)
        untied = not config.get("tie_word_embeddings", True) and "lm_head.weight" in tensors
        self.head = self.token_embedding
        if untied:
            self.head = kernels.prepare(tensor("lm_head.weight", vocabulary, width).t(), None)

    def kv_cache_bytes_per_page(self) -> int:
        """Return the bytes that one page of keys and values takes over all layers."""
        return 2 * len(self.layers) * self.heads * PAGE * self.size * self.dtype.itemsize

    def new_cache(self, slots: int, pages: int) -> KVCache:
        """Return an empty KV cache of so many pages, for so many requests at once."""
        return KVCache(
            len(self.layers),
            self.heads,
            self.size,
            pages=pages,
            slots=slots,
            context=self.context,
            dtype=self.dtype,
            device=self.device,
            paired=self.kernels.paired and self.dtype == torch.float32,
        )

    def forward(self, rows: Rows, cache: KVCache, scores: torch.Tensor | None = None) -> None:
        """Run packed tokens; choose, log and remember the tokens that follow those of ``rows.last``.

        ``scores`` [R, V] float32 receives the full score rows where it is given.
        """
        kernels, layers = self.kernels, self.layers
        x, normed, placed = kernels.embed(rows, cache, self.token_embedding, self.position_embedding, layers[0].norm_1)
        for index, layer in enumerate(layers):
            final = index + 1 == len(layers)
            query = kernels.qkv(normed, layer.qkv, cache, index, rows, placed)
            if final and not len(rows.last):
                return  # a chunk in the middle of prompts: nothing is wanted of it but its keys and values
            attended = kernels.attention(query, layer.qkv, cache, index, rows, placed, layer.scale)
            x, normed = kernels.add_norm(x, kernels.partial(attended, layer.projection), layer.projection, layer.norm_2)
            hidden = kernels.gelu(normed, layer.up)
            after = self.final_norm if final else layers[index + 1].norm_1
            select = rows.last if final else None
            x, normed = kernels.add_norm(x, kernels.partial(hidden, layer.down, layer.up), layer.down, after, select)
        kernels.choose(normed, self.head, rows, placed, cache, scores)


class GPT2Engine:
    """Runs batches of any composition through ``GPT2``; one row's bits never depend on another's.

    ``max_rows``: requests that run at once at most. ``chunk``: tokens of one pass at most. ``kv_cache_size``: the
    bound on keys and values. ``graphs``: whether passes are recorded. None of them moves a bit.
    """

    def __init__(
        self,
        model: GPT2,
        numerics: Numerics,
        *,
        max_rows: int | None = None,
        chunk: int | None = None,
        kv_cache_size: int | None = None,
        graphs: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        kind = model.device.type
        self.model = model
        self.numerics = numerics
        self.max_rows = max_rows or MAX_ROWS[kind]
        self.limits = Limits(context=model.context)
        self.chunk = chunk or CHUNK[kind]
        self.choices = max(CHOICES[kind], self.max_rows)
        self.kv_cache_size = kv_cache_size or DEFAULT_KV_CACHE[kind]
        self.graphs = graphs
        self.tokenizer = tokenizer or Tokenizer.absent()
        self.selector = Selector(model.device, graphs=graphs)
        self._lock = threading.RLock()
        self._running = False
        self._memory: _Memory | None = None
        self._stream: torch.cuda.Stream | None = None

    def order_after_last(self) -> None:
        """Let the current stream wait for what this engine has under way on the one it was on before."""
        if self.model.device.type != "cuda":
            return
        current, last = torch.cuda.current_stream(self.model.device), self._stream
        if last is not None and last != current:
            current.wait_stream(last)
        self._stream = current

    def memory(self) -> dict[str, int]:
        """Return the bytes of the weights and of the KV cache."""
        held = {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for part in (self.model.layers, [self.model])
            for owner in part
            for tensor in _tensors(owner)
        }
        cache = self._reserve().cache
        return {"weights": sum(held.values()), "kv_cache": cache.bytes}

    def forget(self) -> None:
        """Let later requests share nothing that earlier ones computed, which moves no bit."""
        with self._lock:
            if self._memory is not None:
                self._memory.cache.forget()

    def generate(
        self, batch: Batch, observe: Observer | None = None, listen: Listener | None = None
    ) -> Generator[Generated, None, None]:
        """Yield each request of the batch as it finishes.

        Where the device's memory does not suffice, fewer rows and shorter chunks run at once; no answer changes by it.
        Raises ``NumericsChangedError`` where torch's precision flags are no longer those of ``numerics``,
        ``DeviceMemoryError`` where not even one row fits.
        """
        tasks = [Task(slot, request, request.continuation) for slot, request in batch.requests]
        return self._generate(tasks, len(batch.rows), observe, listen)

    def resume(self, begun: Sequence[Answer]) -> Generator[Generated, None, None]:
        """Yield what follows the beginnings of answers, at whose steps nothing is computed but keys and values."""
        tasks = [Task(place, request, begun=tokens) for place, (request, tokens) in enumerate(begun)]
        return self._generate(tasks, len(tasks))

    def force(
        self, answers: Sequence[Answer], observe: Observer | None = None
    ) -> Generator[tuple[int, Trace], None, None]:
        """Yield what decoding would choose at each step of each answer, with its place, if it were right up to there.

        An answer's tokens are computed with its prompt, all at once, and that gives the very scores that decoding them
        one by one would. So an answer whose tokens are chosen again is what a fresh run gives; of any other, the steps
        up to the first that differs are a fresh run's, and that one's token is how it goes on. Raises as ``generate``.
        """
        tasks = [Task(place, *answer) for place, answer in enumerate(answers)]
        with closing(self._run(tasks, observe)) as rows:
            for row in rows:
                yield row.slot, _trace(row)

    def stopper(self, request: Request) -> Stopper | None:
        """Return what ends a request's answer besides its end tokens and its length; None where nothing does."""
        return stopper_for(request, self.tokenizer)

    def _generate(
        self, tasks: Sequence[Task], rows: int, observe: Observer | None = None, listen: Listener | None = None
    ) -> Generator[Generated, None, None]:
        started = time.perf_counter()
        with closing(self._run(tasks, observe, listen)) as finished:
            for row in finished:
                assert row.finish_reason is not None
                logprobs = tuple(torch.cat(row.logprobs).tolist()) if row.logprobs else ()
                assert len(logprobs) == len(row.request.continuation)
                where = Composition(rows, len(tasks), row.slot)
                seconds = time.perf_counter() - started
                yield Generated(row.request, _trace(row), row.finish_reason, where, seconds, logprobs)

    def _run(
        self, tasks: Iterable[Task], observe: Observer | None = None, listen: Listener | None = None
    ) -> Generator[Row, None, None]:
        """Yield the rows of tasks as they finish, one call at a time."""
        check_flags(self.numerics)
        with self._lock:
            if self._running:
                raise EngineError(
                    "this engine is in the middle of another batch", hint="Finish or close the first iterator"
                )
            self._running = True
            try:
                yield from self._finish({task.slot: task for task in tasks}, observe, listen)
            finally:
                self._running = False

    def _finish(self, tasks: dict[int, Task], observe: Observer | None, listen: Listener | None) -> Iterator[Row]:
        failed: list[tuple[Request, int]] = []
        asked = len(tasks)
        shown = observe is not None or any(map(_wants_scores, tasks.values()))
        while tasks:
            lacking: torch.OutOfMemoryError | None = None
            memory = self._reserve()
            cache = memory.cache
            for task in tasks.values():
                if not cache.fits(task.positions):
                    raise DeviceMemoryError(
                        f"{task.positions} positions do not fit into a KV cache of {cache.bytes / 2**20:.0f} MiB",
                        hint="Raise kv_cache_size, ask for fewer new tokens, or use a 16-bit dtype",
                    )
            run = _Run(
                self,
                # a pass that shows its scores logs where the others do
                Scheduler(tasks.values(), cache, chunk=self.chunk, choices=cache.slots if shown else self.choices),
                memory,
                observe,
                listen,
            )
            try:
                for row in run:
                    del tasks[row.slot]
                    if row.failed:
                        failed.append((row.request, len(row.task.begun) + row.steps - 1))
                    else:
                        yield row
            except torch.OutOfMemoryError as error:
                if observe is not None:
                    raise DeviceMemoryError(
                        f"a batch of {asked} rows did not fit into the device's memory",
                        hint="Use fewer rows or shorter prompts",
                    ) from error
                lacking = error.with_traceback(None)  # its frames hold memory
            finally:
                run.close()
            if lacking is not None:
                del run, cache, memory
                self._shrink(lacking)
        raise_failed(failed)

    def _reserve(self) -> _Memory:
        """Return the KV cache and the passes over it; halve the rows until they fit."""
        self.order_after_last()
        while self._memory is None:
            model = self.model
            per_slot = -(-model.context // PAGE)
            pages = min(self.kv_cache_size // model.kv_cache_bytes_per_page(), self.max_rows * per_slot)
            if pages < 1:
                raise DeviceMemoryError(
                    f"kv_cache_size={self.kv_cache_size} bytes hold not one page of {PAGE} positions",
                    accepted=f"at least {model.kv_cache_bytes_per_page()}",
                )
            try:
                # made in a caller's inference mode, it could not be written to in any other
                with torch.inference_mode(False):
                    cache, rows = model.new_cache(self.max_rows, pages), self.max_rows
                    recorder = Recorder(model.device, wanted=self.graphs)
                    steps = Steps(model, cache, recorder, rows=rows)
                    packed = PackedPasses(model, cache, recorder, choices=self.choices)
                    self._memory = _Memory(cache, steps, packed)
            except torch.OutOfMemoryError as error:
                self._shrink(error)
        return self._memory

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        """Halve what runs at once; which rows run together moves no bit, so no answer changes."""
        if self.max_rows == 1 and self.chunk <= PAGE:
            raise DeviceMemoryError(
                "not even one row fits into the device's memory",
                hint="Free memory on the device, lower kv_cache_size, or use a 16-bit dtype or a smaller model",
            ) from error
        self.max_rows = max(1, self.max_rows // 2)
        self.chunk = max(PAGE, self.chunk // 2)
        self.kv_cache_size = max(self.kv_cache_size // 2, self.model.kv_cache_bytes_per_page())
        _log.warning("out of memory: going on with %d rows at once, %d tokens a pass", self.max_rows, self.chunk)
        self._memory = None
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class _Memory:
    """What an engine allocates once: the KV cache, and the passes that work on it."""

    cache: KVCache
    steps: Steps
    packed: PackedPasses


@dataclass(frozen=True, slots=True)
class _Look:
    """A part of the log on its way to the host: ``words`` [passes, choices, LOG_WIDTH], and what chose in each pass."""

    words: torch.Tensor
    chosen: list[list[Piece]]
    done: torch.cuda.Event | None

    def arrived(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> np.ndarray:
        if self.done is not None:
            self.done.synchronize()
        return self.words.numpy()


class _Run:
    """One batch on its way through the engine."""

    def __init__(
        self,
        engine: GPT2Engine,
        scheduler: Scheduler,
        memory: _Memory,
        observe: Observer | None,
        listen: Listener | None,
    ) -> None:
        self._engine = engine
        self._model = engine.model
        self._scheduler = scheduler
        self._cache = memory.cache
        self._steps = memory.steps
        self._packed = memory.packed
        self._observe = observe
        self._listen = listen
        self._choosers: dict[int, Chooser] = {}
        self._stoppers: dict[int, Stopper | None] = {}
        self._tick = 0
        self._unread: list[list[Piece]] = []  # of each pass whose log was not sent for, what chose
        self._looks: deque[_Look] = deque()
        self._steps.forget()

    def __iter__(self) -> Iterator[Row]:
        """Yield rows as they are read to their end."""
        scheduler = self._scheduler
        while scheduler.busy or self._unread or self._looks:
            self._engine.order_after_last()
            with computing(self._model.device), cpu_threads(self._engine.numerics.threads):
                if scheduler.busy:
                    scheduler.admit()
                    self._advance()
                if len(self._unread) >= (1 if self._observe else READ_EVERY) or not scheduler.busy:
                    self._look()
            while self._looks and (len(self._looks) > UNREAD or not scheduler.busy or self._looks[0].arrived()):
                yield from self._settle(self._looks.popleft())

    def close(self) -> None:
        """Give back what rows hold that have not finished."""
        self._scheduler.close()

    def _advance(self) -> None:
        """Run the next pass, as often as it may repeat before the log is looked at."""
        self._cache.upload()
        pieces, times = self._scheduler.compose()
        chosen = [piece for piece in pieces if piece.choices]
        shown = self._observe is not None or any(_wants_scores(piece.row.task) for piece in chosen)
        vocabulary = self._model.vocabulary if shown else None
        if _width(chosen) > self._cache.slots:
            assert not shown, "a pass that shows its scores logs where the others do"
            self._wide(pieces, chosen)
            self._scheduler.count(pieces, 1)
            return
        if any(piece.start >= 0 for piece in pieces):
            times = 1
            scores = self._packed.run(pieces, self._tick, vocabulary)
            self._steps.forget()
        else:
            times = 1 if shown else min(times, READ_EVERY - len(self._unread))
            slots = tuple(piece.row.lease.slot for piece in chosen)
            for i in range(times):
                scores = self._steps.run(slots, self._tick + i, vocabulary)
        if shown and scores is not None:
            self._look_at(scores, chosen)
        self._scheduler.count(pieces, times)
        if chosen:
            self._unread += [chosen] * times
            self._tick += times

    def _look_at(self, scores: torch.Tensor, chosen: list[Piece]) -> None:
        """Do what the pass's score rows [R, V] are wanted for: be observed, score continuations, choose tokens."""
        choosers: list[Chooser] = []
        steps: list[int] = []
        places: list[int] = []
        fed: list[int] = []  # of the places, those whose token is the slot's newest
        slots: list[int] = []
        first = 0
        for piece in chosen:
            row, request, own = piece.row, piece.row.request, scores[first : first + piece.choices]
            if self._observe is not None:
                for row_scores in own:
                    self._observe(row.slot, row_scores)
            if request.continuation:
                tokens = request.continuation[row.scheduled : row.scheduled + piece.choices]
                row.logprobs.append(log_probs(own, upload(tokens, scores.device)))
            elif request.params.processed:
                if row.slot not in self._choosers:
                    self._choosers[row.slot] = Chooser(request, scores.device, row.task.answer, row.task.begun)
                begun = len(row.task.begun) + row.scheduled
                if not row.task.answer:
                    fed.append(len(places))
                    slots.append(row.lease.slot)
                choosers += [self._choosers[row.slot]] * piece.choices
                steps += range(begun, begun + piece.choices)
                places += range(first, first + piece.choices)
            first += piece.choices
        if choosers:
            at = upload(places, scores.device)
            log = self._cache.log[self._tick % TICKS]
            hashes = log[at, 4:6].contiguous().view(torch.int64)[:, 0]
            best = self._engine.selector.choose(choosers, scores[at], steps, hashes)
            log.index_copy_(0, at, words_of(best))
            if fed:
                newest = best.tokens[upload(fed, scores.device), 0]
                self._cache.newest.index_copy_(0, upload(slots, scores.device), newest.int())

    def _wide(self, pieces: Sequence[Piece], chosen: list[Piece]) -> None:
        """Run a pass that chooses more tokens than the log has rows, and so logs elsewhere."""
        self._look()  # what was chosen before is read before
        self._packed.run(pieces, 0)
        self._steps.forget()
        self._send(self._packed.log[:, : _width(chosen)], [chosen])

    def _look(self) -> None:
        """Send for what the passes since the last look have logged."""
        count = len(self._unread)
        if not count:
            return
        width = max(map(_width, self._unread))
        first = (self._tick - count) % TICKS
        log = self._cache.log[:, :width]
        part = (
            log[first : first + count]
            if first + count <= TICKS
            else torch.cat([log[first:], log[: first + count - TICKS]])
        )
        self._send(part, self._unread)
        self._unread = []

    def _send(self, part: torch.Tensor, chosen: list[list[Piece]]) -> None:
        """Bring a part of a log to the host, when the device gets there."""
        done = None
        if part.is_cuda:
            words = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            words.copy_(part, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        else:
            words = part.clone()
        self._looks.append(_Look(words, chosen, done))

    def _settle(self, look: _Look) -> Iterator[Row]:
        """Give the rows what was logged of them; yield those that end by it."""
        words = look.wait()
        first = 0
        for _, repeated in groupby(look.chosen, key=id):
            chosen, *again = repeated
            logged = words[first : first + 1 + len(again), : _width(chosen)]  # other passes may be wider
            first += len(logged)
            ends = {token for piece in chosen for token in piece.row.ends}
            notable = ((logged[..., 6] == 0) | np.isin(logged[..., 0], list(ends))).any()
            place = 0
            for piece in chosen:
                row, own = (
                    piece.row,
                    logged[:, place : place + piece.choices],
                )  # a pass that repeats has one choice a row
                place += piece.choices
                if row.finished:
                    continue
                if row.slot not in self._stoppers:
                    stops = None if row.task.answer else self._engine.stopper(row.request)
                    self._stoppers[row.slot] = stops
                ended = row.read(own.reshape(-1, LOG_WIDTH), notable, self._stoppers[row.slot])
                if self._listen is not None and not row.failed:
                    heard = row.logged[-1][:, 0].tolist()
                    self._listen(row.slot, row.steps - len(heard), heard)
                if ended:
                    self._scheduler.drop(row)
                    yield row


def _wants_scores(task: Task) -> bool:
    """Return whether score rows are wanted of a task, to choose from or to score its continuation by."""
    return task.request.params.processed or bool(task.request.continuation)


def _width(chosen: Sequence[Piece]) -> int:
    """Return the entries of the log that a pass writes."""
    return sum(piece.choices for piece in chosen)


def _tensors(owner: object) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object of the model holds."""
    names = getattr(owner, "__slots__", None) or vars(owner)
    for value in (getattr(owner, name) for name in names):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Linear | Norm):
            yield from _tensors(value)


def _trace(row: Row) -> Trace:
    """Return what was logged of a row as its trace, whose columns are the log's."""
    words = np.concatenate(row.logged)
    return Trace(b"".join(words[:, column].tobytes() for column in (0, 1, 2, 3, slice(4, 6))))
