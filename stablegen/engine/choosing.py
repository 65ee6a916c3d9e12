"""Choosing tokens from processed scores: transformers' own logits processors, a row at a time, and Gumbel noise.

A row is processed alone, [1, V], whatever runs beside it: the reductions inside processors (softmax, sums) would pick
their order by the number of rows and by where a row begins in memory. What follows is exact or elementwise, and is done
for all rows at once.

What a step's trace keeps of a sampled token: ``scores`` is its processed score as it stands, ``runner_up_scores`` is
that less the margin by which it won, the noise included. So a margin is a margin, and the size of the scores, by which
the guard measures what numerics can do to it, is that of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from stablegen.engine.base import Follow
from stablegen.kernels.base import BestTwo
from stablegen.kernels.reference import best_two, two_best
from stablegen.kernels.sampling import gumbel, state_of
from stablegen.params import GenerationParams
from stablegen.policy import Batch
from stablegen.request import Request

_MIXED = -0x61C8864680B583EB
"""Odd: what a hash of processed scores is multiplied by before that of the model's own is added."""


class Chooser:
    """Chooses one request's tokens; ``answer``: token ids that come after the prompt, whatever is chosen.

    ``begun``: token ids that were chosen before.
    """

    def __init__(
        self, request: Request, device: torch.device, answer: Sequence[int] = (), begun: Sequence[int] = ()
    ) -> None:
        self.request = request
        self._given = bool(answer)
        self._length = len(request.prompt_ids)
        ids = torch.zeros(1, self._length + request.params.max_new_tokens, dtype=torch.int64)
        known = (*request.prompt_ids, *answer, *begun)[: ids.shape[1]]
        ids[0, : len(known)] = torch.tensor(known)
        self._ids = ids.to(device)
        self._processors = processors_for(request, device)
        params = request.params
        self.states: torch.Tensor | None = None
        """Of each step, what its random numbers are drawn from, [steps] int64; None where nothing is drawn."""
        if params.do_sample:
            assert params.seed is not None, "a request without a seed was given one at the door"
            states = [state_of(params.seed, params.sample_index, step) for step in range(params.max_new_tokens)]
            self.states = torch.tensor(states, dtype=torch.int64).to(device)

    def process(self, scores: torch.Tensor, step: int) -> torch.Tensor:
        """Return the processed scores [1, V] float32 of a step, of the model's own [V] float32."""
        ids = self._ids[:, : self._length + step]
        with _OneOrder():
            row = scores[None].clone()  # memory of its own, which begins at a boundary
            for processor in self._processors:
                row = processor(ids, row)
        return row

    def took(self, step: int, token: torch.Tensor) -> None:
        """Remember the token that a step chose, a number on the device."""
        if not self._given:
            self._ids[0, self._length + step] = token


class Choosers:
    """Those of a batch, by slot; rows without one take the best of the model's own scores."""

    def __init__(self, batch: Batch, device: torch.device, follow: Follow | None = None) -> None:
        answers = follow or {}
        self._by_slot: Mapping[int | None, Chooser] = {
            slot: Chooser(request, device, answers.get(slot, ()))
            for slot, request in batch.requests
            if request.params.processed
        }

    def __bool__(self) -> bool:
        return bool(self._by_slot)

    def refine(self, best: BestTwo, scores: torch.Tensor, slots: Sequence[int | None], step: int) -> BestTwo:
        """Return ``best`` [M] of scores [M, V] with what the slots' own choosers choose in its place."""
        found = {place: self._by_slot[slot] for place, slot in enumerate(slots) if slot in self._by_slot}
        if not found:
            return best
        places, choosers = list(found), list(found.values())
        steps = [step] * len(places)
        if len(places) == len(slots):
            return choose(choosers, scores, steps, best.hashes)
        at = upload(places, scores.device)
        chosen = choose(choosers, scores[at], steps, best.hashes[at])
        return BestTwo(
            best.tokens.index_copy(0, at, chosen.tokens),
            best.scores.index_copy(0, at, chosen.scores),
            best.hashes.index_copy(0, at, chosen.hashes),
            best.finite.index_copy(0, at, chosen.finite),
        )


