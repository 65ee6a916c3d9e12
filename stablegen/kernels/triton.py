"""The kernel set for NVIDIA GPUs, Ampere and newer; with ``TRITON_INTERPRET=1`` it also runs on CPU tensors."""

from __future__ import annotations

import torch

from stablegen.kernels.attention import attention
from stablegen.kernels.base import Activation, BestTwo, Linear
from stablegen.kernels.layer_norm import layer_norm
from stablegen.kernels.linear import linear
from stablegen.kernels.scores import best_two


class TritonKernels:
    """The operations as Triton kernels, each beside its launcher and its fixed configuration."""

    name = "triton"
    version = 1

    def prepare(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Keep the layer as it is: the kernel reads a weight of any strides."""
        return Linear(weight, bias)

    def linear(
        self,
        x: torch.Tensor,
        layer: Linear,
        *,
        activation: Activation = "none",
        residual: torch.Tensor | None = None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return ``activation(x @ weight + bias) + residual`` [M, N], accumulated in float32, rounded once."""
        return linear(x, layer.weight, layer.bias, activation=activation, residual=residual, out_dtype=out_dtype)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the rows' layer norm [M, E]; mean and biased variance in float32, two passes."""
        return layer_norm(x, weight, bias, eps=eps, out_dtype=out_dtype)

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        slots: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Return causal attention [T, H, D]; keys are summed in absolute blocks, those behind a token never read."""
        return attention(query, keys, values, slots=slots, positions=positions, scale=scale)

    def best_two(self, scores: torch.Tensor) -> BestTwo:
        """Reduce rows of scores [M, V] float32 to what a decode step keeps."""
        return best_two(scores)
