"""Choosing tokens from processed scores, with Gumbel noise where they are sampled.

Each row is processed alone; what follows is exact or elementwise, and is done for all rows at once.

What a step's trace keeps of a sampled token: ``scores`` is its processed score, ``runner_up_scores`` is that less the
margin. The margin is how far the scores would have to move for another token to win: by how much the best sum of score
and noise is ahead of the next, or, where that is less, how near a token that would have won was to the edge of what is
sampled from (``top_k``, ``top_p``, ...), or the winner to falling behind it. So margins mean the same as in greedy
decoding, and the size of the scores, by which the guard measures what numerics can do to them, is that of the scores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stablegen.core.params import ENDING
from stablegen.core.policy import Batch
from stablegen.core.request import Request
from stablegen.engine.base import NO_ANSWERS, Answers
from stablegen.engine.cuda_graph import Recorder, new_stream
from stablegen.engine.processors import process, processors_for
from stablegen.kernels.base import RowSummary
from stablegen.kernels.reference import summarise_rows, top2_ids
from stablegen.kernels.sampling import gumbel, state_of

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a graph; more rows are sampled in parts."""
RECORDED = 16
"""Graphs kept at most; the one unused for longest makes way."""
STREAMS = 8
"""Rows that a graph processes side by side."""
_MIXED = -0x61C8864680B583EB
"""An odd number: a hash of processed scores is multiplied by it before that of the model's own scores is added."""
_RECORDABLE = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "renormalize_logits")
"""Parameters whose processing reads nothing but a row of scores and waits for nothing: it can be recorded."""
_PLAIN = frozenset({*_RECORDABLE, *ENDING, "do_sample", "seed", "sample_index"})


