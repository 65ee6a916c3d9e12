"""Compile every kernel of a forward pass for a GPU that is not there; print what instructions came of it, as JSON.

Run in a process of its own, for Triton either compiles or interprets.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.kernels import launch
from stablegen.kernels.base import Rows
from stablegen.kernels.triton import TritonKernels

_made: list[tuple[str, Any]] = []


def install(capability: int) -> None:
    """Let each launch compile for a compute capability such as 90, and run nothing."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    triton.runtime.driver.set_active(driver)
    launching = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = launching(self, *arguments, grid=grid, warmup=True, **named)
        _made.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    launch.overlaps = lambda device: capability >= 90  # type: ignore[assignment]


def rows_of(slots: int, length: int) -> Rows:
    """Return one newest token a slot, or a prompt of ``length`` in each."""
    tile = 1 if length == 0 else TritonKernels.tile
    count = slots * max(1, length)
    index = torch.arange(count, dtype=torch.int32)
    first = torch.arange(0, count, tile, dtype=torch.int32)
    last = index[:slots]
    return Rows(index, index, index, first, torch.ones_like(first), last, torch.zeros_like(last), tile)


def compiled(dtype: str, width: int, heads: int, passes: list[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """Yield the kernels of a model's passes, each of (slots, length)."""
    made = getattr(torch, dtype)
    config = transformers.GPT2Config(n_layer=1, n_embd=width, n_head=heads, vocab_size=999, n_positions=256)
    model = transformers.GPT2LMHeadModel(config).to(made)
    own = GPT2(config.to_dict(), model.state_dict(), TritonKernels(), dtype=made, device=torch.device("cpu"))
    for slots, length in passes:
        _made.clear()
        with torch.no_grad():
            own.forward(rows_of(slots, length), own.new_cache(max(slots, 1), 4 * slots))
        yield from _made


def main() -> None:
    """Print, for each kernel: its name, its matrix instructions, and the float32 sums outside of them."""
    install(int(sys.argv[1]))
    told = []
    for dtype, width, heads, *passes in json.loads(sys.argv[2]):
        for name, kernel in compiled(dtype, width, heads, [tuple(one) for one in passes]):
            told.append(
                {
                    "kernel": name,
                    "dtype": dtype,
                    "width": width,
                    "matrix": sorted(set(re.findall(r"\b(?:\w*mma|tcgen05)[\w.]*", kernel.asm["ptx"]))),
                    "sums": len(re.findall(r"arith\.addf", kernel.asm["ttgir"])),
                    "fused": len(re.findall(r"\bfma\.rn\.f32\b", kernel.asm["ptx"])),
                }
            )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
