"""The client: what is asked twice is computed once, every hit is judged, and nothing computed is lost."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import (
    client,
    near_tie,
    numerics,
    passed,
    python,
    request,
    small_directory,
    small_gpt2,
    small_llama,
    untraced,
    with_token,
)

import stablegen
from stablegen.client import Client
from stablegen.core.answer import Completion
from stablegen.core.record import Record
from stablegen.core.verdict import SelfCheck
from stablegen.errors import (
    ClientClosedError,
    ConfigError,
    DeviceError,
    DivergenceRiskError,
    MarginWarning,
    ModelError,
    NonFiniteScoresError,
    NumericsChangedError,
    PolicyError,
    PromiseWarning,
    RecordNotFoundError,
)
from stablegen.machine.plan import ENGINE_VERSION
from stablegen.session.call import Call

PROMPTS = ["Hello", "Tell me about yourself.\nanswer : ", "What is", "Once upon a time", "No"]
NEW = 3


@dataclass
class Computed:
    """The batches that engines ran, those of self-checks left out."""

    batches: list[Any] = field(default_factory=list)

    @property
    def rows(self) -> list[str]:
        return [asked.key for batch in self.batches for _, asked in batch.requests]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    from stablegen.engine.invariant.engine import InvariantEngine
    from stablegen.engine.transformers.engine import TransformersEngine

    seen = Computed()

    def watch(kind: Any) -> None:
        generate = kind.generate

        def watched(engine: Any, batch: Any, *rest: Any, **named: Any) -> Iterator[Any]:
            if all(asked.model.digest != "self-check" for _, asked in batch.requests):
                seen.batches.append(batch)
            return generate(engine, batch, *rest, **named)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, "generate", watched)

    watch(TransformersEngine)
    watch(InvariantEngine)
    return seen


@pytest.fixture
def tokenizer() -> Any:
    from support import TINY
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def stored(asking: Client, prompt: str = "Hello", change: Callable[[Record], Record] = near_tie) -> Record:
    """Compute a prompt, then put a changed record in place of its own."""
    made = change(asking.complete(prompt, max_new_tokens=NEW).record)
    asking.cache.put([made])
    return made


# -- miss and hit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["single", "padded:2", "invariant"])
def test_a_miss_then_an_exact_hit(policy: str, tmp_path: Path, computed: Computed) -> None:
    with client(tmp_path, model=small_directory(), policy=policy) as asking:
        first = asking.complete("Hello", max_new_tokens=NEW)
        again = asking.complete("Hello", max_new_tokens=NEW)
    assert (first.cached, again.cached) == (False, True)
    assert first.verdict.status == again.verdict.status == "exact"
    assert again.record == first.record
    assert (again.key, again.text, again.token_ids) == (first.key, first.text, first.token_ids)
    assert computed.rows == [first.key]
    with client(tmp_path, model=small_directory(), policy=policy) as later:
        assert later.complete("Hello", max_new_tokens=NEW).verdict.status == "exact"
        assert not later.session.parts.runner.started


def test_native_is_never_exact(tmp_path: Path) -> None:
    with client(tmp_path, policy="native") as asking:
        made = [asking.complete("Hello", max_new_tokens=NEW) for _ in range(2)]
    assert [completion.cached for completion in made] == [False, True]
    assert all(completion.verdict.status in ("stable", "at_risk") for completion in made)


def test_completions_tell_the_whole_story(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        done = asking.complete("Hello", max_new_tokens=NEW)
        assert asking.tokenizer.decode(done.token_ids) == done.text
        assert asking.inspect(done.key) == done.record
        assert asking.request("Hello", max_new_tokens=NEW).key == done.key
    assert done.trace is not None
    assert done.trace.tokens == done.token_ids
    for column in ("runner_ups", "scores", "runner_up_scores", "margins", "score_hash"):
        assert len(getattr(done.trace, column)) == len(done.token_ids) == NEW
    assert all(margin >= 0 for margin in done.trace.margins)
    assert done.record.request.prompt == "Hello"
    assert (done.record.composition.rows, done.record.composition.requests, done.record.composition.slot) == (1, 1, 0)


def test_an_end_token_ends_the_answer(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        plain = asking.complete("Hello", max_new_tokens=NEW)
        ended = asking.complete("Hello", max_new_tokens=NEW, eos_token_id=plain.token_ids[1])
    assert ended.key != plain.key
    assert (ended.token_ids, ended.record.finish_reason) == (plain.token_ids[:2], "stop")
    assert plain.record.finish_reason == "length"


@pytest.mark.parametrize("policy", ["single", "padded:4", "invariant", "native"])
def test_order_is_kept_and_duplicates_are_computed_once(policy: str, tmp_path: Path, computed: Computed) -> None:
    asked = [*PROMPTS, PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    with client(tmp_path, model=small_directory(), policy=policy) as asking:
        done = asking.complete(asked, max_new_tokens=NEW)
        assert [completion.record.request.prompt for completion in done] == asked
        assert sorted(computed.rows) == sorted({completion.key for completion in done})
        part = asking.complete([*reversed(PROMPTS), "Another"], max_new_tokens=NEW)
    assert [completion.cached for completion in part] == [True] * 5 + [False]
    assert len(computed.rows) == 6


@pytest.mark.parametrize("policy", ["single", "padded:4", "invariant"])
def test_an_answer_does_not_depend_on_what_else_is_asked(policy: str, tmp_path: Path) -> None:
    alone = []
    for number, prompt in enumerate(PROMPTS):
        if number < 2:
            with client(tmp_path / str(number), model=small_directory(), policy=policy) as asking:
                alone.append(asking.complete(prompt, max_new_tokens=NEW))
    with client(tmp_path / "together", model=small_directory(), policy=policy) as asking:
        together = asking.complete(PROMPTS[::-1], max_new_tokens=NEW)[::-1]
    assert [one.trace for one in alone] == [one.trace for one in together[:2]]


def test_no_prompts_no_completions(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        assert asking.complete([]) == []
        assert not asking.session.parts.runner.started


def test_progress_counts_distinct_requests(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with client(tmp_path) as asking:
        asking.complete(["a", "b", "a", "c"], max_new_tokens=1, progress=lambda *done: seen.append(done))
        assert seen == [(1, 3), (2, 3), (3, 3)]
        seen.clear()
        asking.complete(["a", "b", "d"], max_new_tokens=1, progress=lambda *done: seen.append(done))
    assert seen == [(3, 3)]


@pytest.mark.parametrize(
    "other",
    [
        {"policy": "native"},
        {"policy": "padded:2"},
        {"policy": "invariant"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_other_numerics_are_judged_and_not_a_miss(other: dict[str, Any], tmp_path: Path, computed: Computed) -> None:
    with client(tmp_path) as first:
        made = first.complete(PROMPTS, max_new_tokens=NEW)
    computed.batches.clear()
    with client(tmp_path, on_risk="serve", **other) as second:
        done = second.complete(PROMPTS, max_new_tokens=NEW)
    assert all(completion.cached for completion in done)
    assert [completion.token_ids for completion in done] == [completion.token_ids for completion in made]
    assert {completion.verdict.status for completion in done} <= {"stable", "at_risk"}
    assert all(f"{name} " in completion.verdict.reason for completion in done for name in other)
    assert computed.batches == []


# -- flagged hits --------------------------------------------------------------------------------------------------


def test_serve_hands_it_out_and_keeps_the_flag(tmp_path: Path, computed: Computed) -> None:
    with client(tmp_path, on_risk="serve") as asking:
        made = stored(asking)
        done = asking.complete("Hello", max_new_tokens=NEW)
        assert (done.cached, done.record, done.verdict.status) == (True, made, "at_risk")
        assert [hit.key for hit in asking.warnings()] == [made.key]
    assert len(computed.rows) == 1


def test_warn_warns_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stablegen.toml").write_text("[apps.audit]")
    monkeypatch.chdir(tmp_path)
    with client(tmp_path / "cache", app="audit") as asking:
        made = stored(asking, change=lambda old: near_tie(old, margin=4e-6, step=1))
        with pytest.warns(MarginWarning, match=r"'Hello' is at_risk: step 1, .* against .*, margin \d") as caught:
            done = asking.complete("Hello", max_new_tokens=NEW)
        assert (done.cached, done.record) == (True, made)
        assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
        with pytest.warns(MarginWarning) as caught:
            asking.complete(["Hello", "Hello"], max_new_tokens=NEW)
        assert len(caught) == 1
        (hit,) = asking.warnings()
        assert made.trace is not None
        assert (hit.app, hit.key, hit.prompt) == ("audit", made.key, "Hello")
        assert (hit.verdict.status, hit.verdict.step, hit.verdict.basis) == ("at_risk", 1, "prior")
        assert hit.verdict.margin == pytest.approx(4e-6, rel=0.5)
        assert hit.verdict.probability == done.verdict.probability
        assert hit.token == asking.tokenizer.token(made.trace.tokens[1])
        assert hit.runner_up == asking.tokenizer.token(made.trace.runner_ups[1])
        assert (hit.recorded_digest, hit.current_digest) == (made.numerics.digest, asking.numerics.digest)
        assert (hit.recorded, hit.current) == (made.numerics.summary(), asking.numerics.summary())


def test_warnings_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with client(tmp_path, on_risk="serve") as asking, caplog.at_level("INFO", logger="stablegen"):
        made = stored(asking)
        asking.complete("Hello", max_new_tokens=NEW)
    assert [made.key in message for message in caplog.messages] == [True]


def test_raise_raises(tmp_path: Path, computed: Computed) -> None:
    with client(tmp_path, on_risk="raise") as asking:
        made = stored(asking)
        with (
            pytest.warns(MarginWarning),
            pytest.raises(DivergenceRiskError, match=r"'Hello' is at_risk: step 0.*on_risk='recompute'") as told,
        ):
            asking.complete("Hello", max_new_tokens=NEW)
        assert (told.value.key, told.value.verdict.status, told.value.verdict.step) == (made.key, "at_risk", 0)
        assert [hit.key for hit in asking.warnings()] == [made.key]
    assert len(computed.rows) == 1


@pytest.mark.parametrize(("on_risk", "cached"), [("verify", True), ("recompute", False)])
def test_what_is_computed_again_and_found_the_same(
    on_risk: str, cached: bool, tmp_path: Path, computed: Computed
) -> None:
    with client(tmp_path, on_risk=on_risk) as asking:
        old = stored(asking)
        with pytest.warns(MarginWarning):
            done = asking.complete("Hello", max_new_tokens=NEW)
        assert (done.cached, done.verdict.status, done.verdict.basis) == (cached, "exact", "verified")
        assert (done.record.numerics, done.record.superseded) == (asking.numerics, old)
        assert len(computed.rows) == 2
        after = asking.complete("Hello", max_new_tokens=NEW)
        assert (after.cached, after.verdict.status) == (True, "exact")
    assert len(computed.rows) == 2


@pytest.mark.parametrize("on_risk", ["verify", "recompute"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_divergence_is_found_and_replaced(on_risk: str, step: int, tmp_path: Path) -> None:
    with client(tmp_path, on_risk=on_risk) as asking:
        fresh = asking.complete("Hello", max_new_tokens=NEW)
        wrong = stored(asking, change=lambda old: with_token(near_tie(old), step, 77))
        with pytest.warns(MarginWarning):
            done = asking.complete("Hello", max_new_tokens=NEW)
        assert (done.cached, done.token_ids) == (False, fresh.token_ids)
        assert (done.verdict.status, done.verdict.step, done.verdict.probability) == ("diverged", step, 1.0)
        assert (done.verdict.token, done.verdict.runner_up) == (77, fresh.token_ids[step])
        found = asking.inspect(done.key)
        assert (found.token_ids, found.superseded) == (fresh.token_ids, wrong)
        assert [hit.verdict.status for hit in asking.warnings()] == ["at_risk", "diverged"]
        assert asking.complete("Hello", max_new_tokens=NEW).verdict.status == "exact"


def test_an_answer_without_a_trace_is_unknown(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        asked = asking.request("Hello", max_new_tokens=NEW)
        asking.cache.put([untraced(asked=asked, numerics=numerics())])
        with pytest.warns(MarginWarning, match="'Hello' is unknown: .*no trace"):
            done = asking.complete("Hello", max_new_tokens=NEW)
    assert (done.cached, done.token_ids, done.verdict.status) == (True, (1, 2), "unknown")


def test_risk_is_what_the_user_accepts(tmp_path: Path) -> None:
    with client(tmp_path, accepted_risk=0.9) as asking:
        stored(asking)
        done = asking.complete("Hello", max_new_tokens=NEW)
    assert done.verdict.status == "stable"
    assert done.verdict.probability == pytest.approx(0.5, abs=0.1)


def test_flagged_hits_and_misses_in_one_call(tmp_path: Path, computed: Computed) -> None:
    with client(tmp_path, on_risk="recompute") as asking:
        stored(asking)
        computed.batches.clear()
        with pytest.warns(MarginWarning):
            done = asking.complete(["No", "Hello", "No", "Hello"], max_new_tokens=NEW)
    assert [completion.record.request.prompt for completion in done] == ["No", "Hello", "No", "Hello"]
    assert len(computed.rows) == 2


# -- a promise that is not kept ------------------------------------------------------------------------------------


@pytest.mark.fresh_checks
def test_without_a_passed_check_nothing_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stablegen.engine.transformers.engine import TransformersEngine
    from stablegen.kernels import reference

    count = iter(range(10**6))

    def drifting(scores: Any) -> Any:
        return summarise(scores + next(count) * 1e-6)

    summarise = reference.summarise_rows
    monkeypatch.setattr("stablegen.engine.transformers.engine.summarise_rows", drifting)
    assert TransformersEngine.__module__ == "stablegen.engine.transformers.engine"
    with client(tmp_path, accepted_risk=1.0) as asking:
        with pytest.warns(PromiseWarning, match=r"policy single does not keep its promise.*differ at step 0"):
            first = asking.complete("Hello", max_new_tokens=NEW)
        again = asking.complete("Hello", max_new_tokens=NEW)
    assert first.verdict.status == again.verdict.status == "stable"
    assert "failed its self-check" in again.verdict.reason
    with client(tmp_path, accepted_risk=1.0) as later:  # what was found is kept
        assert later.complete("Hello", max_new_tokens=NEW).verdict.status == "stable"


# -- interrupted, or failing in part -------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "kept"), [("single", 2), ("padded:4", 2), ("native", 2)])
def test_an_interrupt_loses_nothing_finished(policy: str, kept: int, tmp_path: Path, computed: Computed) -> None:
    def stop(done: int, _total: int) -> None:
        if done == kept:
            raise KeyboardInterrupt

    with client(tmp_path, model=small_directory(), policy=policy, accepted_risk=1.0) as asking:
        with pytest.raises(KeyboardInterrupt):
            asking.complete(PROMPTS, max_new_tokens=NEW, progress=stop)
        assert asking.cache.stats().records == kept
    computed.batches.clear()
    with client(tmp_path, model=small_directory(), policy=policy, accepted_risk=1.0) as again:
        done = again.complete(PROMPTS, max_new_tokens=NEW)
    assert len(computed.rows) == len(PROMPTS) - kept
    assert sum(completion.cached for completion in done) == kept


def test_finished_rows_are_written_while_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablegen.session.call.KEEP_EVERY", -1.0)
    with client(tmp_path, policy="invariant") as asking:
        asking.complete("Hello", max_new_tokens=NEW)
        stored_then: list[int] = []
        requests = [asking.request("No", max_new_tokens=budget) for budget in (1, 2, 3)]
        asking.run(requests, progress=lambda *_: stored_then.append(len(asking.cache.keys())))
    assert stored_then == [1, 2, 3]  # each row's predecessor is on the disk, though one batch holds all


def overflowing(positions: slice) -> Any:
    """Return a model with finite weights whose scores are not finite where a prompt reaches these positions."""
    import torch

    model = small_gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight[positions] = 3e38
    return model


LONG = "word " * 120


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every self-check pass unmeasured: it too would meet the scores that are not finite."""
    monkeypatch.setattr(
        "stablegen.engine.self_check.self_check", lambda engine, *_rest, **_named: passed(engine.numerics)
    )


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("policy", ["single", "invariant", "native"])
def test_a_request_that_fails_leaves_the_others(policy: str, tmp_path: Path, tokenizer: Any) -> None:
    with Client(overflowing(slice(100, None)), tokenizer, policy=policy, cache_dir=tmp_path) as asking:
        with pytest.raises(NonFiniteScoresError, match=r"NaN or infinite at step 0 of the prompt 'word word") as told:
            asking.complete(["Hello", LONG, "No"], max_new_tokens=NEW)
        done = told.value.completions
        assert sorted(str(completion.record.request.prompt) for completion in done) == ["Hello", "No"]
        assert sorted(record.key for record in asking.cache.records()) == sorted(one.key for one in done)
        assert all(completion.cached for completion in asking.complete(["Hello", "No"], max_new_tokens=NEW))


