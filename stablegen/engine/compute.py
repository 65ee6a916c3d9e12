"""What every engine computes inside of: its device, its threads, torch's flags, and the errors of a batch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch
from stablegen.core.request import Request
from stablegen.errors import DeviceMemoryError, EngineError, NonFiniteScoresError, NumericsChangedError
from stablegen.machine.plan import attention_backends, reduced_precision, torch_matmul_precision

_T = TypeVar("_T")
_THREADS = threading.RLock()


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
    """Compute on the device, whatever torch's current one is, without gradients and without a caller's autocast.

    Autocast would compute in another dtype than the numerics say; an event would wait for the current device's stream.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


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


def raise_failed(failed: Sequence[tuple[Request, int]]) -> None:
    """Raise ``NonFiniteScoresError`` where requests failed, each at a step."""
    if not failed:
        return
    request, step = failed[0]
    shown = repr(request.prompt) if request.prompt is not None else f"of {len(request.prompt_ids)} tokens"
    raise NonFiniteScoresError(
        f"the scores became NaN or infinite at step {step} of the prompt {shown:.80}"
        + (f" (and of {len(failed) - 1} others)" if len(failed) > 1 else ""),
        hint="Nothing of it was cached. Try dtype='float32', and check the weights",
    )


def closed_engine() -> EngineError:
    """Return the error of an engine that is used after ``close``."""
    return EngineError("this engine was closed, and holds its model no longer", hint="Make a new client")


def release_memory(device: torch.device) -> None:
    """Give the device back the memory that nothing refers to any more."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def unsigned(hashes: Sequence[int]) -> list[int]:
    """Return 64-bit hashes as a trace keeps them."""
    return [value & 0xFFFFFFFFFFFFFFFF for value in hashes]
