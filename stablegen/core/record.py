"""What the cache stores: a request, its answer, and how the answer was computed."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal, NamedTuple

from stablegen.core.numerics import Numerics
from stablegen.core.policy import Shape
from stablegen.core.request import Request
from stablegen.core.trace import Trace

FinishReason = Literal["stop", "length"]


class Composition(NamedTuple):
    """An answer's batch: ``rows`` in all, ``requests`` that are not filler, the answer's ``slot``, and ``shape``."""

    rows: int
    requests: int
    slot: int
    shape: Shape = Shape()

    def to_dict(self) -> dict[str, int | None]:
        """Return it as JSON values."""
        return {"rows": self.rows, "requests": self.requests, "slot": self.slot, **self.shape._asdict()}


class Record(NamedTuple):
    """What the cache stores: a request, its answer, and how the answer was computed.

    ``trace`` is None in a record that was made elsewhere and cannot be judged; ``untraced`` then holds its tokens.
    ``created`` is Unix time, ``seconds`` the time from the start of the batch. ``superseded`` is the record that this
    one replaced, one level deep. ``logprobs``: natural log-probabilities of the continuation's tokens, float32.
    ``app``: the app of the client that computed it; None where there was none, or an older stablegen wrote it.
    """

    key: str
    request: Request
    text: str
    finish_reason: FinishReason
    trace: Trace | None
    numerics: Numerics
    composition: Composition
    created: float
    seconds: float
    superseded: Record | None = None
    untraced: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    app: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the generated token ids, an end token included; for a scored continuation, those of highest score."""
        return self.untraced if self.trace is None else self.trace.tokens

    @property
    def whole(self) -> bool:
        """Return whether the answer ends as its request allows: with its only end token, or at the token limit."""
        params, tokens = self.request.params, self.token_ids
        if self.request.continuation:
            return len(tokens) == params.max_new_tokens
        if self.finish_reason == "stop" and (params.stop_strings or params.stopping_criteria):
            return params.eos_token_ids == () or not set(tokens[:-1]) & set(params.eos_token_ids)
        ends = [step for step, token in enumerate(tokens) if token in params.eos_token_ids]
        return ends == [len(tokens) - 1] if ends else len(tokens) == params.max_new_tokens

    def superseding(self, old: Record | None) -> Record:
        """Return this record with ``old`` as the one it superseded; what ``old`` had superseded is dropped."""
        return self._replace(superseded=None if old is None else old._replace(superseded=None))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values, for export and display."""
        trace = None
        if self.trace is not None:
            trace = {
                "tokens": self.trace.tokens,
                "runner_ups": self.trace.runner_ups,
                "scores": self.trace.scores,
                "runner_up_scores": _finite(self.trace.runner_up_scores),
                "margins": _finite(self.trace.margins),
                "score_hash": [f"{value:016x}" for value in self.trace.score_hash],
            }
        return {
            "key": self.key,
            "app": self.app,
            "prompt": self.request.prompt,
            "prompt_ids": self.request.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "params": self.request.params.for_display(),
            "model": self.request.model.model_dump(mode="json"),
            "tokenizer": self.request.tokenizer,
            "numerics": self.numerics.model_dump(mode="json"),
            "numerics_digest": self.numerics.digest,
            "composition": self.composition.to_dict(),
            "created": self.created,
            "seconds": self.seconds,
            "continuation": self.request.continuation,
            "logprobs": self.logprobs,
            "trace": trace,
            "superseded": None if self.superseded is None else self.superseded.to_dict(),
        }


def _finite(values: Sequence[float]) -> list[float | None]:
    """Return numbers as JSON values; infinity, which JSON lacks, becomes None."""
    return [value if isfinite(value) else None for value in values]