def choose(
    choosers: Sequence[Chooser],
    scores: torch.Tensor,  # [R, V] float32, the model's own
    steps: Sequence[int],
    hashes: torch.Tensor,  # [R] int64, of the model's own scores
) -> BestTwo:
    """Return what each of R choosers chooses at its step; nothing waits for the device."""
    processed = torch.cat(
        [chooser.process(row, step) for chooser, row, step in zip(choosers, scores, steps, strict=True)]
    )
    ranked, drawn = processed.double(), [chooser.states is not None for chooser in choosers]
    if any(drawn):
        states = [chooser.states for chooser in choosers if chooser.states is not None]
        own = [step for step, chooser in zip(steps, choosers, strict=True) if chooser.states is not None]
        noise = gumbel(torch.stack([row[step] for row, step in zip(states, own, strict=True)]), scores.shape[1])
        if all(drawn):
            ranked += noise
        else:
            ranked.index_add_(0, upload([row for row, draws in enumerate(drawn) if draws], scores.device), noise)
    tokens = two_best(ranked)
    for chooser, step, token in zip(choosers, steps, tokens[:, 0], strict=True):
        chooser.took(step, token)
    margins = ranked.gather(1, tokens)
    kept = processed.gather(1, tokens)
    winner, runner_up = kept.unbind(1)
    if any(drawn):
        margin = margins[:, 0] - margins[:, 1]
        by_margin = (winner.double() - margin).float()
        runner_up = by_margin if all(drawn) else torch.where(upload(drawn, scores.device), by_margin, runner_up)
    sound = torch.isfinite(scores).all(1)
    tolerant = [chooser.request.params.remove_invalid_values for chooser in choosers]
    if any(tolerant):
        sound = sound | upload(tolerant, scores.device)
    return BestTwo(
        tokens=tokens,
        scores=torch.stack([winner, runner_up], dim=1) + 0.0,
        hashes=hashes + best_two(processed).hashes * _MIXED,
        finite=sound & torch.isfinite(winner) & ~processed.isnan().any(1),
    )


def upload(values: Sequence[int] | Sequence[bool], device: torch.device) -> torch.Tensor:
    """Return numbers or truths [R] on the device, without waiting for what it has to do."""
    listed = torch.tensor(values)
    return listed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else listed


class _OneOrder(TorchFunctionMode):
    """A context in which a CUDA device adds a row up in one order.

    Of a single row torch makes a cumulative sum whose order changes from run to run; of two it does not.
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


def processors_for(request: Request, device: torch.device) -> list[Any]:
    """Return transformers' logits processors for a request, in transformers' order, the caller's own among them.

    One of the caller's takes the place of one of the same type; the others stand before those of sampling.
    """
    from transformers.generation import LogitNormalization

    made = _of_words(request, device) + _of_lengths(request, device)
    own = {type(processor): processor for processor in request.logits_processors}
    made = [own.pop(type(processor), processor) for processor in made]
    made += [processor for processor in request.logits_processors if type(processor) in own]
    made += _warpers(request.params, device)
    return [*made, LogitNormalization()] if request.params.renormalize_logits else made


def _of_words(request: Request, device: torch.device) -> list[Any]:
    """Return the processors that favour, penalise or forbid tokens by what was said before."""
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
    words = [list(word) for word in params.bad_words_ids if word not in {(end,) for end in params.eos_token_ids}]
    if words:
        made.append(hf.NoBadWordsLogitsProcessor(words))
    return made


def _of_lengths(request: Request, device: torch.device) -> list[Any]:
    """Return the processors that favour, force or forbid tokens by how long the answer is, or always."""
    from transformers.generation import logits_process as hf

    params, length, name = request.params, len(request.prompt_ids), str(device)
    ends = torch.tensor(params.eos_token_ids, dtype=torch.int64, device=device)
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


def _warpers(params: GenerationParams, device: torch.device) -> list[Any]:
    """Return those that only sampling has, in transformers' order."""
    from transformers.generation import logits_process as hf

    made: list[Any] = []
    if not params.do_sample:
        return made
    if params.temperature != 1.0:
        made.append(hf.TemperatureLogitsWarper(params.temperature))
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