@pytest.mark.usefixtures("trusting")
def test_scores_that_fail_half_way_are_not_cached(tmp_path: Path, tokenizer: Any) -> None:
    with Client(overflowing(slice(50, None)), tokenizer, cache_dir=tmp_path) as asking:
        prompt = "a " * 20
        length = len(asking.request(prompt, max_new_tokens=1).prompt_ids)
        assert length < 50
        with pytest.raises(NonFiniteScoresError, match=f"at step {51 - length} "):
            asking.complete(prompt, max_new_tokens=60, eos_token_id=[])
        assert list(asking.cache.records()) == []


@pytest.mark.filterwarnings("ignore::stablegen.errors.PromiseWarning")
@pytest.mark.parametrize("policy", ["single", "padded:2", "invariant"])
def test_a_self_check_that_fails_leaves_the_requests_that_can_run(policy: str, tmp_path: Path, tokenizer: Any) -> None:
    with Client(overflowing(slice(100, None)), tokenizer, policy=policy, cache_dir=tmp_path) as asking:
        with pytest.raises(NonFiniteScoresError) as told:
            asking.complete([LONG, "Hello"], max_new_tokens=NEW)
        assert [completion.record.request.prompt for completion in told.value.completions] == ["Hello"]


# -- a model object ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["single", "padded:2", "invariant"])
def test_a_callers_autocast_and_default_dtype_move_no_bit(policy: str, tmp_path: Path) -> None:
    import torch

    with client(tmp_path / "a", policy=policy) as plain, client(tmp_path / "b", policy=policy) as within:
        expected = plain.complete("Hello", max_new_tokens=NEW)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = within.complete("Hello", max_new_tokens=NEW)
        finally:
            torch.set_default_dtype(torch.float32)
    assert (found.trace, found.record.numerics) == (expected.trace, expected.record.numerics)


