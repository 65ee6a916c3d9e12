"""Feed a streamer as transformers does: the prompt, the tokens of each step, the end; from a run or from a hit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stablegen.core.answer import Completion
from stablegen.core.request import Request
from stablegen.hf.arguments import GenerateCall


class Stream:
    """Passes a call's tokens to its streamer, each step as soon as every row's token is known."""

    def __init__(self, call: GenerateCall) -> None:
        self._call = call
        self._requests = call.requests
        self._ends = frozenset(call.requests[0].params.eos_token_ids)
        self._known: dict[Request, list[int]] = {request: [] for request in call.requests}
        self._put = 0
        call.streamer.put(call.ids.cpu())

    def hear(self, request: Request, step: int, tokens: Sequence[int]) -> None:
        """Take a request's tokens from ``step`` on; those known before may be repeated."""
        known = self._known[request]
        known[step:] = tokens
        self._pass_on(self._complete())

    def finish(self, completions: Sequence[Completion]) -> None:
        """Pass on the remaining tokens, and end the stream."""
        for request, completion in zip(self._requests, completions, strict=True):
            self._known[request] = list(completion.token_ids)
        self._pass_on(max(map(len, self._known.values())))
        self._call.streamer.end()

    def _complete(self) -> int:
        """Return how many steps are known for every row; a row that has ended waits for none."""
        rows = self._known.values()
        going = [len(row) for row in rows if not row or row[-1] not in self._ends]
        return min(going) if going else max(map(len, rows))

    def _pass_on(self, steps: int) -> None:
        for step in range(self._put, steps):
            rows = [self._known[request] for request in self._requests]
            tokens = [row[step] if step < len(row) else self._call.pad for row in rows]
            self._call.streamer.put(torch.tensor(tokens))
            self._put = step + 1
