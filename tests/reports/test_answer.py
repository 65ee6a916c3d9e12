"""One answer looked at closely: its steps, and where other runs are known to part from it."""

from __future__ import annotations

import io
from math import inf
from pathlib import Path

from rich.console import Console
from support import client, numerics, proof, record, request, trace, untraced, with_token

from stablegen.console.answer import render
from stablegen.core.answer import Verification
from stablegen.core.policy import Shape
from stablegen.core.record import Composition, Record
from stablegen.core.verdict import Verdict
from stablegen.reports.answer import Inspection, divergences, inspect


def shown(found: Inspection) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    render(found, console)
    return console.export_text()


def test_a_superseded_answer_parts_from_the_new_one() -> None:
    old = with_token(record(margins=(1.0, 2.0, 3.0), numerics=numerics(dtype="bfloat16")), 1, 77)
    (found,) = divergences(record(margins=(1.0, 2.0, 3.0)).superseding(old), [], None, None)
    assert (found.source, found.step, found.shared) == ("superseded", 1, (0,))
    assert (found.older, found.newer, found.whole) == ((77, 2), (1, 2), True)
    assert found.older_numerics.startswith("single bfloat16")
    assert divergences(record().superseding(record(created=1.0)), [], None, None) == []


def test_a_fresh_run_parts_and_is_not_told_again_by_its_own_flag() -> None:
    old = record(margins=(1.0, 2.0, 3.0))
    fresh = with_token(old, 1, 9)._replace(numerics=numerics(policy="invariant"))
    done = Verification(old, fresh, Verdict(status="diverged", reason="seen", step=1))
    flag = proof(old, fresh.numerics)
    (found,) = divergences(old, [flag], done, lambda ids: " ".join(map(str, ids)))
    assert (found.source, found.older_text, found.newer_text) == ("verified", "1 2", "9 2")
    (noted,) = divergences(old, [flag], None, None)
    assert (noted.source, noted.step, noted.older, noted.newer, noted.whole) == ("flagged", 1, (1,), (9,), False)
    assert divergences(with_token(old, 1, 50), [flag], None, None) == []
    assert divergences(old, [proof(old, fresh.numerics, "stable")], None, None) == []


def test_records_of_another_tokenizer_show_token_ids(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        found = inspect(asking, record(margins=(inf, 0.0)))
    assert [(step.token, step.text, step.runner_up_text) for step in found.steps] == [(0, None, None), (1, None, None)]
    assert [step.margin is None for step in found.steps] == [True, False]
    assert found.fragile == [1]
    assert "inf" in shown(found)
    assert Inspection.model_validate_json(found.model_dump_json()) == found


def test_records_without_a_trace_show_their_tokens(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        found = inspect(asking, untraced((5, 6)))
    assert ([step.token for step in found.steps], found.traced, found.fragile) == ([5, 6], False, [])
    assert found.verdict.status == "unknown"
    assert "p(flip)" not in shown(found)


def test_a_scored_continuation_shows_its_own_tokens_and_the_best(tmp_path: Path) -> None:
    asked = request((1,), new=2, continuation=(4, 1))
    scored = record(asked, traced=trace((1.0, 2.0)), logprobs=(-1.5, -0.25))
    with client(tmp_path) as asking:
        found = inspect(asking, scored)
    assert [(step.token, step.best, step.logprob) for step in found.steps] == [(4, 0, -1.5), (1, 1, -0.25)]
    other = with_token(scored, 0, 8)
    (divergence,) = divergences(scored.superseding(other), [], None, None)
    assert (divergence.older, divergence.newer, divergence.whole) == ((8,), (0,), False)


def test_verifying_shows_both_continuations(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant") as asking:
        right = asking.complete("What is music?", max_new_tokens=6).record
        wrong = with_token(right, 2, 7)
        asking.cache.put([wrong])
        found = inspect(asking, wrong, asking.verify(wrong))
    assert found.verification is not None
    assert found.verification.status == "diverged"
    (divergence,) = found.divergences
    assert (divergence.source, divergence.step) == ("verified", 2)
    assert divergence.newer == right.token_ids[2:]
    text = shown(found)
    assert "diverges  at step 2, verified" in text
    assert "verified  diverged" in text


def test_only_parameters_that_were_given_are_shown(tmp_path: Path) -> None:
    made: Record = record(request(new=3), composition=Composition(8, 2, 1, Shape(64)), app="an app")
    with client(tmp_path) as asking:
        found = inspect(asking, made)
    assert found.params == {"max_new_tokens": 3}
    assert found.composition == {"rows": 8, "requests": 2, "slot": 1, "width": 64}
    assert "an app" in shown(found)
