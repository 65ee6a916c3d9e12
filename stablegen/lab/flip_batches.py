"""The batches in which the flips experiment runs a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stablegen.core.params import GenerationParams
from stablegen.core.policy import ExecutionPolicy
from stablegen.core.request import Request
from stablegen.engine.base import Engine
from stablegen.errors import ParameterError, StablegenError
from stablegen.lab.prompts import read_prompts
from stablegen.lab.reports.flips import Cause
from stablegen.machine.device import Device
from stablegen.sources.checkpoint import CheckpointSource

PROMPTS = Path(__file__).with_name("prompts.jsonl")
CPU_BESIDE = 4
"""Tokens that other rows generate under a policy on a CPU, whose invariant kernels compute one row after the other."""


def own_prompts() -> list[str]:
    """Return the prompts that come with stablegen, the source article's first."""
    with PROMPTS.open("rb") as stream:
        return [str(line.prompt) for line in read_prompts(stream, PROMPTS.name)]


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt whose answer is compared, and the other prompts that may share its batch."""

    prompt: str
    ids: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]

    def other(self, index: int, length: int) -> tuple[int, ...]:
        """Return the ``index``-th other prompt, cut to a length or filled up with those after it."""
        ids: list[int] = []
        while len(ids) < length:
            ids += self.others[index % len(self.others)]
            index += 1
        return tuple(ids[:length])


@dataclass(frozen=True, slots=True)
class Batches:
    """What all runs of the experiment share, and the batches that follow from it."""

    source: CheckpointSource
    device: Device
    tokens: int
    baseline: int
    sizes: tuple[int, ...]
    pads: tuple[int, ...]

    def start(self, policy: ExecutionPolicy, dtype: str) -> Engine:
        """Return the engine of a policy."""
        return self.source.start(self.source.plan(policy, dtype, self.device.name))

    @property
    def beside(self) -> int:
        """Return how many tokens other rows generate under a policy."""
        return self.tokens if self.device.is_cuda else min(self.tokens, CPU_BESIDE)

    def needles(self, prompts: Sequence[str], count: int | None) -> tuple[list[Needle], list[str]]:
        """Return the first ``count`` prompts with all others beside them, and why others do not fit the model."""
        most = self.source.context - self.tokens - max(self.pads, default=0)
        if self.tokens < 1 or most < 1:
            raise ParameterError(f"tokens={self.tokens}", accepted=f"1 to {self.source.context - 1} with the padding")
        fitting: list[tuple[str, tuple[int, ...]]] = []
        skipped = []
        for prompt in prompts:
            try:
                ids = self.source.tokenizer.encode(prompt)
            except StablegenError as error:
                skipped.append(f"{prompt!r:.60}: {error}")
                continue
            if 1 <= len(ids) <= most:
                fitting.append((prompt, ids))
            else:
                skipped.append(f"{prompt!r:.60}: {len(ids)} tokens, from 1 to {most} fit")
        if not fitting:
            raise ParameterError(f"none of the {len(prompts)} prompts fits the model", accepted=f"1 to {most} tokens")
        around = [ids for _, ids in fitting]
        if len(around) == 1:
            around += [self.source.tokenizer.encode(prompt) for prompt in own_prompts()]
        # each prompt has others beside it, in every run the same ones
        found = [
            Needle(prompt, ids, tuple(around[place + 1 :] + around[:place]))
            for place, (prompt, ids) in enumerate(fitting[:count])
        ]
        return found, skipped

    def request(self, ids: Sequence[int], tokens: int) -> Request:
        """Return the request for an answer of at most so many tokens."""
        params = GenerationParams(max_new_tokens=tokens, eos_token_ids=self.source.eos_token_ids)
        return Request(tuple(ids), params, self.source.identity, self.source.tokenizer.digest)

    def mixed(self, needle: Needle, size: int, tokens: int) -> list[Request]:
        """Return the prompt and others of their own lengths; the others generate ``tokens`` each."""
        others = [needle.others[index % len(needle.others)] for index in range(size - 1)]
        return [self.request(needle.ids, self.tokens), *(self.request(ids, tokens) for ids in others)]

    def equal(self, needle: Needle, size: int, length: int) -> list[Request]:
        """Return the requests of a batch's other rows, all of one length; each generates one token."""
        return [self.request(needle.other(index, length), 1) for index in range(size - 1)]

    def trials(self, needle: Needle) -> Iterator[tuple[Cause, int, list[Request]]]:
        """Yield each cause and setting with its batch, the prompt in row 0.

        The others generate one token and then stay in the batch, as finished rows do in transformers' ``generate``.
        """
        ids, length = needle.ids, len(needle.ids)
        mine = self.request(ids, self.tokens)
        sizes = [size for size in self.sizes if size != self.baseline]
        for size in sizes:
            yield "batch size", size, [mine, *self.equal(needle, size, length)]
        for pad in self.pads:
            beside = self.equal(needle, self.baseline, length + pad)
            yield "padding", pad, [mine, *beside]
            filler = (self.source.eos_token_ids or (0,))[0]  # the token with which GPT-2 is padded
            yield "missing mask", pad, [self.request((filler,) * pad + ids, self.tokens), *beside]
        for size in sizes:
            yield "mixed lengths", size, self.mixed(needle, size, 1)
