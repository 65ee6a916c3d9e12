"""``client.generate``: a call of ``model.generate`` answered in kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from stablegen.core.answer import Completion
from stablegen.core.request import Request
from stablegen.engine.loading import load_transformers, torch_device
from stablegen.engine.sampling import Chooser
from stablegen.engine.transformers.decode import cpu_threads
from stablegen.errors import ParameterError, UnsupportedParameterError
from stablegen.hf.arguments import Call, resolve
from stablegen.hf.streaming import Stream
from stablegen.sources.checkpoint import Checkpoint
from stablegen.sources.live import LoadedModel

if TYPE_CHECKING:
    from stablegen.client import Client

UNSUPPORTED = ("raise", "passthrough")


@dataclass
class StableGenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers is untyped here
    """Transformers' output, with the completions (records, verdicts) of its rows."""

    completions: Sequence[Completion] | None = None


def generate(
    client: Client,
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
    Shorter answers are filled with the pad token, or the end token. ``scores`` and ``logits``, where asked for, are
    computed along the answers under the client's numerics; of rows that have ended they are 0.
    """
    if unsupported not in UNSUPPORTED:
        raise ParameterError(f"unsupported={unsupported!r}", accepted=", ".join(map(repr, UNSUPPORTED)))
    try:
        call = resolve(client, inputs, generation_config, seed, sample_index, dict(arguments))
    except UnsupportedParameterError as refusal:
        if unsupported == "raise":
            raise
        if seed is not None or sample_index:
            raise ParameterError(
                f"seed={seed!r:.40} for a call that is passed through: {refusal.problem}",
                hint="Leave the seed out, and call torch.manual_seed before",
            ) from refusal
        client.tell_once(f"{refusal.hint}", f"{refusal.problem}: transformers runs it as it is, and it is not cached")
        return transformers_model(client).generate(inputs, generation_config, **arguments)
    return _answer(client, call)


def _answer(client: Client, call: Call) -> torch.Tensor | StableGenerateOutput:
    stream = None if call.streamer is None else Stream(call)
    completions = client.run(call.requests, cached=call.seeded, listen=None if stream is None else stream.hear)
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
        rows = client.score_rows(completions)
        own = [rows[completion.key] for completion in completions]
        logits = _by_step(own, longest) if call.wants_logits else None
        if call.wants_scores:
            answered = zip(call.requests, completions, own, strict=True)
            scores = _by_step([_processed(*one, client.numerics.threads) for one in answered], longest)
    return StableGenerateOutput(sequences=sequences, scores=scores, logits=logits, completions=completions)


def _processed(
    request: Request, completion: Completion, rows: Sequence[torch.Tensor], threads: int | None
) -> Sequence[torch.Tensor]:
    """Return an answer's processed score rows [V]; noise is no part of them."""
    if not request.params.processed:
        return rows
    with torch.inference_mode(), cpu_threads(threads):
        chooser = Chooser(request, rows[0].device, completion.token_ids)
        return [chooser.process(row, step)[1][0] for step, row in enumerate(rows)]


def _by_step(rows: Sequence[Sequence[torch.Tensor]], longest: int) -> tuple[torch.Tensor, ...]:
    """Return the rows [V] of each answer as one tensor [B, V] a step."""
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([own[step] if step < len(own) else nothing for own in rows]) for step in range(longest))


def transformers_model(client: Client) -> Any:
    """Return the transformers model whose own ``generate`` a call is handed to."""
    source = client.source
    if isinstance(source, LoadedModel):
        return _Unwrapped(source.model)
    assert isinstance(source, Checkpoint)
    if client.passthrough is None:
        device = "cpu" if client.numerics.device == "cpu" else "cuda"
        client.passthrough = load_transformers(source, getattr(torch, client.numerics.dtype), torch_device(device))
    return client.passthrough


class _Unwrapped:
    """A model's own ``generate``, whatever stands in its place."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, *arguments: Any, **named: Any) -> Any:
        return type(self._model).generate(self._model, *arguments, **named)
