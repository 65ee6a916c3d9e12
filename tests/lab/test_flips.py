"""Answers that flip: the causes told apart, and that none flips under the policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import TINY, save, small_llama

from stablegen.core.policy import policy_forms
from stablegen.errors import DeviceError, ParameterError, PolicyError
from stablegen.lab import flips
from stablegen.lab.flip_batches import Batches, Needle, own_prompts
from stablegen.lab.reports.flips import Candidate, DtypeFlips, Flip, FlipsReport, PromptFlips, Trial
from stablegen.machine.plan import find_device
from stablegen.sources.checkpoint import CheckpointSource


def test_there_are_103_prompts_and_the_articles_comes_first() -> None:
    prompts = own_prompts()
    assert len(prompts) == len(set(prompts)) == 103
    assert prompts[0] == "Tell me about yourself.\nanswer : "


def test_the_causes_are_told_apart(flipped: FlipsReport) -> None:
    (found,) = flipped.dtypes
    totals = {(total.cause, total.setting): total for total in found.totals}
    assert list(totals) == [
        *(("batch size", rows) for rows in (1, 3)),
        *(("padding", pad) for pad in (1, 16)),
        *(("missing mask", pad) for pad in (1, 16)),
        *(("mixed lengths", rows) for rows in (1, 3)),
    ]
    assert {(total.prompts, total.steps) for total in totals.values()} == {(3, 30)}
    # another text moves scores by more than any rounding, at every step
    mistake, rounding = totals["missing mask", 16], totals["padding", 16]
    assert mistake.flipped == 3
    assert mistake.moved_steps == mistake.steps
    assert mistake.largest > 4 * rounding.largest
    assert rounding.moved_steps or totals["padding", 1].moved_steps  # the control differs


def test_the_policies_move_nothing(flipped: FlipsReport) -> None:
    (found,) = flipped.dtypes
    assert [(one.policy, one.batch) for one in found.policies] == [
        (policy, batch) for policy in ("single", "padded:4", "invariant") for batch in (1, 3)
    ]
    assert {(one.steps, one.flipped, one.moved_steps) for one in found.policies} == {(30, 0, 0)}
    assert "0 of 180 score rows moved" in flipped.meaning
    assert flipped.control == "native"


def test_the_policies_move_nothing_in_bfloat16(small_model: str) -> None:
    found = flips.measure(
        model=small_model, dtypes=("bfloat16",), batches=(1, 2, 3), pads=(), tokens=4, count=2, device="cpu"
    )
    assert [one.policy for one in found.dtypes[0].policies[::2]] == ["single", "padded:8", "invariant"]
    assert {(one.steps, one.flipped, one.moved_steps) for one in found.dtypes[0].policies} == {(8, 0, 0)}


def test_a_trained_model_moves_by_rounding_in_bfloat16() -> None:
    report = flips.measure(
        dtypes=("bfloat16",), batches=(1, 2), pads=(1, 16), tokens=8, count=1, policies=(), device="cpu"
    )
    (found,) = report.dtypes
    totals = {(total.cause, total.setting): total for total in found.totals}
    assert totals["padding", 16].moved_steps or totals["padding", 1].moved_steps
    assert totals["missing mask", 16].largest > 4 * totals["padding", 16].largest
    assert totals["missing mask", 16].moved_steps == totals["missing mask", 16].steps


def test_a_flip_is_shown_with_its_two_tables(flipped: FlipsReport) -> None:
    shown = [(prompt, flip) for prompt in flipped.dtypes[0].prompts for flip in prompt.shown]
    assert len(shown) >= 3
    assert len({(prompt.prompt, flip.cause) for prompt, flip in shown}) == len(shown)
    for prompt, flip in shown:
        trial = next(one for one in prompt.trials if (one.cause, one.setting) == (flip.cause, flip.setting))
        assert flip.step == trial.flips[0]
        assert len(flip.baseline) == len(flip.other) == flips.TOP
        assert flip.baseline[0].token != flip.other[0].token
        for table in (flip.baseline, flip.other):
            scores = [one.score for one in table]
            assert scores == sorted(scores, reverse=True)
        assert flip.margin == pytest.approx(flip.baseline[0].score - flip.baseline[1].score)


def test_the_widest_flips_by_rounding_come_first() -> None:
    table = (Candidate(token=1, text="a", score=1.0), Candidate(token=2, text="b", score=0.5))

    def prompt(name: str, cause: Any, margin: float) -> PromptFlips:
        flip = Flip(cause=cause, setting=2, step=0, margin=margin, baseline=table, other=table[::-1])
        trial = Trial(cause=cause, setting=2, moved=1, largest=1.0, flips=(0,))
        return PromptFlips(prompt=name, length=3, answer="", steps=1, trials=(trial,), shown=(flip,))

    prompts = (prompt("narrow", "padding", 0.1), prompt("mistake", "missing mask", 9.0))
    found = DtypeFlips(dtype="float32", prompts=(*prompts, prompt("wide", "batch size", 0.3)), policies=())
    assert [(name, flip.batch) for name, flip in found.widest()] == [("wide", "batch size 2"), ("narrow", "padding 2")]


def test_a_trial_is_teacher_forced_along_the_baselines_tokens(
    monkeypatch: pytest.MonkeyPatch, small_model: str
) -> None:
    """A step that flips does not change later ones: the same tokens precede every step."""
    followed: list[tuple[Any, tuple[int, ...]]] = []
    real = flips._Control._run

    def watched(self: Any, requests: Any, answer: Any = None) -> Any:
        found = real(self, requests, answer)
        followed.append((answer, found.trace.tokens))
        return found

    monkeypatch.setattr(flips._Control, "_run", watched)
    flips.measure(
        model=small_model,
        dtypes=("float32",),
        batches=(1, 2),
        pads=(8,),
        tokens=6,
        count=1,
        policies=(),
        device="cpu",
    )
    free = [tokens for answer, tokens in followed if answer is None]
    forced = [(answer, tokens) for answer, tokens in followed if answer is not None]
    assert (len(free), len(forced)) == (2, 4)
    assert all(len(tokens) == len(answer) and answer in free for answer, tokens in forced)


@pytest.fixture(scope="module")
def set_up() -> tuple[Batches, Needle]:
    found = Batches(CheckpointSource.open(str(TINY)), find_device("cpu", "float32"), 4, 2, (2, 3), (8,))
    (needle,), skipped = found.needles(["Hello there"], None)
    assert not skipped
    return found, needle


def test_the_mistake_is_padding_read_as_text(set_up: tuple[Batches, Needle]) -> None:
    found, needle = set_up
    batches = {(cause, setting): requests for cause, setting, requests in found.trials(needle)}
    padded, mistaken = batches["padding", 8], batches["missing mask", 8]
    assert padded[0].prompt_ids == needle.ids
    assert mistaken[0].prompt_ids == (0,) * 8 + needle.ids
    assert {len(request.prompt_ids) for request in mistaken} == {len(needle.ids) + 8}
    assert len(padded) == len(mistaken) == 2
    assert {len(request.prompt_ids) for request in batches["batch size", 3]} == {len(needle.ids)}


def test_a_lone_prompt_has_stablegens_own_beside_it(set_up: tuple[Batches, Needle]) -> None:
    found, needle = set_up
    assert len(needle.others) == 103
    requests = found.mixed(needle, 5, 2)
    assert [request.prompt_ids for request in requests] == [needle.ids, *needle.others[:4]]
    assert [request.params.max_new_tokens for request in requests] == [4, 2, 2, 2, 2]


def test_prompts_that_do_not_fit_are_left_out_and_named(small_model: str) -> None:
    found = flips.measure(
        model=small_model,
        dtypes=("float32",),
        batches=(1,),
        pads=(),
        tokens=2,
        prompts=["word " * 400, "short"],
        policies=(),
        device="cpu",
    )
    assert [one.prompt for one in found.dtypes[0].prompts] == ["short"]
    assert "tokens, from 1 to 254 fit" in found.skipped[0]


def test_a_model_that_a_policy_does_not_run_is_measured_without_it(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": str(save(small_llama(), tmp_path)), "dtypes": ("float32",), "batches": (1, 2)}
    asked |= {"pads": (), "tokens": 2, "count": 1, "device": "cpu"}
    found = flips.measure(**asked)
    assert {one.policy for one in found.dtypes[0].policies} == {"single", "padded:8"}
    assert set(found.unavailable) == {"invariant"}
    with pytest.raises(PolicyError, match="invariant"):
        flips.measure(policies=("invariant",), **asked)


def test_the_control_is_not_among_the_policies() -> None:
    with pytest.raises(PolicyError, match="'native' is the control") as raised:
        flips.measure(policies=("native",), device="cpu")
    assert ", ".join(policy_forms(promising=True)) in str(raised.value)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"baseline": 1}, ParameterError, "baseline=1"),
        ({"batches": (0,)}, ParameterError, "batch=0"),
        ({"pads": (0,)}, ParameterError, "padding=0"),
        ({"tokens": 0}, ParameterError, "tokens=0"),
        ({"tokens": 5000}, ParameterError, "tokens=5000"),
        ({"prompts": []}, ParameterError, "of 0 prompts"),
        ({"count": 0}, ParameterError, "count=0"),
        ({"policies": ("padded",)}, PolicyError, "padded"),
        ({"device": "tpu"}, DeviceError, "tpu"),
        ({"prompts": ["word " * 4000]}, ParameterError, "none of the 1 prompts"),
    ],
)
def test_flips_that_cannot_be_measured(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        flips.measure(**({"device": "cpu"} | given))
