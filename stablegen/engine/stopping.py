"""Where an answer ends before its length: its end token, a stop string, or a criterion of the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from stablegen.core.request import Request
from stablegen.engine.base import Stopper
from stablegen.engine.private import last_tokens
from stablegen.tokenizer import Tokenizer


def stopper_for(request: Request, tokenizer: Tokenizer) -> Stopper | None:
    """Return what ends a request's answer besides its end tokens and its length; None where nothing else does."""
    criteria: list[Callable[[torch.Tensor], Any]] = []
    if request.params.stop_strings:
        criteria.append(_StopStrings(request.params.stop_strings, tokenizer))
    for make in request.stopping_criteria:
        criteria.append(partial(_call, make(len(request.prompt_ids))))
    if not criteria:
        return None

    def stops(tokens: Sequence[int]) -> bool:
        ids = torch.tensor([[*request.prompt_ids, *tokens]])  # [1, S]
        # every criterion is called at every step, for it may count them
        met = [bool(torch.as_tensor(criterion(ids)).all()) for criterion in criteria]
        return any(met)

    return stops


def _call(criterion: Any, ids: torch.Tensor) -> Any:
    return criterion(ids, None)


class _StopStrings:
    """Transformers' own criterion, called only where the newest token can be the end of a stop string."""

    def __init__(self, stop_strings: tuple[str, ...], tokenizer: Tokenizer) -> None:
        from transformers.generation import StopStringCriteria

        self._criterion = StopStringCriteria(tokenizer.for_transformers(), list(stop_strings))
        self._ends = last_tokens(self._criterion)

    def __call__(self, ids: torch.Tensor) -> Any:
        """Return whether the row [1, S] ends with a stop string."""
        return int(ids[0, -1]) in self._ends and self._criterion(ids, None)
