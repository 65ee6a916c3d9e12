"""GPT-2: which of its models the batch-invariant engine computes, and its forward pass.

Torch is imported where a model is built, not before: a configuration is checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stablegen.core.config import is_count
from stablegen.engine.invariant.architectures import Architecture, check_invariant, register_architecture
from stablegen.engine.invariant.model import Model
from stablegen.errors import CheckpointError
from stablegen.kernels.base import Norm

if TYPE_CHECKING:
    import torch

    from stablegen.engine.invariant.kv_cache import KVCache
    from stablegen.kernels.base import KernelSet, Linear, Rows

_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")


def problem(config: Mapping[str, Any]) -> str | None:
    """Return why a GPT-2 cannot run, None where it can; raise ``CheckpointError`` for sizes that are no numbers."""
    if config.get("activation_function", "gelu_new") not in _ACTIVATIONS:
        return f"the model's activation is {config['activation_function']!r}, not one of {', '.join(_ACTIVATIONS)}"
    if config.get("add_cross_attention"):
        return "the model has cross-attention"
    if odd := [name for name in ("n_embd", "n_head", "n_layer", "n_positions") if not is_count(config.get(name))]:
        raise CheckpointError(
            f"the model's config.json has no usable {', '.join(odd)}", accepted="whole numbers from 1"
        )
    return None


@dataclass(frozen=True, slots=True)
class _Layer:
    norm_1: Norm
    qkv: Linear
    projection: Linear
    norm_2: Norm
    up: Linear
    down: Linear
    scale: float


class GPT2(Model):
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
        from stablegen.engine.weights import check_finite

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
        self.layer_count = len(self.layers)
        self.final_norm = norm("ln_f")
        embedding = tensor(f"{prefix}wte.weight", vocabulary, width)
        self.token_embedding = kernels.prepare(embedding.t(), None)
        self.position_embedding = tensor(f"{prefix}wpe.weight", self.context, width)
        untied = not config.get("tie_word_embeddings", True) and "lm_head.weight" in tensors
        self.head = self.token_embedding
        if untied:
            self.head = kernels.prepare(tensor("lm_head.weight", vocabulary, width).t(), None)

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
                return  # a chunk in the middle of prompts: only its keys and values are needed
            attended = kernels.attention(query, layer.qkv, cache, index, rows, placed, layer.scale)
            x, normed = kernels.add_norm(x, kernels.partial(attended, layer.projection), layer.projection, layer.norm_2)
            hidden = kernels.gelu(normed, layer.up)
            after = self.final_norm if final else layers[index + 1].norm_1
            select = rows.last if final else None
            x, normed = kernels.add_norm(x, kernels.partial(hidden, layer.down, layer.up), layer.down, after, select)
        kernels.choose(normed, self.head, rows, placed, cache, scores)


register_architecture(Architecture("gpt2", "GPT-2", problem, GPT2))
