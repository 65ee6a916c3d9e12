"""Calibration: noise that is known is found again, and noise that really occurs is judged by."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fixed_shapes import small_model, static_engine
from noise import growing, heavy, quieter_where_it_is_close, shaken, steady, traces
from support import MODEL, TINY, client, near_tie, numerics, record, small_directory
from support import request as make_request

from stablegen import cli
from stablegen.core.calibration import VERSION, Calibration
from stablegen.core.policy import Batch, Shape, load_policy
from stablegen.engine.base import Engine
from stablegen.engine.transformers.engine import TransformersEngine
from stablegen.errors import CalibrationError, InvalidRequestError
from stablegen.guard.calibration import fit
from stablegen.guard.verdicts import judge
from stablegen.lab.prompts import SAMPLE
from stablegen.reports.audit import brier, calibration_error, reliability
from stablegen.sources.checkpoint import CheckpointSource

NATIVE = numerics(policy="native")
HELD_OUT = [
    f"Long ago {subject} was" for subject in ("rain", "bread", "war", "the sea", "tea", "night", "gold", "a dog")
]

pytestmark = pytest.mark.filterwarnings("ignore::stablegen.errors.MarginWarning")


# --- noise that is known ----------------------------------------------------------------------------------------------


"""How far a margin moves, by the best score and the margin."""


KINDS = {
    "steady": (partial(steady, size=0.1), None, 0.0),
    "growing": (partial(growing, size=0.01), None, 1.0),
    "heavy": (partial(heavy, size=0.03), None, 0.0),
    "quieter where it is close": (partial(quieter_where_it_is_close, size=0.6), None, 0.0),
    "on a grid": (partial(steady, size=0.1), 0.125, 0.0),
    "on a growing grid": (partial(growing, size=0.015), 0.125, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_known_noise_is_found_again(kind: str) -> None:
    make, grid, power = KINDS[kind]
    noise = make(random.Random(1))
    base = traces(2, 100, grid=grid)
    found = fit(MODEL, NATIVE, NATIVE, [(one, shaken(one, noise, grid)) for one in base], prompts=100)
    assert (found.steps, found.prompts, found.grid) == (6400, 100, grid is not None)
    assert found.power == pytest.approx(power, abs=0.15)
    # of other answers: which of them part, by the whole of each
    told = []
    for old in traces(3, 600, steps=16, grid=grid):
        survival = 1.0
        for risk in found.flip_probabilities(old):
            survival *= 1.0 - risk
        told.append((1.0 - survival, shaken(old, noise, grid).tokens != old.tokens))
    share = sum(parted for _, parted in told) / len(told)
    assert 0.1 < share < 0.8
    assert calibration_error(reliability(told)) < 0.06
    assert brier(told) < share * (1 - share)  # better than to say the same of all


def test_a_wider_margin_is_never_likelier_to_flip_and_the_tail_never_ends_at_once() -> None:
    noise = steady(random.Random(1), 0.1)
    found = fit(MODEL, NATIVE, NATIVE, [(one, shaken(one, noise)) for one in traces(2, 50)], prompts=50)
    margins = [i / 200 for i in range(1, 400)]
    risks = [found.flip_probability(margin, 20.0) for margin in margins]
    assert risks == sorted(risks, reverse=True)
    assert risks[0] <= 0.5
    largest = found.sizes[-1]
    assert 0 < found.flip_probability(1.2 * largest, 20.0) < 1 / found.steps
    assert found.flip_probability(100 * largest, 20.0) < 1e-6


def test_ties_are_a_class_of_their_own() -> None:
    noise = steady(random.Random(1), 0.06)
    base = traces(2, 60, grid=0.125, reach=0.5)
    found = fit(MODEL, NATIVE, NATIVE, [(one, shaken(one, noise, 0.125)) for one in base], prompts=60)
    assert found.ties > 100
    assert found.flip_probability(0.0, 20.0) == (found.tie_flips + 0.5) / (found.ties + 1)
    # where two come to tie the lower id wins
    least = 0.125
    assert found.flip_probability(least, 3.0, rival_is_earlier=True) > found.flip_probability(least, 3.0)


def test_noise_that_was_never_seen_is_not_impossible() -> None:
    base = traces(2, 10)
    found = fit(MODEL, NATIVE, NATIVE, [(one, one) for one in base], prompts=10)
    assert found.flips == 0
    assert sum(found.flip_probabilities(base[0])) < 1e-3
    assert found.flip_probability(1e-9, 20.0) > 0


def test_too_few_steps_say_nothing() -> None:
    base = traces(2, 3)
    with pytest.raises(CalibrationError, match=r"192 steps are too few.*at least 200"):
        fit(MODEL, NATIVE, NATIVE, [(one, one) for one in base], prompts=3)


def test_a_calibration_survives_the_cache_and_another_version_is_none(tmp_path: Path) -> None:
    noise = steady(random.Random(1), 0.1)
    found = fit(MODEL, NATIVE, NATIVE, [(one, shaken(one, noise)) for one in traces(2, 50)], prompts=50)
    with client(tmp_path) as asking:
        later = numerics(policy="native", torch="9.9")
        asking.cache.put_calibration(found)
        asking.cache.put_calibration(found.model_copy(update={"version": VERSION + 1, "current": later}))
        again = asking.cache.calibration(MODEL, NATIVE, NATIVE)
        assert again is not None
        assert asking.cache.calibration(MODEL, NATIVE, later) is None
        assert asking.cache.calibrations() == [found]
        assert asking.cache.stats().calibrations == 2
    assert again == found
    other = traces(9, 1)[0]
    assert again.flip_probabilities(other) == found.flip_probabilities(other)


def test_the_guard_says_on_what_it_rests() -> None:
    noise = steady(random.Random(1), 0.1)
    found = fit(MODEL, NATIVE, NATIVE, [(one, shaken(one, noise)) for one in traces(2, 50)], prompts=50)
    hit = record(margins=[5.0, 0.05, 4.0])
    verdict = judge(hit, NATIVE, check=None, calibration=found)
    assert (verdict.status, verdict.basis, verdict.step) == ("at_risk", "calibrated", 1)
    assert verdict.reason.endswith("calibrated on 3200 steps of 50 prompts")
    assert judge(hit, NATIVE, check=None).basis == "prior"


# --- teacher forcing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [None, partial(static_engine, policy="padded:3")], ids=["growing", "static"])
def test_teacher_forcing_an_engines_own_answer_moves_nothing(tmp_path: Path, make: Any) -> None:
    if make is None:
        source = CheckpointSource.open(small_directory())
        engine: Engine = source.start(source.plan(load_policy("padded:3"), "float32", "cpu"))
    else:
        engine = make(small_model("gpt2"))
    one, other = make_request(range(1, 10), new=12), make_request(range(5, 8), new=4)
    batch = Batch((one, None, other), Shape(64, 256 if make else None))
    own = {done.request: done.trace for done in engine.generate(batch)}
    answers = {request: trace.tokens for request, trace in own.items()}
    assert {done.request: done.trace for done in engine.follow(batch, answers)} == own
    # along another's tokens the first step is its own, and so are the later ones no more
    edited = answers | {one: (answers[one][0] ^ 1, *answers[one][1:])}
    forced = {done.request: done.trace for done in engine.follow(batch, edited)}
    assert forced[other] == own[other]
    assert len(forced[one]) == len(own[one])
    assert forced[one].score_hash[0] == own[one].score_hash[0]
    assert set(forced[one].score_hash[1:]).isdisjoint(own[one].score_hash[1:])
    assert {done.request: done.trace for done in engine.generate(batch)} == own


# --- noise that really occurs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that holds a calibration from `native` in bfloat16 to `invariant` in float32."""
    folder = tmp_path_factory.mktemp("calibrated")
    answering = client(folder / "other", policy="native", dtype="bfloat16")
    with answering, client(folder / "cache", policy="invariant") as scoring:
        told: list[tuple[int, int]] = []
        (found,) = scoring.calibrate_from(
            answering, SAMPLE[:40], max_new_tokens=24, progress=lambda *done: told.append(done)
        )
    assert told == [(count, 80) for count in range(1, 81)]
    assert (found.prompts, found.recorded.dtype, found.current.dtype) == (40, "bfloat16", "float32")
    assert found.flips > 0
    return folder / "cache"


