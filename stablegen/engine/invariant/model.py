"""What the engine needs of a model's forward pass through batch-invariant kernels; imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from stablegen.kernels.base import PAGE

if TYPE_CHECKING:
    import torch

    from stablegen.engine.invariant.kv_cache import KVCache
    from stablegen.kernels.base import KernelSet, Rows


class Model(ABC):
    """One model's weights and forward pass; an architecture sets the attributes and writes ``forward``.

    ``heads`` of ``size`` features are those of keys and values, in each of ``layer_count`` layers. ``context``: the
    longest sequence in tokens. ``vocabulary``: the number of token ids.
    """

    kernels: KernelSet
    dtype: torch.dtype
    device: torch.device
    layer_count: int
    heads: int
    size: int
    context: int
    vocabulary: int

    @abstractmethod
    def forward(self, rows: Rows, cache: KVCache, scores: torch.Tensor | None = None) -> None:
        """Run packed tokens; choose, log and remember the tokens that follow those of ``rows.last``.

        ``scores`` [R, V] float32 receives the full score rows where it is given. Where ``rows.last`` is empty, only
        keys and values are computed.
        """

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that it holds; tied ones more than once."""
        return _tensors(vars(self))

    def weight_bytes(self) -> int:
        """Return the bytes of its weights, tied ones counted once."""
        held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in self.tensors()}
        return sum(held.values())

    def kv_cache_bytes_per_page(self) -> int:
        """Return the bytes that one page of keys and values takes over all layers."""
        return 2 * self.layer_count * self.heads * PAGE * self.size * self.dtype.itemsize

    def new_cache(self, slots: int, pages: int) -> KVCache:
        """Return an empty KV cache of so many pages, for so many requests at once."""
        import torch

        from stablegen.engine.invariant.kv_cache import KVCache

        return KVCache(
            self.layer_count,
            self.heads,
            self.size,
            pages=pages,
            slots=slots,
            context=self.context,
            dtype=self.dtype,
            device=self.device,
            paired=self.kernels.paired and self.dtype == torch.float32,
        )


def _tensors(owner: object) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(owner, torch.Tensor):
        yield owner
    elif isinstance(owner, dict):
        for value in owner.values():
            yield from _tensors(value)
    elif isinstance(owner, list | tuple):
        for value in owner:
            yield from _tensors(value)
    elif is_dataclass(owner):
        for one in fields(owner):
            yield from _tensors(getattr(owner, one.name))