class TokenSampler:
    """Chooses one request's tokens.

    ``answer``: token ids that come after the prompt, whatever is chosen. ``begun``: token ids that were chosen before.
    """

    def __init__(
        self, request: Request, device: torch.device, answer: Sequence[int] = (), begun: Sequence[int] = ()
    ) -> None:
        params = request.params
        self.request = request
        self.processors = processors_for(request, device)
        plain = params.changed <= _PLAIN
        self.graph_key: tuple[Any, ...] | None = None
        """Equal in rows whose sampling one graph can replay; None where no graph can."""
        if plain and params.do_sample:
            self.graph_key = tuple(getattr(params, name) for name in _RECORDABLE)
        self._teacher_forced = bool(answer)
        self._length = len(request.prompt_ids)
        self._ids = torch.zeros(1, 0, dtype=torch.int64, device=device)
        if not plain:
            ids = torch.zeros(1, self._length + params.max_new_tokens, dtype=torch.int64)
            known = (*request.prompt_ids, *answer, *begun)[: ids.shape[1]]
            ids[0, : len(known)] = torch.tensor(known)
            self._ids = ids.to(device)

    def process(self, scores: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a step's scores [1, V] float32 before they are cut and in the end, of the model's own [V] float32."""
        return process(self.processors, self._ids[:, : self._length + step], scores)

    def state(self, step: int) -> int | None:
        """Return the state from which a step's random numbers are drawn; None where nothing is drawn."""
        params = self.request.params
        if not params.do_sample:
            return None
        assert params.seed is not None, "intake gives every sampled request a seed"
        return state_of(params.seed, params.sample_index, step)

    def remember(self, step: int, token: torch.Tensor) -> None:
        """Remember the token that a step chose, a number on the device, for processors that look back."""
        if not self._teacher_forced and self._ids.shape[1]:
            self._ids[0, self._length + step] = token


class GraphedSampler:
    """Samples for any rows; on CUDA, rows with equal graph keys are processed by replaying one graph.

    ``graphs``: whether graphs are recorded; it moves no bit.
    """

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        self._device = device
        self._recorder = Recorder(device, enabled=graphs)
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._streams: list[torch.cuda.Stream] = []

    def sample(
        self,
        samplers: Sequence[TokenSampler],
        scores: torch.Tensor,  # [R, V] float32, the model's own
        steps: Sequence[int],
        hashes: torch.Tensor,  # [R] int64, of the model's own scores
    ) -> RowSummary:
        """Return what each of R samplers chooses at its step, without waiting for the device."""
        if not self._recorder.enabled:
            return sample(samplers, scores, steps, hashes)
        groups: dict[Any, list[int]] = {}
        for row, sampler in enumerate(samplers):
            groups.setdefault(sampler.graph_key, []).append(row)
        parts = [
            (key, rows[start : start + ROWS[-1]])
            for key, rows in groups.items()
            for start in range(0, len(rows), ROWS[-1])
        ]
        made = []
        for key, rows in parts:
            own = [samplers[row] for row in rows], [steps[row] for row in rows]
            if len(parts) == 1:
                given = scores, hashes
            else:
                at = upload(rows, self._device)
                given = scores[at], hashes[at]
            make = sample if key is None else self._replay
            made.append(make(own[0], given[0], own[1], given[1]))
        if len(made) == 1:
            return made[0]
        places = sorted(range(len(samplers)), key=[row for _, rows in parts for row in rows].__getitem__)
        order = upload(places, self._device)
        columns = zip(*(_columns(summary) for summary in made), strict=True)
        return RowSummary(*(torch.cat(column)[order] for column in columns))

    def close(self) -> None:
        """Release its graphs and their memory."""
        self._recorded.clear()
        self._streams.clear()
        self._recorder = Recorder(self._device, enabled=self._recorder.enabled)

    def _replay(
        self, samplers: Sequence[TokenSampler], scores: torch.Tensor, steps: Sequence[int], hashes: torch.Tensor
    ) -> RowSummary:
        count, vocabulary = scores.shape
        size = next(rows for rows in ROWS if rows >= count)
        key = samplers[0].graph_key, size, vocabulary
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._record(samplers[0], size, vocabulary)
            if recorded is None:
                return sample(samplers, scores, steps, hashes)
            self._recorded[key] = recorded
            if len(self._recorded) > RECORDED:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        states = [sampler.state(step) or 0 for sampler, step in zip(samplers, steps, strict=True)]
        recorded.scores[:count].copy_(scores)
        recorded.hashes[:count].copy_(hashes)
        recorded.states[:count].copy_(upload(states, self._device))
        recorded.graph.replay()
        return RowSummary(*(column[:count].clone() for column in _columns(recorded.summary)))

    def _record(self, sampler: TokenSampler, size: int, vocabulary: int) -> _Recorded | None:
        """Return a graph for rows with the sampler's key, recorded after a run that loads what it launches."""
        with torch.inference_mode(False):  # made in inference mode, it could not be written to in any other
            scores = torch.zeros(size, vocabulary, device=self._device)
            states, hashes = torch.zeros(2, size, dtype=torch.int64, device=self._device)
        if not self._streams:
            self._streams = [new_stream(self._device) for _ in range(STREAMS)]
        run = partial(self._run, sampler, scores, states, hashes)
        run()
        made = self._recorder.record(run)
        return None if made is None else _Recorded(made[0], scores, states, hashes, made[1])

    def _run(
        self, sampler: TokenSampler, scores: torch.Tensor, states: torch.Tensor, hashes: torch.Tensor
    ) -> RowSummary:
        current = torch.cuda.current_stream(self._device)
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for stream in self._streams:
            stream.wait_stream(current)
        for place, row in enumerate(scores):
            with torch.cuda.stream(self._streams[place % STREAMS]):
                rows.append(sampler.process(row, 0))
        for stream in self._streams:
            current.wait_stream(stream)
        whole, processed = (torch.cat(column) for column in zip(*rows, strict=True))
        return _summarise(whole, processed, gumbel(states, scores.shape[1]), scores, hashes)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph for rows of one key: what it reads when it is replayed, and where it puts its results."""

    graph: torch.cuda.CUDAGraph
    scores: torch.Tensor
    states: torch.Tensor
    hashes: torch.Tensor
    summary: RowSummary


class BatchSampler:
    """The token samplers of a batch by slot; rows without one take the best token of the model's own scores.

    ``answers``: of requests that are teacher-forced, the token ids of their answers.
    """

    def __init__(
        self, batch: Batch, device: torch.device, sampler: GraphedSampler, answers: Answers = NO_ANSWERS
    ) -> None:
        self._sampler = sampler
        self._by_slot: Mapping[int | None, TokenSampler] = {
            slot: TokenSampler(request, device, answers.get(request, ()))
            for slot, request in batch.requests
            if request.params.processed
        }

    def __bool__(self) -> bool:
        return bool(self._by_slot)

    def refine(self, summary: RowSummary, scores: torch.Tensor, slots: Sequence[int | None], step: int) -> RowSummary:
        """Return the ``summary`` of M rows of ``scores`` [M, V] with what the slots' own samplers choose instead."""
        found = {place: self._by_slot[slot] for place, slot in enumerate(slots) if slot in self._by_slot}
        if not found:
            return summary
        places, samplers = list(found), list(found.values())
        steps = [step] * len(places)
        if len(places) == len(slots):
            return self._sampler.sample(samplers, scores, steps, summary.hashes)
        at = upload(places, scores.device)
        chosen = self._sampler.sample(samplers, scores[at], steps, summary.hashes[at])
        columns = zip(_columns(summary), _columns(chosen), strict=True)
        return RowSummary(*(column.index_copy(0, at, other) for column, other in columns))


def sample(
    samplers: Sequence[TokenSampler],
    scores: torch.Tensor,  # [R, V] float32, the model's own
    steps: Sequence[int],
    hashes: torch.Tensor,  # [R] int64, of the model's own scores
) -> RowSummary:
    """Return what each of R samplers chooses at its step, one launch after the other."""
    rows = [sampler.process(row, step) for sampler, row, step in zip(samplers, scores, steps, strict=True)]
    whole, processed = (torch.cat(column) for column in zip(*rows, strict=True))
    states = [sampler.state(step) for sampler, step in zip(samplers, steps, strict=True)]
    drawn = {row: state for row, state in enumerate(states) if state is not None}
    noise = None
    if drawn:
        noise = gumbel(upload(list(drawn.values()), scores.device), scores.shape[1])
        if len(drawn) < len(samplers):
            nothing = torch.zeros(scores.shape, dtype=noise.dtype, device=noise.device)
            noise = nothing.index_copy_(0, upload(list(drawn), scores.device), noise)
    summary = _summarise(whole, processed, noise, scores, hashes)
    tolerant = [sampler.request.params.remove_invalid_values for sampler in samplers]
    if any(tolerant):
        sound = summary.finite | (upload(tolerant, scores.device) & torch.isfinite(summary.scores[:, 0]))
        summary = RowSummary(summary.tokens, summary.scores, summary.hashes, sound)
    for sampler, step, token in zip(samplers, steps, summary.tokens[:, 0], strict=True):
        sampler.remember(step, token)
    return summary


def _summarise(
    whole: torch.Tensor,  # [R, V] float32, before the cuts
    processed: torch.Tensor,  # [R, V] float32
    noise: torch.Tensor | None,  # [R, V] float64, 0 in rows that are not sampled; None where none is
    scores: torch.Tensor,  # [R, V] float32, the model's own
    hashes: torch.Tensor,  # [R] int64
) -> RowSummary:
    ranked = processed.double() if noise is None else processed.double() + noise
    tokens = top2_ids(ranked)
    winner, runner_up = processed.gather(1, tokens).unbind(1)
    if noise is not None:
        first, second = ranked.gather(1, tokens).unbind(1)
        rival, entering, leaving = _edge(whole, processed, noise, tokens[:, :1], first)
        margin = torch.minimum(first - second, torch.minimum(entering, leaving))
        by_margin = (winner.double() - margin).float()
        # a greedy row keeps its runner-up's own score, which this would be but for a rounding
        runner_up = torch.where((noise == 0.0).all(1), runner_up, by_margin)
        takes_over = ((entering < first - second) & (entering <= leaving)) | torch.isneginf(second)
        takes_over &= torch.isfinite(torch.minimum(entering, leaving))
        tokens = torch.stack([tokens[:, 0], torch.where(takes_over, rival, tokens[:, 1])], dim=1)
    return RowSummary(
        tokens=tokens,
        scores=torch.stack([winner, runner_up], dim=1) + 0.0,
        hashes=hashes + summarise_rows(processed).hashes * _MIXED,
        finite=torch.isfinite(scores).all(1) & torch.isfinite(winner) & ~processed.isnan().any(1),
    )


def _edge(
    whole: torch.Tensor, processed: torch.Tensor, noise: torch.Tensor, winner: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a rival among those left out, its distance to winning, and the winner's to being left out, [R] each.

    To win, a token left out must be kept and have the best sum of score and noise; the rival is nearest to both. Where
    the winner is nearer to falling behind the edge, it is the best of those left out. ``winner`` [R, 1] are token ids,
    ``first`` [R] their sums. Distances are float64, infinite where there is no such token.
    """
    left_out = torch.isneginf(processed) & torch.isfinite(whole)
    last_kept = whole.masked_fill(~torch.isfinite(processed), torch.inf).amin(1, keepdim=True)
    first_left_out = whole.masked_fill(~left_out, -torch.inf).amax(1, keepdim=True)
    own = whole.gather(1, winner)
    shift = processed.gather(1, winner).double() - own  # normalization takes the same from every score
    behind = first[:, None] - (whole.double() + shift + noise)
    missing = torch.maximum((last_kept - whole).double(), behind).clamp(min=0.0).masked_fill(~left_out, torch.inf)
    entering = missing.amin(1, keepdim=True)
    leaving = (own - first_left_out).double().clamp(min=0.0)
    index = torch.arange(whole.shape[1], device=whole.device)
    nearest = torch.where(entering <= leaving, missing == entering, left_out & (whole == first_left_out))
    rival = torch.where(nearest, index, whole.shape[1]).amin(1).clamp(max=whole.shape[1] - 1)
    return rival, entering[:, 0], leaving[:, 0]


def upload(values: Sequence[int] | Sequence[bool], device: torch.device) -> torch.Tensor:
    """Return numbers or truths [R] on the device, without waiting for what it has to do."""
    listed = torch.tensor(values)
    return listed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else listed


def _columns(summary: RowSummary) -> tuple[torch.Tensor, ...]:
    return summary.tokens, summary.scores, summary.hashes, summary.finite
