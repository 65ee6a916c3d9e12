"""The paged KV cache: allocated once, bounded, its pages shared by requests whose prompts have a common prefix.

A page holds ``PAGE`` positions of every layer and head. A full page of a prompt is known by the tokens up to its end,
and a later request with the same prefix uses it as it is: under batch-invariant kernels it holds the very bits that
computing it again would give.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch

from stablegen.kernels import log
from stablegen.kernels.base import PAGE

TICKS = 64
"""Passes whose log is kept on the device; the host reads it sooner."""

_Prefix = tuple[int, ...]


@dataclass(slots=True)
class Lease:
    """One request's slot and pages, in the order of its positions; ``shared`` positions are computed already."""

    slot: int
    pages: list[int]
    shared: int
    prefixes: list[_Prefix] = field(default_factory=list)


class KVCache:
    """Keys and values [layers, pages, H, PAGE, D] and each slot's state (see ``kernels.base.Cache``).

    Page 0 and the last slot are spare: rows that only fill a batch up read and write there.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        size: int,
        *,
        pages: int,
        slots: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        paired: bool = False,
    ) -> None:
        shape: tuple[int, ...] = (layers, pages + 1, heads, PAGE, size)
        if paired:
            shape, dtype = (layers, 2, *shape[1:]), torch.float16
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        per_slot = -(-context // PAGE)
        self.table = torch.zeros(slots + 1, per_slot, dtype=torch.int32, device=device)
        self.newest = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.log = torch.zeros(TICKS, slots, log.WIDTH, dtype=torch.int32, device=device)
        self.pages = pages
        self.slots = slots
        self.spare = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._free = list(range(pages, 0, -1))
        self._users = [0] * (pages + 1)
        self._known: dict[_Prefix, int] = {}
        self._names: dict[int, _Prefix] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages without users, the longest idle first
        self._rows = torch.zeros(slots + 1, per_slot, dtype=torch.int32)
        self._stale = False

    @property
    def bytes(self) -> int:
        """Return the bytes of all keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def fits(self, positions: int) -> bool:
        """Return whether a request of so many positions could ever be held."""
        return -(-positions // PAGE) <= self.pages

    def lease(self, given: Sequence[int], positions: int, *, share: int | None = None) -> Lease | None:
        """Return a slot and pages for a task of so many positions, or None until others have finished.

        Full pages of the ``given`` tokens that are known are shared, among the first ``share`` positions; by default
        among all but the last, whose scores are needed.
        """
        if not self._free_slots:
            return None
        needed = -(-positions // PAGE)
        full = (len(given) - 1) // PAGE
        prefixes = [tuple(given[: (i + 1) * PAGE]) for i in range(full)]
        shared: list[int] = []
        for prefix in prefixes[: full if share is None else share // PAGE]:
            page = self._known.get(prefix)
            if page is None:
                break
            shared.append(page)
        idle_shared = sum(page in self._idle for page in shared)
        if needed - len(shared) > len(self._free) + len(self._idle) - idle_shared:
            return None
        for page in shared:
            self._take(page)
        fresh = [self._new_page() for _ in range(needed - len(shared))]
        slot = self._free_slots.pop()
        pages = shared + fresh
        for page, prefix in zip(pages[len(shared) : full], prefixes[len(shared) :], strict=True):
            if prefix in self._known:
                continue  # it is computed again, for its scores
            # a request that comes later in the same pass finds the page written before it is read
            self._known[prefix] = page
            self._names[page] = prefix
        self._rows[slot].zero_()
        self._rows[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._stale = True
        return Lease(slot, pages, len(shared) * PAGE, prefixes)

    def release(self, lease: Lease, *, forget: bool = False) -> None:
        """Take a request's slot and pages back; known pages stay for others.

        With ``forget`` they do not: they were never filled.
        """
        for page in reversed(lease.pages):  # the end is evicted first: without the beginning it cannot be found
            self._users[page] -= 1
            if forget:
                self._forget(page)
            if self._users[page] == 0:
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        self._free_slots.append(lease.slot)

    def forget(self) -> None:
        """Let no later request share pages that are not in use any more."""
        for page in self._idle:
            self._forget(page)
            self._free.append(page)
        self._idle.clear()

    def logging_to(self, other: torch.Tensor) -> KVCache:
        """Return this very memory with another log, for one pass; pages are leased from this cache alone."""
        view = copy(self)
        view.log = other
        return view

    def upload(self) -> None:
        """Bring the page table to the device, where it has changed."""
        if self._stale:
            copy_in(self._rows, self.table)
            self._stale = False

    def _take(self, page: int) -> None:
        self._users[page] += 1
        self._idle.pop(page, None)

    def _new_page(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def _forget(self, page: int) -> None:
        prefix = self._names.pop(page, None)
        # another page may have been computed for the same tokens since
        if prefix is not None and self._known.get(prefix) == page:
            del self._known[prefix]


def copy_in(content: torch.Tensor, target: torch.Tensor) -> None:
    """Copy from the host in the order of the device's stream, without waiting for it."""
    if target.is_cuda:
        # pinned memory of its own for each copy: torch keeps it until the copy is done
        content = content.pin_memory()
    target.copy_(content, non_blocking=True)
