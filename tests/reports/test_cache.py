"""The whole cache looked over: counts, fragility, what policies would do, and what is honestly not known."""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import pytest
from chromium import made_up
from rich.console import Console
from support import audit_report, client, numerics, passed, proof, python, record, request, trace, untraced

from stablegen.client import Client
from stablegen.console.cache import render
from stablegen.core.record import Record
from stablegen.errors import CacheEntryWarning
from stablegen.reports.cache import EDGES, NO_APP, CacheReport, Margins, WhatIf, fragility, proven, survey


def mine(asking: Client, token: int, **changes: Any) -> Record:
    """Return a record that this client could answer, made under its own numerics."""
    asked = request((token,), model=asking.source.identity, tokenizer=asking.tokenizer.digest, prompt=f"prompt {token}")
    return record(asked, **({"numerics": asking.numerics} | changes))


def policy(report: CacheReport, name: str) -> WhatIf:
    return next(one for one in report.what_if if one.policy == name)


def shown(report: CacheReport) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    render(report, console)
    return console.export_text()


def test_margins_are_counted_in_bins() -> None:
    margins = Margins.of(
        Counter(bisect_right(EDGES, margin) for margin in (0.0, 1e-9, EDGES[0], 0.5, 99.0, 100.0, inf))
    )
    assert (margins.below, sum(margins.counts), margins.beyond) == (2, 3, 2)
    assert margins.counts[0] == 1
    assert margins.total == 7