@pytest.mark.slow
def test_other_prompts_are_judged_by_it(calibrated: Path, tmp_path: Path) -> None:
    with client(tmp_path, policy="native", dtype="bfloat16") as asking:
        made = [asking.complete(prompt, max_new_tokens=24).record for prompt in HELD_OUT]
    with client(calibrated, policy="invariant") as later:
        verdicts = [later.judge(one) for one in made]
        assert {verdict.basis for verdict in verdicts} == {"calibrated"}
        assert all("calibrated on" in verdict.reason and "of 40 prompts" in verdict.reason for verdict in verdicts)
        parted = [found.verdict.status == "diverged" for found in later.verify(made)]
        assert 0 < sum(parted) < len(parted)
        told = [(verdict.probability or 0.0, one) for verdict, one in zip(verdicts, parted, strict=True)]
        assert brier(told) < 0.25  # better than a coin
        # one that nearly ties comes from elsewhere, and is judged by the prior
        assert later.judge(near_tie(made[0])).basis == "prior"
    with client(calibrated, policy="single") as other:
        assert other.judge(made[0]).basis == "prior"


@pytest.mark.slow
def test_company_is_measured_where_a_policy_promises_nothing(tmp_path: Path) -> None:
    with client(tmp_path, policy="native", dtype="bfloat16") as asking:
        made = [asking.complete(prompt, max_new_tokens=16) for prompt in SAMPLE[:16]]
        (found,) = asking.calibrate(made, sizes=(2, 8))
        assert (found.recorded, found.current) == (asking.numerics, asking.numerics)
        assert found.steps == 2 * sum(len(one.token_ids) for one in made)
        assert found.prompts == 16
        assert found.grid
        assert found.quantile(0.99) > 0  # company moves margins
        verdict = asking.judge(made[0].record)
        assert (verdict.basis, verdict.status != "exact") == ("calibrated", True)
        (alone,) = asking.calibrate(made, sizes=(1,))
        assert (alone.flips, alone.quantile(1.0)) == (0, 0.0)


