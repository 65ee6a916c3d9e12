"""Transformers' own logits processors for a request, and how a row of scores goes through them.

Those of sampling that leave tokens out, the *cuts*, come last: a row as it was before them tells how near a token was
to the edge of what is sampled from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from stablegen.core.params import GenerationParams
from stablegen.core.request import Request


@dataclass(frozen=True, slots=True)
class Processors:
    """A request's logits processors: those before the cuts, the cuts, and what follows them."""

    before: Sequence[Any]
    cuts: Sequence[Any]
    after: Sequence[Any]

    def __iter__(self) -> Iterator[Any]:
        """Yield all of them in order."""
        return chain(self.before, self.cuts, self.after)


def process(processors: Processors, ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores [1, V] float32 that follow ``ids`` [1, S] before they are cut, and as processed in the end.

    ``scores`` [V] float32 are the model's own. A row goes through alone, whatever runs beside it: the reductions inside
    processors (softmax, sums) would pick their order by the number of rows, and by where a row begins in memory.
    """
    row = scores[None].clone()  # memory of its own, aligned as torch aligns it
    with _OneOrder():
        for processor in processors.before:
            row = processor(ids, row)
        whole = row
        for processor in (*processors.cuts, *processors.after):
            row = processor(ids, row)
    return whole, row


class _OneOrder(TorchFunctionMode):
    """A context in which a CUDA device sums a row in one order.

    The order of torch's cumulative sum of a single row changes from run to run; that of two rows does not.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``; a cumulative sum of one row as one of that row twice."""
        kwargs = kwargs or {}
        if func in (torch.cumsum, torch.Tensor.cumsum) and args[0].is_cuda and args[0].shape[:-1].numel() == 1:
            row = args[0]
            return func(torch.cat([row, row]), *args[1:], **kwargs)[: len(row)]
        return func(*args, **kwargs)


def processors_for(request: Request, device: torch.device) -> Processors:
    """Return transformers' logits processors for a request, in transformers' order, the caller's own among them.

    One of the caller's takes the place of one of the same type; the others come before those of sampling.
    """
    from transformers.generation import LogitNormalization, TemperatureLogitsWarper

    made = _of_words(request, device) + _of_lengths(request, device)
    own = list(request.logits_processors)
    for place, processor in enumerate(made):
        same = next((index for index, other in enumerate(own) if type(other) is type(processor)), None)
        if same is not None:
            made[place] = own.pop(same)
    made += own
    params = request.params
    if params.do_sample and params.temperature != 1.0:
        made.append(TemperatureLogitsWarper(params.temperature))
    cuts, after = _cuts(params, device), [LogitNormalization()] if params.renormalize_logits else []
    if params.typical_p < 1.0:  # it leaves out the best tokens too, and so has no edge by score
        return Processors([*made, *cuts], [], after)
    return Processors(made, cuts, after)


def _ends(params: GenerationParams) -> tuple[int, ...]:
    known = params.processed_eos_token_ids
    return params.eos_token_ids if known is None else known


def _of_words(request: Request, device: torch.device) -> list[Any]:
    """Return the processors that favour, penalise or forbid tokens by the text before."""
    from transformers.generation import logits_process as hf

    params, prompt = request.params, torch.tensor([request.prompt_ids], device=device)
    made: list[Any] = []
    if params.sequence_bias:
        made.append(hf.SequenceBiasLogitsProcessor(dict(params.sequence_bias)))
    if params.encoder_repetition_penalty != 1.0:
        made.append(hf.EncoderRepetitionPenaltyLogitsProcessor(params.encoder_repetition_penalty, prompt))
    if params.repetition_penalty != 1.0:
        made.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.no_repeat_ngram_size:
        made.append(hf.NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.encoder_no_repeat_ngram_size:
        made.append(hf.EncoderNoRepeatNGramLogitsProcessor(params.encoder_no_repeat_ngram_size, prompt))
    words = [list(word) for word in params.bad_words_ids if word not in {(end,) for end in _ends(params)}]
    if words:
        made.append(hf.NoBadWordsLogitsProcessor(words))
    return made


def _of_lengths(request: Request, device: torch.device) -> list[Any]:
    """Return the processors that favour, force or forbid tokens by how long the answer is, or always."""
    from transformers.generation import logits_process as hf

    params, length, name = request.params, len(request.prompt_ids), str(device)
    ends = torch.tensor(_ends(params), dtype=torch.int64, device=device)
    made: list[Any] = []
    if params.min_new_tokens:
        made.append(hf.MinNewTokensLengthLogitsProcessor(length, params.min_new_tokens, ends, device=name))
    if params.forced_bos_token_id is not None:
        made.append(hf.ForcedBOSTokenLogitsProcessor(params.forced_bos_token_id))
    if params.forced_eos_token_ids:
        forced = list(params.forced_eos_token_ids)
        made.append(hf.ForcedEOSTokenLogitsProcessor(length + params.max_new_tokens, forced, device=name))
    if params.remove_invalid_values:
        made.append(hf.InfNanRemoveLogitsProcessor())
    if params.exponential_decay_length_penalty is not None:
        made.append(hf.ExponentialDecayLengthPenalty(params.exponential_decay_length_penalty, ends, length))
    if params.suppress_tokens:
        made.append(hf.SuppressTokensLogitsProcessor(list(params.suppress_tokens), device=name))
    if params.begin_suppress_tokens:
        begin = length if length > 1 or params.forced_bos_token_id is None else length + 1
        banned = list(params.begin_suppress_tokens)
        made.append(hf.SuppressTokensAtBeginLogitsProcessor(banned, begin, device=name))
    return made


def _cuts(params: GenerationParams, device: torch.device) -> list[Any]:
    """Return those of sampling that leave tokens out, in transformers' order."""
    from transformers.generation import logits_process as hf

    made: list[Any] = []
    if not params.do_sample:
        return made
    if params.top_h is not None:
        made.append(hf.TopHLogitsWarper(params.top_h))
    if params.top_k:
        made.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        made.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        made.append(hf.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1.0:
        made.append(hf.TypicalLogitsWarper(params.typical_p))
    if params.epsilon_cutoff:
        made.append(hf.EpsilonLogitsWarper(params.epsilon_cutoff))
    if params.eta_cutoff:
        made.append(hf.EtaLogitsWarper(params.eta_cutoff, device=str(device)))
    return made