def test_hits_are_handed_over_when_the_model_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with client(tmp_path) as asking:
        asking.complete("Hello", max_new_tokens=NEW)
    with client(tmp_path) as asking:
        monkeypatch.setattr(asking.source, "start", lambda _: (_ for _ in ()).throw(DeviceError("no such luck")))
        with pytest.raises(DeviceError, match="no such luck") as told:
            asking.complete(["Hello", "Goodbye"], max_new_tokens=NEW)
    assert [completion.record.request.prompt for completion in told.value.completions] == ["Hello"]


def test_flags_changed_during_a_check_are_no_broken_promise(tmp_path: Path) -> None:
    import torch

    wide = "word " * 70  # another width, which is measured when it is first asked for
    with client(tmp_path, policy="padded:2") as asking:
        asking.complete("Hello", max_new_tokens=NEW)
        torch.set_float32_matmul_precision("high")
        try:
            with pytest.raises(NumericsChangedError):
                asking.complete(wide, max_new_tokens=NEW)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert asking.complete(wide, max_new_tokens=NEW).verdict.status == "exact"


def test_a_record_is_judged_by_the_check_of_its_own_model(tmp_path: Path, tokenizer: Any) -> None:
    with Client(small_gpt2(), tokenizer, cache_dir=tmp_path) as other:
        made = other.complete("Hello", max_new_tokens=NEW)
        broken = SelfCheck(numerics=other.numerics, shape=made.record.composition.shape, passed=False)
        other.cache.put_self_check(made.record.request.model, broken)
    with Client(small_gpt2(n_layer=1), tokenizer, cache_dir=tmp_path, on_risk="serve") as asking:
        assert asking.complete("Hello", max_new_tokens=NEW).verdict.status == "exact"
        assert asking.numerics == made.record.numerics
        assert asking.judge(made.record).status != "exact"


