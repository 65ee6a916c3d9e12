"""What a run leaves behind: traces, records, verdicts and completions as values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import numerics, record, request, trace, untraced

from stablegen.core.answer import Completion
from stablegen.core.policy import Shape
from stablegen.core.record import Composition
from stablegen.core.trace import Trace
from stablegen.core.verdict import Verdict


def test_superseding_keeps_one_level() -> None:
    first, second, third = (record(created=float(day)) for day in (1, 2, 3))
    newest = third.superseding(second.superseding(first))
    assert newest.superseded is not None
    assert newest.superseded == second
    assert newest.superseded.superseded is None
    assert third.superseding(None).superseded is None


def test_margins_are_best_minus_second_in_float32() -> None:
    made = Trace.of([1, 2], [3, 4], [0.1, 5.0], [0.0, 5.0], [0, 2**64 - 1])
    assert made.scores[0] == 0.10000000149011612
    assert made.margins == (0.10000000149011612, 0.0)
    assert made.score_hash == (0, 2**64 - 1)
    assert (made.tokens, made.runner_ups, made.runner_up_scores, len(made)) == ((1, 2), (3, 4), (0.0, 5.0), 2)


@pytest.mark.parametrize(
    ("other", "step"),
    [([0, 1, 2], None), ([9, 1, 2], 0), ([0, 1, 9], 2), ([0, 1], 2), ([0, 1, 2, 3], 3)],
)
def test_first_difference(other: list[int], step: int | None) -> None:
    one, two = trace([1.0] * 3), trace([1.0] * len(other), tokens=other)
    assert one.first_difference(two) == two.first_difference(one) == step


def test_a_trace_digest_stands_for_its_score_rows() -> None:
    one, other = trace([1.0, 2.0]), trace([1.0, 3.0])
    moved = Trace.of(one.tokens, one.runner_ups, one.scores, one.runner_up_scores, [1, 2])
    assert one.digest() == other.digest() != moved.digest()
    assert one != other


def test_the_json_of_a_record() -> None:
    shown = json.loads(json.dumps(record(request(prompt="a prompt")).superseding(untraced()).to_dict()))
    assert shown["prompt"] == "a prompt"
    assert shown["token_ids"] == shown["trace"]["tokens"] == [0, 1]
    assert shown["trace"]["score_hash"] == ["deadbeef00000000", "deadbeef00000001"]
    assert shown["numerics_digest"] == numerics().digest
    assert shown["superseded"]["trace"] is None
    assert shown["superseded"]["token_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("status", "flagged"),
    [("exact", False), ("stable", False), ("at_risk", True), ("diverged", True), ("unknown", True)],
)
def test_which_verdicts_are_flagged(status: Any, flagged: bool) -> None:
    assert Verdict(status=status, reason="").flagged is flagged


def test_a_completion_shows_its_record() -> None:
    made = record(request(prompt="a prompt"))
    shown = Completion(made, cached=True, verdict=Verdict(status="exact", reason=""))
    assert (shown.text, shown.token_ids, shown.key, shown.trace) == ("an answer", (0, 1), made.key, made.trace)


def test_a_record_shows_its_app_and_its_shape() -> None:
    shown = record(app="an app", composition=Composition(8, 3, 2, Shape(64, None, 0))).to_dict()
    assert shown["app"] == "an app"
    assert shown["composition"] == {"rows": 8, "requests": 3, "slot": 2, "width": 64, "capacity": None, "scored": 0}
