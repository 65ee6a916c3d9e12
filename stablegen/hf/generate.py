"""``client.generate``: answer a call of ``model.generate`` with the same kind of result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from stablegen.core.answer import Completion
from stablegen.core.request import Request
from stablegen.engine.compute import cpu_threads
from stablegen.engine.sampling import TokenSampler
from stablegen.errors import ParameterError, UnsupportedParameterError
from stablegen.hf.arguments import GenerateCall, resolve
from stablegen.hf.streaming import Stream
from stablegen.session.forcing import score_rows
from stablegen.session.session import Session

UNSUPPORTED = ("raise", "passthrough")


@dataclass
class StableGenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers is untyped here
    """Transformers' output, with the completions (records, verdicts) of its rows."""

    completions: Sequence[Completion] | None = None


def generate(
    session: Session,
    inputs: torch.Tensor | None = None,
    generation_config: Any = None,
    *,
    seed: int | Sequence[int] | torch.Tensor | None = None,
    sample_index: int = 0,
    unsupported: str = "raise",
    **arguments: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Return ids [B, prompt + new], or an output with ``sequences`` and ``completions``, as transformers would.

    Rows may be padded on either side, as their mask says; padding is kept in the result and never seen by the model.
    Shorter answers are filled with the pad token, or the end token. ``scores`` and ``logits``, where requested, are
    computed by teacher forcing under the client's numerics; they are 0 after a row's end.
    """
    if unsupported not in UNSUPPORTED:
        raise ParameterError(f"unsupported={unsupported!r} is not valid", accepted=", ".join(map(repr, UNSUPPORTED)))
    session.check_open()
    try:
        call = resolve(session, inputs, generation_config, seed, sample_index, dict(arguments))
    except UnsupportedParameterError as refusal:
        if unsupported == "raise":
            raise
        if seed is not None or sample_index:
            raise ParameterError(
                f"seed={seed!r:.40} was given for a call that is passed through to transformers: {refusal.problem}",
                hint="Leave seed and sample_index out, and call torch.manual_seed before",
            ) from refusal
        session.own.warn_once(
            f"{refusal.hint}", f"{refusal.problem}: transformers runs the call unchanged, and it is not cached"
        )
        own = session.source.passthrough(session.numerics)
        return own.generate(inputs, generation_config, **arguments)
    return _answer(session, call)


def _answer(session: Session, call: GenerateCall) -> torch.Tensor | StableGenerateOutput:
    stream = None if call.streamer is None else Stream(call)
    completions = session.run_requests(
        call.requests, cached=call.seeded, listen=None if stream is None else stream.hear
    )
    if stream is not None:
        stream.finish(completions)
    longest = max(len(completion.token_ids) for completion in completions)
    answers = torch.full((len(completions), longest), call.pad)
    for row, completion in enumerate(completions):
        answers[row, : len(completion.token_ids)] = torch.tensor(completion.token_ids)
    sequences = torch.cat([call.ids, answers.to(call.ids.device)], dim=1)
    if not call.as_dict:
        return sequences
    scores = logits = None
    if call.wants_scores or call.wants_logits:
        rows = score_rows(session, completions)
        own = [rows[completion.key] for completion in completions]
        logits = _by_step(own, longest) if call.wants_logits else None
        if call.wants_scores:
            answered = zip(call.requests, completions, own, strict=True)
            scores = _by_step([_processed(*one, session.numerics.threads) for one in answered], longest)
    return StableGenerateOutput(sequences=sequences, scores=scores, logits=logits, completions=completions)


def _processed(
    request: Request, completion: Completion, rows: Sequence[torch.Tensor], threads: int | None
) -> Sequence[torch.Tensor]:
    """Return an answer's processed score rows [V], without sampling noise."""
    if not request.params.processed:
        return rows
    with torch.inference_mode(), cpu_threads(threads):
        sampler = TokenSampler(request, rows[0].device, completion.token_ids)
        return [sampler.process(row, step)[1][0] for step, row in enumerate(rows)]


def _by_step(rows: Sequence[Sequence[torch.Tensor]], longest: int) -> tuple[torch.Tensor, ...]:
    """Return the rows [V] of each answer as one tensor [B, V] a step."""
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([own[step] if step < len(own) else nothing for own in rows]) for step in range(longest))