def test_answers_are_counted_by_verdict_app_model_and_numerics(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        asking.cache.put(made_up(40, steps=6))
        report = survey(asking)
    assert (report.records, report.others, report.corrupt) == (40, 40, 0)
    assert sum(report.verdicts.values()) == 40
    assert {name: sum(group.values()) for name, group in report.by_app.items()} == {
        NO_APP: 10,
        "golden-eval": 10,
        "nightly": 10,
        "support bot": 10,
    }
    assert {name: sum(group.values()) for name, group in report.by_model.items()} == {
        "some-model": 32,
        "another-model": 8,
    }
    assert len(report.by_numerics) == 3
    assert (report.smallest.total, report.all.total) == (40, 240)
    assert report.expected == pytest.approx(sum(one.verdict.probability or 0.0 for one in report.answers))


def test_the_most_fragile_come_first(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        other = numerics(dtype="bfloat16")
        asking.cache.put([mine(asking, 1, numerics=other, margins=(9.0, 8.0))])
        asking.cache.put([mine(asking, 2, numerics=other, margins=(9.0, 0.01))])
        asking.cache.put([untraced(asked=request((3,)))])
        asking.cache.put([mine(asking, 4, numerics=other, margins=(9.0, 0.1))])
        parted = mine(asking, 5, numerics=other, margins=(9.0, 9.0))
        asking.cache.put([parted])
        asking.cache.flag([proof(parted, asking.numerics)])
        report = survey(asking)
    statuses = [one.verdict.status for one in report.answers]
    assert statuses == ["diverged", "at_risk", "at_risk", "unknown", "stable"]
    assert report.answers == sorted(report.answers, key=fragility)
    first, second = report.answers[:2]
    assert (first.apps, first.flagged[0].status, first.step) == (("checker",), "diverged", 1)
    assert second.step == 1
    assert second.margin == pytest.approx(0.01, rel=1e-3)
    assert second.token is not None


def test_a_proof_holds_for_the_very_answer_and_numerics_alone() -> None:
    old, now = record(), numerics(policy="invariant")
    assert proven(old, [proof(old, now)], now) is not None
    assert proven(old, [proof(old, numerics())], now) is None
    assert proven(old, [proof(old, now, recorded_digest="0" * 64)], now) is None
    assert proven(old, [proof(old, now, seen=old.created - 1.0)], now) is None
    found = proven(old, [proof(old, now), proof(old, now, "stable", seen=old.created + 9.0)], now)
    assert found is not None
    assert found.status == "stable"


@pytest.mark.fresh_checks
def test_what_if_tells_what_is_exact_and_what_would_be_after_a_self_check(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant") as asking:
        own = asking.numerics
        asking.cache.put([mine(asking, 1), mine(asking, 2), mine(asking, 3, margins=(0.0, 5.0)), record()])
        before = survey(asking)
        asking.cache.put_self_check(asking.source.identity, passed(own))
    with client(tmp_path, policy="invariant") as asking:
        after = survey(asking)
    ahead = policy(before, "invariant")
    assert (ahead.self_check, ahead.verdicts["exact"], ahead.unchecked) == ("none", 0, 3)
    assert ahead.current
    assert "3 exact once a self-check has passed" in shown(before)
    now = policy(after, "invariant")
    assert (now.self_check, now.verdicts["exact"], now.unchecked, now.expected) == ("passed", 3, 0, 0.0)
    assert (after.records, after.others) == (4, 1)
    native = policy(after, "native")
    assert (native.self_check, native.verdicts["exact"], native.prior) == ("no promise", 0, 3)
    assert native.expected >= 0.5
    assert [one.policy for one in after.what_if] == ["single", "padded:8", "invariant", "native"]


def test_another_policy_of_the_client_is_foretold_too(tmp_path: Path) -> None:
    with client(tmp_path, policy="padded:2") as asking:
        report = survey(asking)
    assert [one.policy for one in report.what_if] == ["padded:2", "single", "padded:8", "invariant", "native"]


def test_corrupt_entries_are_reported_and_counted(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        asking.cache.put([record(), record(request((9,)))])
        asking.cache.store.put({f"record/{record().key}": b"damaged"})
        with pytest.warns(CacheEntryWarning, match="not a stablegen record"):
            report = survey(asking)
    assert (report.records, report.corrupt) == (1, 1)
    assert "1 that cannot be read" in shown(report)


def test_an_empty_cache_is_said_to_be_empty(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        report = survey(asking)
    assert (report.records, report.answers, report.audit) == (0, [], None)
    assert shown(report).startswith("0 answers in")


def test_the_audit_of_these_numerics_goes_before_a_newer_one_of_others(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        own = audit_report(model=asking.identity.name, numerics=asking.numerics, made=1.0)
        other = audit_report(made=2.0)
        asking.cache.put_audit(asking.identity, other)
        asking.cache.put([record()])
        assert survey(asking).audit == other
        asking.cache.put_audit(asking.identity, own)
        report = survey(asking)
    assert report.audit == own
    assert "newest audit: 2 answers" in shown(report)


def test_models_of_one_name_are_told_apart_and_untold_tokens_are_ids(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        model = asking.source.identity
        one, two = model.model_copy(update={"digest": "1" * 64}), model.model_copy(update={"digest": "2" * 64})
        asking.cache.put([record(request((1,), model=one)), record(request((2,), model=two))])
        report = survey(asking)
    assert {answer.model for answer in report.answers} == {"tiny-gpt2 (11111111)", "tiny-gpt2 (22222222)"}
    assert {answer.token for answer in report.answers} == {"0"}
    assert {answer.prompt for answer in report.answers} == {"1 token ids"}


def test_margins_without_end_are_none(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        asking.cache.put([record(traced=trace([inf, inf]))])
        report = survey(asking)
    assert report.answers[0].margin is None
    assert report.all.beyond == 2
    assert CacheReport.model_validate_json(report.model_dump_json()).all == report.all


def test_a_report_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = """
import json, sys
from pathlib import Path
sys.argv = ["stablegen", "report", "--device", "cpu", "--cache-dir", sys.argv[1], "--html", sys.argv[2]]
from stablegen import cli
try:
    cli.main()
except SystemExit:
    pass
print(json.dumps([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules]))
"""
    with client(tmp_path / "cache") as asking:
        asking.cache.put(made_up(3, steps=4))
    assert python(code, tmp_path / "cache", tmp_path / "report.html") == []
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = page.split('id="answers-data">')[1].split("</script>")[0]
    assert len(json.loads(data)["rows"]) == 3