@pytest.mark.slow
def test_what_is_left_over_is_measured_in_a_batch_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = []
    follow = TransformersEngine.follow

    def watched(engine: TransformersEngine, batch: Batch, *rest: Any) -> Any:
        widths.append(len(batch.rows))
        return follow(engine, batch, *rest)

    monkeypatch.setattr(TransformersEngine, "follow", watched)
    with client(tmp_path, policy="native", dtype="bfloat16") as asking:
        made = [asking.complete(prompt, max_new_tokens=16) for prompt in SAMPLE[:11]]
        (found,) = asking.calibrate(made, sizes=(4, 64))
    assert widths == [4, 4, 4, 11]
    assert found.steps == 2 * sum(len(one.token_ids) for one in made)  # company was not measured twice


@pytest.mark.slow
def test_of_several_numerics_those_with_steps_enough_are_calibrated(tmp_path: Path) -> None:
    with client(tmp_path, policy="single", dtype="bfloat16") as asking:
        many = asking.complete(SAMPLE[:20], max_new_tokens=16)
    with client(tmp_path, policy="invariant") as asking:
        few = asking.complete(["Hello", "No"], max_new_tokens=4)
        (found,) = asking.calibrate([*few, *many, *many])
        assert (found.recorded.dtype, found.prompts) == ("bfloat16", 20)
        with pytest.raises(CalibrationError, match="steps are too few"):
            asking.calibrate(few)


def test_what_cannot_be_calibrated_by_is_named(calibrated: Path) -> None:
    with client(calibrated, policy="invariant") as asking:
        with pytest.raises(CalibrationError, match="no answer with a trace"):
            asking.calibrate([])
        with pytest.raises(InvalidRequestError):
            asking.calibrate([record()])
    with client(calibrated, policy="invariant", model=str(small_directory())) as other:
        done = other.complete("Hello", max_new_tokens=3)
        with pytest.raises(CalibrationError, match="steps are too few"):
            other.calibrate([done])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["stablegen", "calibrate", "--model", str(TINY), "--device", "cpu", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return call


def write(folder: Path, prompts: Sequence[str]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(file)


@pytest.mark.slow
def test_the_command_calibrates(run: Callable[..., Any], tmp_path: Path) -> None:
    prompts = ("--prompts", write(tmp_path, SAMPLE[:20]), "--max-new-tokens", "16", "--cache-dir", "cache")
    code, out, _ = run("--from", "native/bfloat16", "--to", "invariant/float32", *prompts)
    assert code == 0
    assert "native bfloat16" in out
    assert "calibrated on" in out
    code, out, _ = run("--to", "native/bfloat16", *prompts, "--json")
    assert code == 0
    found = Calibration.model_validate_json(out)
    assert (found.recorded.policy, found.current.policy, found.prompts) == ("native", "native", 20)
    with client(tmp_path / "cache") as asking:
        assert asking.cache.stats().records == 0  # answers to measure by are nobody's
        assert len(asking.cache.calibrations()) == 2


@pytest.mark.slow
def test_the_answers_of_a_cache_calibrate(run: Callable[..., Any], tmp_path: Path) -> None:
    with client(tmp_path / "cache", policy="single", dtype="bfloat16") as asking:
        asking.complete(SAMPLE[:20], max_new_tokens=16)
        asking.cache.put([record()])  # another model's
    code, out, _ = run("--from", "cache", "--to", "invariant/float32", "--cache-dir", "cache", "--json")
    assert code == 0
    found = Calibration.model_validate_json(out)
    assert (found.recorded.policy, found.recorded.dtype, found.prompts) == ("single", "bfloat16", 20)


def test_wrong_usage_is_named(run: Callable[..., Any]) -> None:
    code, _, err = run("--from", "native/bfloat16/2", "--cache-dir", "cache")
    assert (code, "is not POLICY/DTYPE" in err) == (2, True)
    code, _, err = run("--to", "magic/float32", "--cache-dir", "cache")
    assert (code, "magic" in err) == (2, True)
