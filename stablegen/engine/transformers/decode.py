"""Decoding, one step a time, over any forward pass."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol, TypeVar

import torch

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch
from stablegen.core.record import Composition, FinishReason
from stablegen.core.request import Request
from stablegen.core.trace import Trace
from stablegen.engine.base import Follow, Generated, Listener, Observer, Stopper
from stablegen.engine.sampling import Choosers
from stablegen.errors import DeviceMemoryError, NonFiniteScoresError, NumericsChangedError
from stablegen.kernels.base import BestTwo
from stablegen.machine.plan import attention_backends, reduced_precision, torch_matmul_precision


class Forward(Protocol):
    """One batch's forward pass, with its KV cache; R live rows of S slots, V tokens."""

    def prefill(self, live: list[int]) -> torch.Tensor:
        """Return the scores [R, V] float32 that follow the prompts of the live slots."""
        ...

    def step(self, tokens: list[int], live: list[int]) -> torch.Tensor:
        """Return the scores [R, V] float32 that follow ``tokens`` [R], the newest of each live slot."""
        ...


_T = TypeVar("_T")
_THREADS = threading.RLock()


@dataclass(slots=True)
class _Row:
    request: Request
    followed: Sequence[int] = ()
    """Token ids that are fed in place of those chosen."""
    stops: Stopper | None = None
    tokens: list[int] = field(default_factory=list)
    runner_ups: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    runner_up_scores: list[float] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def finish_reason(self) -> FinishReason | None:
        params = self.request.params
        if not self.followed and (
            self.tokens[-1] in params.eos_token_ids or (self.stops is not None and self.stops(self.tokens))
        ):
            return "stop"
        return "length" if len(self.tokens) == (len(self.followed) or params.max_new_tokens) else None

    def newest(self) -> int:
        return self.followed[len(self.tokens) - 1] if self.followed else self.tokens[-1]

    def trace(self) -> Trace:
        return Trace.of(self.tokens, self.runner_ups, self.scores, self.runner_up_scores, unsigned(self.hashes))


def unsigned(hashes: Sequence[int]) -> list[int]:
    """Return 64-bit hashes as a trace keeps them."""
    return [value & 0xFFFFFFFFFFFFFFFF for value in hashes]


class Answers:
    """The answers of a batch as they grow; ``live`` are the slots that still do.

    ``follow``, by slot: token ids that are fed in place of those chosen, to their end. ``stopper`` makes what ends a
    request's answer besides its end tokens, ``listen`` hears every token.
    """

    def __init__(
        self,
        batch: Batch,
        capacity: int | None = None,
        follow: Follow | None = None,
        *,
        stopper: Callable[[Request], Stopper | None] = lambda _: None,
        listen: Listener | None = None,
    ) -> None:
        self._batch = batch
        self._capacity = capacity
        self._listen = listen
        follow = follow or {}
        self._rows = {slot: _Row(request, follow.get(slot, ()), stopper(request)) for slot, request in batch.requests}
        self._failed: list[tuple[Request, int]] = []
        self._started = time.perf_counter()
        self.live = list(self._rows)
        self.led = bool(follow)

    def newest(self) -> list[int]:
        """Return the token that each live slot is fed next."""
        return [self._rows[slot].newest() for slot in self.live]

    def add(self, slots: Sequence[int], best: BestTwo) -> Iterator[Generated]:
        """Take one step, ``best`` [M] of the M ``slots``; yield what it ends. Slots that are not live are ignored."""
        columns = (best.tokens, best.scores, best.hashes, best.finite)
        steps = zip(slots, *(column.tolist() for column in columns), strict=True)
        live = set(self.live)
        for slot, (token, runner_up), (score, runner_up_score), hash_value, finite in steps:
            if slot not in live:
                continue
            row = self._rows[slot]
            if not finite:
                self._failed.append((row.request, len(row.tokens)))
                self.live.remove(slot)
                continue
            row.tokens.append(token)
            row.runner_ups.append(runner_up)
            row.scores.append(score)
            row.runner_up_scores.append(runner_up_score)
            row.hashes.append(hash_value)
            if self._listen is not None:
                self._listen(slot, len(row.tokens) - 1, [token])
            reason = row.finish_reason()
            if reason is None:
                continue
            self.live.remove(slot)
            batch = self._batch
            yield Generated(
                row.request,
                row.trace(),
                reason,
                Composition(len(batch.rows), len(self._rows), slot, batch.width, self._capacity),
                time.perf_counter() - self._started,
            )

    def check(self) -> None:
        """Raise ``NonFiniteScoresError`` where a row had to be given up."""
        raise_failed(self._failed)