def test_two_apps_keep_a_flag_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stablegen.toml").write_text("[apps.one]\n[apps.two]\n")
    monkeypatch.chdir(tmp_path)
    with client(tmp_path / "cache") as asking:
        asking.complete("Hello", max_new_tokens=NEW)
        stored(asking)
    for app in ("one", "two"):
        with client(tmp_path / "cache", on_risk="serve", app=app) as asking:
            asking.complete("Hello", max_new_tokens=NEW)
            kept = asking.warnings()
    assert [hit.app for hit in kept] == ["one", "two"]


def test_a_model_moved_to_another_dtype_or_attention_has_other_numerics(tmp_path: Path, tokenizer: Any) -> None:
    import torch

    model = small_gpt2()
    with Client(model, tokenizer, policy="single", cache_dir=tmp_path, on_risk="serve") as asking:
        first = asking.complete("Hello", max_new_tokens=NEW)
        model.set_attn_implementation("eager")
        asking.complete("Hello", max_new_tokens=NEW)
        assert (first.record.numerics.attention, asking.numerics.attention) == ("sdpa", "eager")
        model.to(torch.bfloat16)
        moved = asking.complete("Goodbye", max_new_tokens=NEW)
        found = moved.record.numerics
        assert (found.dtype, found.attention, found.engine_version) == ("bfloat16", "eager", ENGINE_VERSION)


