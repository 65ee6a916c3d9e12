"""Recording launches as a CUDA graph, whose replays give the very bits of the launches recorded."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from stablegen.errors import DeviceError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Recorder:
    """Records the steps of one engine; its graphs share one memory pool, so no two of them may run at once.

    cuBLAS works in memory that torch keeps for each stream, and which is freed at the end of other graphs and by
    torch's own compiler, while graphs that have recorded its address live on. So each graph is recorded on a stream of
    its own: that memory then comes out of the graphs' pool, from which nothing else is allocated.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled and device.type == "cuda"
        self._device = device
        self._free: list[torch.cuda.Stream] = []
        # the pool lives as long as one of its graphs, so this one is kept
        self._oldest: torch.cuda.CUDAGraph | None = None

    def record(self, step: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T] | None:
        """Return a graph of a step that has run before, and what the step returns; None where there can be none."""
        if not self.enabled:
            return None
        try:
            graph, result = self._capture(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from error
            cause = str(error.__context__ or error).strip().split("\n")[0]
            _log.warning(
                "this step cannot be captured as a CUDA graph, so its kernels are launched one by one: %s", cause
            )
            self.enabled = False
            with suppress(RuntimeError):  # torch's random numbers wait for the capture that failed until another ends
                self._capture(lambda: torch.zeros(1, device=self._device))
            return None
        self._oldest = self._oldest or graph
        return graph, result

    def _capture(self, step: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
        current = torch.cuda.current_stream(self._device)
        stream = self._free.pop() if self._free else new_stream(self._device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        pool = None if self._oldest is None else self._oldest.pool()
        # in inference mode, a capture would make tensors of torch's random generator that no other could write to
        with torch.inference_mode(False), torch.cuda.stream(stream):
            # other threads' work on the device does not end it
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                with torch.inference_mode():
                    result = step()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        weakref.finalize(graph, self._free.append, stream)
        return graph, result


class StreamOrder:
    """Puts one engine's work in order, whichever streams are current when it is launched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def wait_for_last(self) -> None:
        """Let the current stream wait for what was launched on the one that was current before."""
        if self._device.type != "cuda":
            return
        current, last = torch.cuda.current_stream(self._device), self._last
        if last is not None and last != current:
            current.wait_stream(last)
        self._last = current


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that nothing has run on, and that torch does not hand out again."""
    made = ctypes.c_void_p()
    with torch.cuda.device(device):
        problem = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(made), _NON_BLOCKING)
        if problem or made.value is None:
            raise DeviceError(f"the driver gives no stream on {device}: error {problem}", hint="Restart the process")
        return torch.cuda.ExternalStream(made.value, device=device)  # type: ignore[no-untyped-call]