def raise_failed(failed: Sequence[tuple[Request, int]]) -> None:
    """Raise ``NonFiniteScoresError`` where requests had to be given up, each at a step."""
    if not failed:
        return
    request, step = failed[0]
    shown = repr(request.prompt) if request.prompt is not None else f"of {len(request.prompt_ids)} tokens"
    raise NonFiniteScoresError(
        f"the scores became NaN or infinite at step {step} of the prompt {shown:.80}"
        + (f" (and of {len(failed) - 1} others)" if len(failed) > 1 else ""),
        hint="Nothing of it was cached. Try dtype='float32', and check the weights",
    )


def decode(
    prepare: Callable[[], Forward],
    batch: Batch,
    device: torch.device,
    best_two: Callable[[torch.Tensor], BestTwo],
    answers: Answers,
    choosers: Choosers,
    observe: Observer | None = None,
    threads: int | None = None,
) -> Generator[Generated, None, None]:
    """Yield each request of a batch as it finishes; a row that fails is reported when the others are done.

    ``prepare`` allocates what the batch needs on ``device`` and returns its forward pass. ``threads``: a CPU's, by
    which the sums of long rows are cut.
    """
    forward = run_on(device, batch, prepare)
    scores = run_on(device, batch, lambda: forward.prefill(answers.live))

    for step in count():
        if observe is not None:
            for slot, row_scores in zip(answers.live, scores, strict=True):
                observe(slot, row_scores)
        refine = partial(choosers.refine, scores=scores, slots=list(answers.live), step=step)
        best = run_on(device, batch, partial(_chain, partial(best_two, scores), refine, threads))
        yield from answers.add(list(answers.live), best)
        if not answers.live:
            break
        scores = run_on(device, batch, lambda: forward.step(answers.newest(), answers.live))
    answers.check()


def _chain(first: Callable[[], _T], then: Callable[[_T], _T], threads: int | None) -> _T:
    with cpu_threads(threads):
        return then(first())


def run_on(device: torch.device, batch: Batch, action: Callable[[], _T]) -> _T:
    """Run a part of a batch's work; raise ``DeviceMemoryError`` where it does not fit."""
    try:
        with computing(device):
            return action()
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"a batch of {len(batch.rows)} rows did not fit into the device's memory",
            hint="Use fewer rows, shorter prompts or a 16-bit dtype",
        ) from error


@contextlib.contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Compute on the device, whichever is torch's current one, without gradients and without a caller's autocast.

    Autocast would compute in another dtype than the numerics say; an event would wait for the current device's stream.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def check_flags(numerics: Numerics) -> None:
    """Raise ``NumericsChangedError`` where torch's precision flags are no longer those of ``numerics``."""
    flags = {
        "float32_matmul_precision": torch_matmul_precision,
        "reduced_precision": reduced_precision,
        "attention_backends": attention_backends,
    }
    planned = {name: getattr(numerics, name) for name in flags}
    now = {name: None if planned[name] is None else read() for name, read in flags.items()}
    if planned != now:
        raise NumericsChangedError(
            f"torch's flags changed from {planned} to {now} since this client was made",
            hint="Set them before you make the client, or make a new one",
        )


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run with the number of threads that ``Numerics`` promises; None leaves it alone."""
    if count is None:
        yield
        return
    with _THREADS:  # the number is the process's: two clients in two threads take turns
        before = torch.get_num_threads()
        if count != before:
            torch.set_num_threads(count)
        try:
            yield
        finally:
            if count != before:
                torch.set_num_threads(before)