def test_a_model_whose_end_token_was_changed_uses_it(tmp_path: Path, tokenizer: Any) -> None:
    model = small_gpt2()
    with Client(model, tokenizer, cache_dir=tmp_path) as asking:
        first = asking.complete("Hello", max_new_tokens=NEW)
        model.generation_config.eos_token_id = first.token_ids[0]
        assert asking.complete("Hello", max_new_tokens=NEW).token_ids == first.token_ids[:1]


@pytest.mark.parametrize("policy", ["single", "padded:2", "invariant"])
def test_around_a_loaded_model(policy: str, tmp_path: Path, tokenizer: Any) -> None:
    with Client(small_gpt2(), tokenizer, policy=policy, cache_dir=tmp_path) as asking:
        first, again = (asking.complete("Hello", max_new_tokens=NEW) for _ in range(2))
    assert (again.cached, again.record) == (True, first.record)
    assert first.verdict.status == "exact"
    with Client(small_gpt2(), tokenizer, policy=policy, cache_dir=tmp_path) as later:  # the same weights
        assert later.complete("Hello", max_new_tokens=NEW).cached


@pytest.mark.parametrize("policy", ["single", "padded:2", "invariant"])
def test_where_the_weights_lie_moves_no_bit_or_is_noticed(policy: str, tmp_path: Path, tokenizer: Any) -> None:
    # a file mapped into memory puts them at another alignment than an allocation does, and the key is the same
    import torch

    runs = []
    for offset in (0, 10, 3):  # floats
        model = small_gpt2()
        for weight in model.parameters():
            room = torch.empty(weight.numel() + 16)
            moved = room[offset : offset + weight.numel()].view(weight.shape)
            weight.data = moved.copy_(weight.data)
        with Client(model, tokenizer, policy=policy, cache_dir=tmp_path / str(offset)) as asking:
            done = asking.complete(PROMPTS, max_new_tokens=NEW)
        assert {completion.verdict.status for completion in done} == {"exact"}
        runs.append(done)
    for first, second in itertools.combinations(runs, 2):
        for one, other in zip(first, second, strict=True):
            assert one.key == other.key
            noticed = one.record.numerics != other.record.numerics
            assert noticed or one.trace == other.trace
            assert policy != "invariant" or not noticed  # it copies the weights: nothing to notice


