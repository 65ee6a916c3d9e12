"""Random numbers that are a function of (seed, sample, step, token id) alone, and the noise made of them.

Gumbel-max: of scores with independent Gumbel noise added, the largest is a draw from their softmax. So a sample is an
argmax, the same alone or in any batch, and its margin means what a greedy margin means.

SHA-256 turns (seed, sample, step) into the state of a SplitMix64 generator, and the token id is the counter: its output
``mix(state + (id + 1) * 0x9E3779B97F4A7C15)`` is that of the generator after so many steps, computed for all ids at
once. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. All of it is integer
arithmetic, so a CPU and a GPU draw the same bits.
"""

from __future__ import annotations

import hashlib

import torch

from stablegen.kernels.reference import counters, mix

VERSION = 1
"""Raised whenever the same seed would draw other numbers."""
_BITS = 52


def state_of(seed: int, sample: int, step: int) -> int:
    """Return the 64-bit state, as a signed integer, from which a step's numbers are drawn."""
    digest = hashlib.sha256(f"stablegen {VERSION} {seed} {sample} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniforms(states: torch.Tensor, count: int) -> torch.Tensor:
    """Return numbers [R, count] float64 inside (0, 1), odd multiples of 2**-53, of ``states`` [R] int64."""
    drawn = mix(states[:, None] + counters(count, states.device))
    odd = ((drawn >> (64 - _BITS)) & ((1 << _BITS) - 1)) * 2 + 1
    return odd.double() * 2.0 ** -(_BITS + 1)  # exact


def gumbel(states: torch.Tensor, count: int) -> torch.Tensor:
    """Return standard Gumbel noise [R, count] float64, up to 36.7, of ``states`` [R] int64.

    A CPU takes the logarithms row by row: its vectorised loop and that loop's tail may round differently.
    """
    if states.is_cuda or len(states) == 1:
        return -torch.log(-torch.log(uniforms(states, count)))
    return torch.cat([gumbel(states[row : row + 1], count) for row in range(len(states))])
