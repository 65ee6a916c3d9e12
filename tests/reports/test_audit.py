"""The audit: verdicts held against what happened, with divergences that really occur and planted ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import TINY, client, numerics, record, small_directory, with_token

from stablegen import cli
from stablegen.console.audit import render
from stablegen.core.audit import AuditReport, Share
from stablegen.reports.audit import CURVE_POINTS, audit, brier, calibration_error, curve, reliability

PROMPTS = [f"{opening} {subject}" for opening in ("What is", "Tell me about", "I never") for subject in ("music", "it")]
NEW = 24

pytestmark = pytest.mark.filterwarnings("ignore::stablegen.errors.MarginWarning")


# --- the figures ------------------------------------------------------------------------------------------------------


def test_shares_have_exact_bounds() -> None:
    found = Share.over(8, 10)
    assert found.value == 0.8
    # Clopper and Pearson, from their tables
    assert (found.low, found.high) == pytest.approx((0.4439, 0.9748), abs=1e-4)
    assert Share.over(5, 5).low == pytest.approx(0.025 ** (1 / 5))
    assert Share.over(0, 5).low == 0.0
    assert Share.over(0, 0) == Share(count=0, of=0, value=None, low=0.0, high=1.0)


def test_predicted_and_observed_are_compared_in_ten_bins() -> None:
    told = [(0.0, False)] * 6 + [(0.05, True), (0.05, False), (0.31, True), (1.0, True), (0.95, False)]
    bins = reliability(told)
    assert [(one.low, one.high, one.observed.count, one.observed.of) for one in bins] == [
        (0.0, 0.1, 1, 8),
        (0.3, 0.4, 1, 1),
        (0.9, 1.0, 1, 2),
    ]
    assert bins[0].predicted == pytest.approx(0.0125)
    assert calibration_error(bins) == pytest.approx((8 * (1 / 8 - 0.0125) + 0.69 + 2 * (0.975 - 0.5)) / 11)
    assert brier([(0.0, False), (1.0, False), (0.5, True)]) == pytest.approx(1.25 / 3)


def test_precision_and_recall_at_every_threshold() -> None:
    points = curve([(0.9, True), (0.5, False), (0.5, True), (0.0, False)])
    assert [(one.threshold, one.flagged, one.precision, one.recall) for one in points] == [
        (0.9, 0.25, 1.0, 0.5),
        (0.5, 0.75, pytest.approx(2 / 3), 1.0),
        (0.0, 1.0, 0.5, 1.0),
    ]
    assert [one.recall for one in curve([(0.1, False)])] == [None]
    assert curve([]) == []
    many = curve([(place / 1000, place % 7 == 0) for place in range(1000)])
    assert (len(many), many[0].threshold, many[-1].threshold) == (CURVE_POINTS, 0.999, 0.0)


# --- the audit --------------------------------------------------------------------------------------------------------


def test_real_divergences_are_counted(tmp_path: Path) -> None:
    with client(tmp_path, policy="native", dtype="bfloat16") as asking:
        asking.complete(PROMPTS, max_new_tokens=NEW)
    with client(tmp_path, policy="invariant") as later:
        before = list(later.cache.records())
        report = audit(later)
        truth = later.verify(before)
        assert [later.inspect(old.key) for old in before] == before
    diverged = {found.record.key for found in truth if found.verdict.status == "diverged"}
    assert 0 < len(diverged) < len(PROMPTS)
    assert (report.records, report.audited, report.skipped) == (len(PROMPTS), len(PROMPTS), {})
    assert sum(row["diverged"] for row in report.table.values()) == len(diverged)
    assert report.recall.of == len(diverged)
    flagged = sum(sum(row.values()) for status, row in report.table.items() if status == "at_risk")
    assert report.precision.of == flagged
    assert {hit.key for hit in report.wrong if hit.wrong == "false alarm"}.isdisjoint(diverged)
    assert report.brier is not None
    assert 0 <= report.brier <= 1
    assert not report.broken


def test_exact_answers_are_equal_in_bits_and_a_planted_lie_breaks_the_audit(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant") as asking:
        done = asking.complete(PROMPTS, max_new_tokens=NEW)
    with client(tmp_path, policy="invariant") as later:
        report = audit(later)
        assert report.table == {"exact": {"bits": len(PROMPTS), "tokens": 0, "diverged": 0}}
        assert (report.exact.count, report.exact.of, report.broken) == (len(PROMPTS), len(PROMPTS), False)
        later.cache.put([with_token(done[2].record, 3, 7)])
        report = audit(later)
    assert report.broken
    (lie,) = report.wrong
    assert (lie.key, lie.wrong, lie.step, lie.outcome) == (done[2].key, "not exact", 3, "diverged")


def test_a_sample_is_a_part_and_the_same_one_again(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant") as asking:
        done = asking.complete(PROMPTS, max_new_tokens=3)
        asking.cache.put([with_token(one.record, 1, 7) for one in done])
        first, again, other = (audit(asking, sample=3, seed=seed) for seed in (1, 1, 2))
    keys = [[hit.key for hit in report.wrong] for report in (first, again, other)]
    assert len(keys[0]) == 3
    assert keys[0] == keys[1] != keys[2]
    assert first.skipped == {"not in the sample": 3}


def test_answers_of_other_models_are_left_out(tmp_path: Path) -> None:
    with client(tmp_path, model=str(small_directory())) as other:
        other.complete("Hello", max_new_tokens=2)
    with client(tmp_path, policy="invariant") as asking:
        asking.complete("Hello", max_new_tokens=2)
        asking.cache.put([record()])
        report = audit(asking)
    assert (report.records, report.audited, report.skipped) == (3, 1, {"of another model or tokenizer": 2})


def test_an_empty_cache_has_nothing_to_tell(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        report = audit(asking)
    assert (report.audited, report.recall.value, report.brier, report.broken) == (0, None, None, False)
    console = Console(record=True, width=120, file=io.StringIO())
    render(report, console)
    assert "0 of 0 cached answers" in console.export_text()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["stablegen", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return call


HERE = ("--model", str(TINY), "--device", "cpu", "--cache-dir", "cache")


@pytest.mark.slow
def test_the_command_reports_draws_and_fails_where_an_exact_was_not(run: Callable[..., Any], tmp_path: Path) -> None:
    with client(tmp_path / "cache", policy="native", dtype="bfloat16") as asking:
        asking.complete(PROMPTS, max_new_tokens=NEW)
    with client(tmp_path / "cache", policy="invariant") as asking:
        right = asking.complete("Once", max_new_tokens=4).record
    more = ("--policy", "invariant", "--dtype", "float32")
    code, out, _ = run("audit", *HERE, *more, "--out", "report.json", "--plot", "reliability.png")
    assert code == 0
    parts = ("7 of 7 cached answers", "exact", "recall", "precision", "Brier score", "observed", "at_risk")
    assert [part for part in parts if part not in out] == []
    report = AuditReport.model_validate_json((tmp_path / "report.json").read_text())
    assert report.audited == 7
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    with client(tmp_path / "cache", policy="invariant") as asking:
        assert asking.cache.audits() == [report]
        asking.cache.put([with_token(right, 2, 7)])
    code, out, _ = run("audit", *HERE, *more, "--json")
    assert code == 1
    broken = AuditReport.model_validate(json.loads(out))
    assert broken.broken
    with client(tmp_path / "cache", policy="invariant") as asking:
        assert asking.cache.audits() == [broken]


def test_wrong_usage_is_named(run: Callable[..., Any]) -> None:
    code, _, err = run("audit", *HERE, "--sample", "0")
    assert (code, "--sample 0" in err) == (2, True)
    code, _, err = run("audit", *HERE, "--plot", "picture.txt")
    assert (code, "ends in .png" in err) == (2, True)


def test_the_numerics_are_those_of_the_client(tmp_path: Path) -> None:
    with client(tmp_path, policy="single") as asking:
        assert audit(asking).numerics == asking.numerics != numerics()