def change_in_place(model: Any) -> None:
    import torch

    with torch.no_grad():
        model.transformer.ln_f.bias.add_(torch.arange(32) % 7)


def change_data(model: Any) -> None:
    import torch

    model.transformer.ln_f.bias.data.add_(torch.arange(32) % 7)


def load_state(model: Any) -> None:
    model.load_state_dict(small_gpt2(initializer_range=0.5).state_dict())


@pytest.mark.parametrize("policy", ["single", "invariant"])
@pytest.mark.parametrize("change", [change_in_place, change_data, load_state])
@pytest.mark.parametrize("call", ["complete", "generate"])
def test_weights_changed_in_place_are_another_model(
    call: str, change: Callable[[Any], None], policy: str, tmp_path: Path, tokenizer: Any
) -> None:
    import torch

    def ask(asking: Client) -> Completion:
        if call == "complete":
            return asking.complete("Hello", max_new_tokens=NEW)
        ids = torch.tensor([tokenizer.encode("Hello").ids])
        done: Completion = asking.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True).completions[0]
        return done

    model = small_gpt2()
    with Client(model, tokenizer, policy=policy, cache_dir=tmp_path / "one") as asking:
        before = ask(asking)
        change(model)
        after = ask(asking)
    assert after.key != before.key
    assert not after.cached
    with Client(model, tokenizer, policy=policy, cache_dir=tmp_path / "other") as anew:
        assert anew.complete("Hello", max_new_tokens=NEW).trace == after.trace


