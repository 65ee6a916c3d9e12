"""The batch-invariant engine: one model's own forward pass, through kernels in which no row sees the batch.

Tokens of all requests are packed into one list; each carries its slot and absolute position, so prefill, a chunk of
one, and decode are the same call. Nothing is padded, and no operation sees more of the batch than its own row, its
own slot's keys and values, and their positions. The residual stream and the scores stay in float32.

The host waits for nothing: each pass feeds its winners to the next by itself and logs them, the host reads the log some
passes later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Limits, load_policy
from stablegen.core.record import Composition
from stablegen.core.request import Request
from stablegen.engine.base import NO_ANSWERS, Answers, Engine, Generated, Listener, Observer, Stopper
from stablegen.engine.compute import check_flags, closed_engine, raise_failed, release_memory
from stablegen.engine.cuda_graph import Recorder, StreamOrder
from stablegen.engine.invariant.model import Model
from stablegen.engine.invariant.packed import PackedPasses
from stablegen.engine.invariant.run import Memory, Run, Tools, wants_scores
from stablegen.engine.invariant.scheduler import Row, Scheduler, Task
from stablegen.engine.invariant.steps import Steps
from stablegen.engine.log import trace_of
from stablegen.engine.sampling import GraphedSampler
from stablegen.engine.stopping import stopper_for
from stablegen.errors import DeviceMemoryError, EngineError, TeacherForcingError
from stablegen.kernels.base import PAGE
from stablegen.tokenizer import Tokenizer

CHUNK = {"cuda": 4096, "cpu": 2048}
"""Tokens of one pass at most, by device: longer prefills are cut, which moves no bit."""
CHOICES = {"cuda": 4096, "cpu": 128}
"""Score rows of one pass at most, by device."""
MAX_ROWS = {"cuda": 256, "cpu": 16}
"""Requests that run at once at most, by device."""
DEFAULT_KV_CACHE = {"cuda": 2 * 2**30, "cpu": 2**30}
"""Bytes of keys and values at most, by device, where no setting says otherwise."""

_log = logging.getLogger(__name__)


class InvariantEngine(Engine):
    """Runs batches of any composition through a ``Model``; one row's bits never depend on another's.

    ``max_rows``: requests that run at once at most. ``chunk``: tokens of one pass at most. ``kv_cache_size``: the
    bytes of keys and values at most. ``graphs``: whether passes are recorded. None of them moves a bit.
    """

    def __init__(
        self,
        model: Model,
        numerics: Numerics,
        *,
        max_rows: int | None = None,
        chunk: int | None = None,
        kv_cache_size: int | None = None,
        graphs: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        kind = model.device.type
        self.numerics = numerics
        self.max_rows = max_rows or MAX_ROWS[kind]
        self.chunk = chunk or CHUNK[kind]
        self.choices = max(CHOICES[kind], self.max_rows)
        self.kv_cache_size = kv_cache_size or DEFAULT_KV_CACHE[kind]
        self.graphs = graphs
        self.tokenizer = tokenizer or Tokenizer.absent()
        self.limits = Limits(
            context=model.context,
            # kernels measured under a policy that promises nothing, the vendor's, promise this neither
            prefill_equals_decode=load_policy(numerics.policy).promises,
            rows=self.max_rows,
        )
        self.sampler = GraphedSampler(model.device, graphs=graphs)
        self._model: Model | None = model
        self._lock = threading.RLock()
        self._running = False
        self._memory: Memory | None = None
        self._order = StreamOrder(model.device)

    @property
    def model(self) -> Model:
        """Return the model; raise ``EngineError`` where the engine was closed."""
        if self._model is None:
            raise closed_engine()
        return self._model

    def memory(self) -> dict[str, int]:
        """Return the bytes of the weights and of the KV cache."""
        return {"weights": self.model.weight_bytes(), "kv_cache": self._reserve().cache.bytes}

    def forget(self) -> None:
        """Let later requests share nothing that earlier ones computed, which moves no bit."""
        with self._lock:
            if self._memory is not None:
                self._memory.cache.forget()

    def generate(
        self,
        batch: Batch,
        observe: Observer | None = None,
        listen: Listener | None = None,
        *,
        begun: Answers = NO_ANSWERS,
    ) -> Generator[Generated, None, None]:
        """Yield each request of the batch as it finishes.

        Where the device's memory does not suffice, fewer rows and shorter chunks run at once; no answer changes by it.
        At the steps of what is ``begun`` only keys and values are computed. Raises ``NumericsChangedError`` where
        torch's precision flags are no longer those of ``numerics``, ``DeviceMemoryError`` where not even one row fits,
        ``TeacherForcingError`` where answers are begun and the kernels do not promise that prefill equals decode.
        """
        if begun and not self.limits.prefill_equals_decode:
            raise TeacherForcingError(
                f"policy {self.numerics.policy!r} cannot resume answers from their first tokens: it promises nothing",
                accepted="engines whose limits say prefill_equals_decode",
                hint="Generate these answers from their beginning",
            )
        tasks = [
            Task(slot, request, request.continuation, () if request.continuation else tuple(begun.get(request, ())))
            for slot, request in batch.requests
        ]
        return self._generate(batch, tasks, observe, listen)

    def follow(
        self, batch: Batch, answers: Answers, observe: Observer | None = None
    ) -> Generator[Generated, None, None]:
        """Teacher-force: yield the requests of a batch, each with what would be chosen at each step of its answer.

        An answer's tokens are computed with its prompt, all at once, and that gives the very scores that decoding them
        one by one would. So an answer whose tokens are chosen again is what a fresh run gives; of any other, the steps
        up to the first that differs are a fresh run's, and that one's token is how it goes on. Raises as ``generate``.
        """
        tasks = [Task(slot, request, tuple(answers.get(request, ()))) for slot, request in batch.requests]
        return self._generate(batch, tasks, observe, None)

    def close(self) -> None:
        """Release the weights, the KV cache and the graphs; a closed engine raises ``EngineError``.

        What a batch still holds that is under way is released with the batch.
        """
        model, self._model = self._model, None
        if model is None:
            return
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # graphs that are released must not be running
        self._memory = None
        self.sampler.close()
        device = model.device
        del model
        release_memory(device)

    def _generate(
        self, batch: Batch, tasks: Sequence[Task], observe: Observer | None, listen: Listener | None
    ) -> Generator[Generated, None, None]:
        started = time.perf_counter()
        with closing(self._run(tasks, observe, listen)) as finished:
            for row in finished:
                assert row.finish_reason is not None
                logprobs = tuple(torch.cat(row.logprobs).tolist()) if row.logprobs else ()
                assert len(logprobs) == len(row.request.continuation)
                composition = Composition(len(batch.rows), len(tasks), row.slot, batch.shape)
                seconds = time.perf_counter() - started
                trace = trace_of(np.concatenate(row.logged))
                yield Generated(row.request, trace, row.finish_reason, composition, seconds, logprobs)

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
        shown = observe is not None or any(map(wants_scores, tasks.values()))
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
            # a pass that shows its scores logs where the others do
            choices = cache.slots if shown else self.choices
            scheduler = Scheduler(tasks.values(), cache, chunk=self.chunk, choices=choices)
            run = Run(self._tools(), scheduler, memory, observe, listen)
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
                del run, scheduler, cache, memory
                self._shrink(lacking)
        raise_failed(failed)

    def _tools(self) -> Tools:
        return Tools(self.model, self.sampler, self.numerics.threads, self._order, self._stopper)

    def _stopper(self, request: Request) -> Stopper | None:
        return stopper_for(request, self.tokenizer)

    def _reserve(self) -> Memory:
        """Return the KV cache and the passes over it; halve the rows until they fit."""
        self._order.wait_for_last()
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
                    recorder = Recorder(model.device, enabled=self.graphs)
                    steps = Steps(model, cache, recorder, rows=rows)
                    packed = PackedPasses(model, cache, recorder, choices=self.choices)
                    self._memory = Memory(cache, steps, packed)
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
        self.limits = replace(self.limits, rows=self.max_rows)
        _log.warning("out of memory: going on with %d rows at once, %d tokens a pass", self.max_rows, self.chunk)
        self._memory = None
        torch.cuda.empty_cache()
