"""GPT-2 over the checkpoint's own weights, through batch-invariant kernels: the ``invariant`` policy.

Tokens of all requests are packed into one list; each carries its slot and absolute position, so prefill, a chunk of
one, and decode are the same call. Nothing is padded, and no operation sees more of the batch than its own row, its
own slot's keys and values, and their positions. The residual stream and the scores stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stablegen.checkpoint import check_invariant
from stablegen.engine.base import Generated, Observer
from stablegen.engine.decode import check_flags, cpu_threads, decode
from stablegen.engine.kv_cache import KVCache
from stablegen.engine.weights import check_finite
from stablegen.errors import CheckpointError
from stablegen.kernels.base import KernelSet, Linear
from stablegen.numerics import Numerics
from stablegen.policy import Batch, Limits

CHUNK = 2048
"""Tokens of one forward pass at most; longer prefills are cut, which moves no bit."""


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    norm_1: _Norm
    qkv: Linear
    projection: Linear
    norm_2: _Norm
    up: Linear
    down: Linear
    scale: float


class GPT2:
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
        check_invariant(config)
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.heads = int(config["n_head"])
        self.size, rest = divmod(int(config["n_embd"]), self.heads)
        if rest:
            raise CheckpointError(f"config.json asks for {self.heads} heads in a width of {config['n_embd']}")
        self.context = int(config["n_positions"])
        self.eps = float(config.get("layer_norm_epsilon", 1e-5))
        prefix = "transformer." if "transformer.wte.weight" in tensors else ""

        width, vocabulary = int(config["n_embd"]), int(config["vocab_size"])
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

        def norm(name: str) -> _Norm:
            return _Norm(tensor(f"{prefix}{name}.weight", width), tensor(f"{prefix}{name}.bias", width))

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
        self.final_norm = norm("ln_f")
        self.token_embedding = tensor(f"{prefix}wte.weight", vocabulary, width)
        self.position_embedding = tensor(f"{prefix}wpe.weight", self.context, width)
        untied = not config.get("tie_word_embeddings", True) and "lm_head.weight" in tensors
        head = tensor("lm_head.weight", vocabulary, width) if untied else self.token_embedding
        self.head = kernels.prepare(head.t(), None)

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Return an empty KV cache."""
        return KVCache(len(self.layers), slots, self.heads, capacity, self.size, dtype=self.dtype, device=self.device)

    def forward(
        self,
        tokens: torch.Tensor,  # [T] int64
        slots: torch.Tensor,  # [T] int64
        positions: torch.Tensor,  # [T] int64
        cache: KVCache,
    ) -> torch.Tensor:
        """Return the residual stream [T, E] float32 behind the last layer; keys and values go into the cache."""
        kernels, low = self.kernels, self.dtype
        x = self.token_embedding[tokens].float() + self.position_embedding[positions].float()  # [T, E]
        for index, layer in enumerate(self.layers):
            normed = kernels.layer_norm(x, layer.norm_1.weight, layer.norm_1.bias, eps=self.eps, out_dtype=low)
            qkv = kernels.linear(normed, layer.qkv, out_dtype=low)  # [T, 3 E]
            query, key, value = qkv.view(len(tokens), 3, self.heads, self.size).unbind(1)  # [T, H, D] each
            cache.write(index, slots, positions, key, value)
            attended = kernels.attention(
                query,
                cache.keys[index],
                cache.values[index],
                slots=slots,
                positions=positions,
                scale=layer.scale,
            )
            x = kernels.linear(attended.flatten(1), layer.projection, residual=x, out_dtype=torch.float32)
            normed = kernels.layer_norm(x, layer.norm_2.weight, layer.norm_2.bias, eps=self.eps, out_dtype=low)
            hidden = kernels.linear(normed, layer.up, activation="gelu_new", out_dtype=low)
            x = kernels.linear(hidden, layer.down, residual=x, out_dtype=torch.float32)
        return x

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [R, V] float32 of R rows of the residual stream."""
        weight, bias = self.final_norm.weight, self.final_norm.bias
        normed = self.kernels.layer_norm(x, weight, bias, eps=self.eps, out_dtype=self.dtype)
        return self.kernels.linear(normed, self.head, out_dtype=torch.float32)


class GPT2Engine:
    """Runs batches of any composition through ``GPT2``; one row's bits never depend on another's."""

    def __init__(self, model: GPT2, numerics: Numerics, *, max_rows: int | None = None, chunk: int = CHUNK) -> None:
        self.model = model
        self.numerics = numerics
        rows = (64 if model.device.type == "cuda" else 16) if max_rows is None else max_rows
        self.limits = Limits(context=model.context, max_rows=rows)
        self.chunk = chunk

    def generate(self, batch: Batch, observe: Observer | None = None) -> Iterator[Generated]:
        """Yield each request of the batch as it finishes.

        Raises ``NumericsChangedError`` where torch's precision flags are no longer those of ``numerics``.
        """
        check_flags(self.numerics)
        model = self.model
        return decode(lambda: _Packed(self, batch), batch, model.device, model.kernels.best_two, observe)


class _Packed:
    """One batch: packed prompts, then one token a live slot."""

    def __init__(self, engine: GPT2Engine, batch: Batch) -> None:
        self._engine = engine
        self._model = engine.model
        self._prompts = {slot: request.prompt_ids for slot, request in batch.requests}
        self._lengths = {slot: len(ids) for slot, ids in self._prompts.items()}
        capacity = max(len(r.prompt_ids) + r.params.max_new_tokens for _, r in batch.requests)
        self._cache = self._model.new_cache(len(batch.rows), capacity)

    def prefill(self, live: list[int]) -> torch.Tensor:
        packed = [(token, slot, at) for slot in live for at, token in enumerate(self._prompts[slot])]
        ends = {}
        for index, (_, slot, _) in enumerate(packed):
            ends[slot] = index
        width = self._model.heads * self._model.size
        last = torch.empty(len(live), width, dtype=torch.float32, device=self._model.device)
        for start in range(0, len(packed), self._engine.chunk):
            x = self._forward(packed[start : start + self._engine.chunk])
            for row, slot in enumerate(live):
                if start <= ends[slot] < start + len(x):
                    last[row] = x[ends[slot] - start]
        return self._scores(last)

    def step(self, tokens: list[int], live: list[int]) -> torch.Tensor:
        packed = [(token, slot, self._lengths[slot]) for token, slot in zip(tokens, live, strict=True)]
        for slot in live:
            self._lengths[slot] += 1
        return self._scores(self._forward(packed))

    def _forward(self, packed: list[tuple[int, int, int]]) -> torch.Tensor:
        tokens, slots, positions = torch.tensor(packed, device=self._model.device).t().contiguous()
        with cpu_threads(self._engine.numerics.threads):
            return self._model.forward(tokens, slots, positions, self._cache)

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        with cpu_threads(self._engine.numerics.threads):
            return self._model.scores(x)