@pytest.mark.parametrize("policy", ["single", "padded:3"])
def test_a_llama(policy: str, tmp_path: Path, tokenizer: Any) -> None:
    with Client(small_llama(), tokenizer, policy=policy, cache_dir=tmp_path / "a") as asking:
        together = asking.complete(PROMPTS, max_new_tokens=NEW)
        again = asking.complete(PROMPTS, max_new_tokens=NEW)
    assert all(completion.verdict.status == "exact" for completion in [*together, *again])
    with Client(small_llama(), tokenizer, policy=policy, cache_dir=tmp_path / "b") as asking:
        assert asking.complete(PROMPTS[3], max_new_tokens=NEW).trace == together[3].trace


def test_what_threads_ask_for_at_once_is_computed_once(
    tmp_path: Path, computed: Computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client(tmp_path, model=small_directory()) as asking:
        asking.self_check()
        look_up, waiting = Call.look_up, threading.Barrier(4)

        def together(call: Call, *arguments: Any) -> None:
            look_up(call, *arguments)
            if threading.current_thread() not in seen:
                seen.add(threading.current_thread())
                waiting.wait(timeout=60)  # every thread has missed before any computes

        seen: set[threading.Thread] = set()
        monkeypatch.setattr(Call, "look_up", together)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: asking.complete(PROMPTS[:2], max_new_tokens=NEW), range(4)))
    assert len(computed.rows) == 2
    assert sorted(one[0].cached for one in answers) == [False, True, True, True]
    for others in answers[1:]:
        assert [one.record for one in others] == [one.record for one in answers[0]]


