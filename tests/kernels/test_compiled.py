"""What the compiler makes of the kernels, for GPUs that need not be there: tests/compiled.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton, which the kernels are written in, is not installed")

PASSES = ([1, 0], [17, 0], [300, 0], [2, 70])
"""Slots, and the tokens of each one's prompt; 0: one newest token a slot."""
ONE_INSTRUCTION = {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"}


def kernels_for(capability: int, *models: list[Any]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "compiled.py"
    command = [sys.executable, str(script), str(capability), json.dumps(models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_size_multiplies_with_one_instruction_and_rounds_after_each_operation(capability: int) -> None:
    # bfloat16 goes the way of float16; only the interpreter, and a CPU's tensors, would be given another
    told = kernels_for(capability, ["float16", 768, 12, *PASSES], ["float32", 96, 3, *PASSES])
    assert len(told) > 60
    assert {one for kernel in told for one in kernel["matrix"]} == ONE_INSTRUCTION
    assert sum(kernel["fused"] for kernel in told) == 0
    multiplying = {"_partial", "_qkv", "_gelu", "_attention", "_score"}
    assert {kernel["kernel"] for kernel in told if kernel["matrix"]} == multiplying


def test_no_chain_begins_with_what_is_added_to_its_end() -> None:
    # Of one block, a product is one instruction of the compiler's, to which it likes to hand the bias as a beginning:
    # then a bias would be inside of the chain here and outside of it where summands are added up later.
    told = kernels_for(90, ["float16", 40, 1, [17, 0], [2, 70]])
    sums = {name: {kernel["sums"] for kernel in told if kernel["kernel"] == name} for name in ("_qkv", "_gelu")}
    # the slice and the bias; gelu_new has two sums of its own
    assert sums == {"_qkv": {2}, "_gelu": {4}}
