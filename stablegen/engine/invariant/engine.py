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
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Limits
from stablegen.core.record import Composition
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Answer, Generated, Listener, Observer, Stopper
from stablegen.engine.cuda_graph import Recorder
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.kv_cache import KVCache
from stablegen.engine.invariant.packed import PackedPasses
from stablegen.engine.invariant.run import Run, trace_of, wants_scores
from stablegen.engine.invariant.scheduler import Row, Scheduler, Task
from stablegen.engine.invariant.steps import Steps
from stablegen.engine.sampling import Selector
from stablegen.engine.stopping import stopper_for
from stablegen.engine.transformers.decode import check_flags, raise_failed
from stablegen.errors import DeviceMemoryError, EngineError
from stablegen.kernels.base import PAGE, Linear, Norm
from stablegen.tokenizer import Tokenizer

CHUNK = {"cuda": 4096, "cpu": 2048}
"""Tokens of one pass at most, by device: longer prefills are cut, which moves no bit."""
CHOICES = {"cuda": 4096, "cpu": 128}
"""Scores of one pass at most, by device, rows of the vocabulary's size."""
MAX_ROWS = {"cuda": 256, "cpu": 16}
"""Requests that run at once at most, by device."""
DEFAULT_KV_CACHE = {"cuda": 2 * 2**30, "cpu": 2**30}
"""Bytes of keys and values at most, by device, where no setting says otherwise."""

_log = logging.getLogger(__name__)


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
        self._memory: Memory | None = None
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
                yield row.slot, trace_of(row)

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
                yield Generated(row.request, trace_of(row), row.finish_reason, where, seconds, logprobs)

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
            run = Run(
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

    def _reserve(self) -> Memory:
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
        _log.warning("out of memory: going on with %d rows at once, %d tokens a pass", self.max_rows, self.chunk)
        self._memory = None
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine allocates once: the KV cache, and the passes that work on it."""

    cache: KVCache
    steps: Steps
    packed: PackedPasses


def _tensors(owner: object) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object of the model holds."""
    names = getattr(owner, "__slots__", None) or vars(owner)
    for value in (getattr(owner, name) for name in names):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Linear | Norm):
            yield from _tensors(value)