def test_a_llama_is_not_invariant(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(PolicyError, match=r"'invariant' .*'llama', not GPT-2.*'single', 'padded:N', 'native' for"):
        Client(small_llama(), tokenizer, policy="invariant", cache_dir=tmp_path)


@pytest.mark.parametrize("model", ["gpt2", None, object()])
def test_what_is_not_a_model_is_refused(model: Any, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"is not a transformers model.*from_pretrained"):
        Client(model, tokenizer, cache_dir=tmp_path)


def test_a_model_in_training_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
        Client(small_gpt2().train(), tokenizer, cache_dir=tmp_path)


def test_a_model_with_nan_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    import torch

    model = small_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinity: transformer\.ln_f\.bias"):
        Client(model, tokenizer, cache_dir=tmp_path)


def test_a_model_with_nan_is_refused_every_time(tmp_path: Path, tokenizer: Any) -> None:
    import torch

    model = small_gpt2()
    with Client(model, tokenizer, cache_dir=tmp_path) as asking:
        asking.complete("Hello", max_new_tokens=NEW)
        with torch.no_grad():
            model.transformer.ln_f.bias[3] = torch.nan
        for _ in range(2):  # nothing of the refusal is remembered
            with pytest.raises(ModelError, match="NaN or infinity"):
                asking.complete("Hello", max_new_tokens=NEW)
        asking.close()
        with pytest.raises(ClientClosedError):
            asking.generate(torch.tensor([[1, 2]]), num_beams=2, unsupported="passthrough")


def test_threads_that_see_a_change_at_once_are_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from stablegen.sources import live

    model, digest = small_gpt2(), live._digest
    source = live.LiveSource(model)
    before = source.identity
    with torch.no_grad():
        model.transformer.ln_f.bias[3] += 1
    taking = threading.Event()

    def slow(*given: Any) -> str:
        taking.set()
        threading.Event().wait(0.3)
        return digest(*given)

    monkeypatch.setattr(live, "_digest", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: source.identity)
        assert taking.wait(60)
        second = pool.submit(lambda: source.identity)
        assert first.result(60) is second.result(60) is not before


@pytest.mark.parametrize("other", ["gpt2", 5])
def test_what_is_not_a_tokenizer_is_refused(other: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a tokenizer of type"):
        Client(small_gpt2(), other, cache_dir=tmp_path)


# -- looking and settings ------------------------------------------------------------------------------------------


def test_inspecting_what_is_not_there(tmp_path: Path) -> None:
    with client(tmp_path) as asking, pytest.raises(RecordNotFoundError, match="no record under the key 'abc'") as told:
        asking.inspect("abc")
    assert isinstance(told.value, KeyError)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"on_risk": "ignore"}, "on_risk.*'ignore'.*serve, warn, verify, recompute, raise"),
        ({"accepted_risk": 1.5}, "accepted_risk.*1.5.*probability from 0 to 1"),
        ({"accepted_risk": float("nan")}, "accepted_risk.*nan.*probability"),
        ({"size_limit": 0}, "size_limit.*0.*positive"),
        ({"kv_cache_size": 0}, "kv_cache_size.*0.*positive"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_bad_settings_are_refused(
    loaded: bool, settings: dict[str, Any], told: str, tmp_path: Path, tokenizer: Any
) -> None:
    def make() -> Client:
        return (
            Client(small_gpt2(), tokenizer, cache_dir=tmp_path, **settings) if loaded else client(tmp_path, **settings)
        )

    with pytest.raises(ConfigError, match=told):
        make()


def test_a_request_for_another_model_is_not_run(tmp_path: Path) -> None:
    with client(tmp_path) as asking, pytest.raises(stablegen.StablegenError):
        asking.run([request()])


# -- what a fully cached run loads ---------------------------------------------------------------------------------


def test_a_cached_run_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        made = asking.complete(PROMPTS, max_new_tokens=NEW)
    code = """
import json, sys
import stablegen
before = sorted({"torch", "transformers", "numpy", "tokenizers", "pydantic"} & set(sys.modules))
with stablegen.Client.from_pretrained(
    "tiny-gpt2", policy="single", device="cpu", cache_dir=sys.argv[1], on_risk="warn", accepted_risk=1.0
) as client:
    done = client.complete(sys.argv[2:], max_new_tokens=3)
    done.append(client.complete(sys.argv[2], max_new_tokens=3))
    client.warnings()
    client.inspect(done[0].key)
heavy = sorted({"torch", "transformers", "triton"} & set(sys.modules))
print(json.dumps([before, heavy, [(one.cached, one.text) for one in done]]))
"""
    before, heavy, done = python(code, tmp_path, *PROMPTS)
    assert before == heavy == []
    assert done == [[True, completion.text] for completion in [*made, made[0]]]


def test_the_key_is_hexadecimal(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        assert re.fullmatch("[0-9a-f]{64}", asking.request("Hello").key)
