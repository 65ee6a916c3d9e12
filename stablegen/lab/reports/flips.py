"""What the experiment on flipped answers found."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field

from stablegen.core.frozen import Frozen
from stablegen.lab.reports.machine import Machine
from stablegen.lab.reports.wording import Cell, Form

Cause = Literal["batch size", "padding", "missing mask", "mixed lengths"]
MISTAKE: Cause = "missing mask"
"""The cause that is no rounding error but a mistake of the caller."""
CAUSES: dict[Cause, str] = {
    "batch size": "rows of equal length without padding: only the number of rows changes",
    "padding": "the number of rows is fixed: the prompt is padded on the left, with its mask",
    "missing mask": "the same padding without a mask: the model reads it as text, a mistake and not a rounding error",
    "mixed lengths": "other prompts at their own lengths, padded to the longest, with their mask: both causes at once",
}
MEANING = (
    "Where two tokens nearly tie, a rounding error decides between them, and every later token differs. Batch size and "
    "padding may each move the scores by rounding errors; a missing mask gives the model another text, which is a "
    "mistake of the caller."
)


class Candidate(Frozen):
    """A token and its score, float32."""

    token: int
    text: str
    score: float


class Flip(Frozen):
    """The first step of a trial at which another token has the highest score, with both tables of best tokens.

    ``margin``: the baseline's best score minus its second; ``setting`` as in ``Trial``.
    """

    cause: Cause
    setting: int
    step: int
    margin: float
    baseline: tuple[Candidate, ...]
    other: tuple[Candidate, ...]

    @property
    def batch(self) -> str:
        """Return in words in which batch it was seen."""
        return f"{self.cause} {self.setting}"


class Trial(Frozen):
    """One prompt in one batch, teacher-forced along the baseline's answer.

    ``setting``: the rows of the batch or, for ``padding`` and ``missing mask``, the tokens of padding. ``moved``: steps
    whose score row has other bits; ``largest``: the largest difference of a score; ``flips``: the steps that flip.
    """

    cause: Cause
    setting: int
    moved: int
    largest: float
    flips: tuple[int, ...]

    @property
    def batch(self) -> str:
        """Return in words which batch it was."""
        return f"{self.cause} {self.setting}"


class PromptFlips(Frozen):
    """What happened to one prompt: ``length`` of the prompt and ``steps`` of its answer in tokens.

    ``shown``: for each cause, the first flip of the first trial that has one.
    """

    prompt: str
    length: int
    answer: str
    steps: int
    trials: tuple[Trial, ...]
    shown: tuple[Flip, ...]


class Total(Frozen):
    """All prompts in one setting: how many flipped, and how many of their steps moved and flipped."""

    cause: Cause
    setting: int
    prompts: int
    flipped: int
    steps: int
    moved_steps: int
    flipped_steps: int
    largest: float

    def cells(self, form: Form) -> tuple[Cell, ...]:
        """Return its cells of a table: see ``TOTAL_HEAD``."""
        return (
            _share(self.flipped, self.prompts),
            Cell(f"{self.flipped_steps:,} of {self.steps:,}"),
            _share(self.moved_steps, self.steps),
            Cell(form(self.largest)),
        )


TOTAL_HEAD = ("cause", "rows or padding", "prompts that flip", "steps that flip", "score rows moved", "by at most")


class PolicyTotal(Frozen):
    """All prompts among prompts of other lengths under one policy: one batch size against the baseline's."""

    policy: str
    batch: int
    prompts: int
    flipped: int
    steps: int
    moved_steps: int

    def cells(self) -> tuple[Cell, ...]:
        """Return its cells of a table: see ``POLICY_HEAD``."""
        return _share(self.flipped, self.prompts), _share(self.moved_steps, self.steps)


POLICY_HEAD = ("policy", "rows", "prompts that flip", "score rows moved")


def _share(count: int, of: int) -> Cell:
    return Cell(f"{count:,} of {of:,}", moved=count > 0)


class DtypeFlips(Frozen):
    """What was found in one dtype: prompt by prompt under the control policy, in all under the others.

    ``notes``: what a reader must know about a policy's figures.
    """

    dtype: str
    prompts: tuple[PromptFlips, ...]
    policies: tuple[PolicyTotal, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def totals(self) -> list[Total]:
        """Return the totals by cause and setting."""
        causes = list(CAUSES)
        trials: dict[tuple[Cause, int], list[tuple[PromptFlips, Trial]]] = {}
        for one in self.prompts:
            for trial in one.trials:
                trials.setdefault((trial.cause, trial.setting), []).append((one, trial))
        return [
            Total(
                cause=cause,
                setting=setting,
                prompts=len(found),
                flipped=sum(bool(trial.flips) for _, trial in found),
                steps=sum(one.steps for one, _ in found),
                moved_steps=sum(trial.moved for _, trial in found),
                flipped_steps=sum(len(trial.flips) for _, trial in found),
                largest=max(trial.largest for _, trial in found),
            )
            for (cause, setting), found in sorted(
                trials.items(), key=lambda item: (causes.index(item[0][0]), item[0][1])
            )
        ]

    def widest(self, most: int = 2) -> list[tuple[str, Flip]]:
        """Return ``most`` prompts that flip by rounding, those of the widest margins, each with its first flip."""
        flips = [(one.prompt, flip) for one in self.prompts for flip in one.shown[:1] if flip.cause != MISTAKE]
        return sorted(flips, key=lambda pair: -pair[1].margin)[:most]


class FlipsReport(Frozen):
    """What the experiment found; ``tokens``: the length limit of an answer, ``baseline``: rows of the reference batch.

    ``control`` is the policy under which the causes were told apart. ``skipped``: prompts that were left out;
    ``unavailable``: policies under which the model cannot run. Both say why.
    """

    model: str
    machine: Machine
    control: str
    baseline: int
    tokens: int
    skipped: tuple[str, ...]
    dtypes: tuple[DtypeFlips, ...]
    unavailable: dict[str, str] = Field(default_factory=dict)
    seconds: float

    @property
    def meaning(self) -> str:
        """Return in words what was found."""
        totals = [total for one in self.dtypes for total in one.policies]
        if not totals:
            return MEANING
        names = ", ".join(dict.fromkeys(total.policy for total in totals))
        moved, steps = sum(total.moved_steps for total in totals), sum(total.steps for total in totals)
        return f"{MEANING} Under {names}, {moved:,} of {steps:,} score rows moved."
