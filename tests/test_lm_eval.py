"""lm-eval: its own model over a stabilized one, and the model ``stablegen``; the same digits at every batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import TASKS, evaluate, write_tasks
from support import TINY, client, small_directory

import stablegen
from stablegen.client import Client

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # lm-eval and datasets have warnings of their own


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), items=14, new=8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"), eos_token=end, pad_token=end)


@pytest.fixture
def model() -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(TINY).eval()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["invariant", "padded:4"])
def test_metrics_and_outputs_are_equal_at_every_batch_size(policy: str, tasks: Path, tmp_path: Path) -> None:
    from stablegen.lm_eval import StablegenLM

    found = []
    for batch_size in (1, 4, "auto"):
        with client(tmp_path / str(batch_size), policy=policy) as asking:
            found.append(evaluate(StablegenLM(client=asking, batch_size=batch_size), tasks))
    assert found[0] == found[1] == found[2]
    assert set(found[0][0]) == set(TASKS)
    assert all(len(items) == 14 for items in found[0][1].values())


@pytest.mark.slow
def test_a_second_evaluation_is_answered_from_the_cache(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stablegen.lm_eval import StablegenLM

    with client(tmp_path, policy="invariant") as asking:
        first = evaluate(StablegenLM(client=asking, batch_size=4), tasks)
    with client(tmp_path, policy="invariant") as later:
        assert evaluate(StablegenLM(client=later, batch_size=1), tasks) == first
        assert not later.session.parts.runner.started


@pytest.mark.slow
def test_its_own_model_over_a_stabilized_one_generates_the_same_at_every_batch_size(
    tasks: Path, tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    from lm_eval.models.huggingface import HFLM

    from stablegen.lm_eval import StablegenLM

    plain = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"), tasks, TASKS[:1])
    found = []
    for batch_size in (1, 4):
        stablegen.stabilize(model, tokenizer, policy="invariant", cache_dir=tmp_path / str(batch_size))
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        found.append(evaluate(wrapped, tasks, TASKS[:1]))
        assert model.stablegen.cache.stats().records == 14
    assert found[0] == found[1] == plain
    assert evaluate(StablegenLM(client=model.stablegen, batch_size=3), tasks, TASKS[:1]) == plain
    assert model.stablegen.cache.stats().records == 14  # asked either way, the requests are the same
    stablegen.restore(model)


def test_likelihoods_are_lm_evals_own(tasks: Path, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    from stablegen.lm_eval import StablegenLM

    _, theirs = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu"), tasks, TASKS[1:])
    with Client(model, tokenizer, policy="single", cache_dir=tmp_path) as asking:
        _, ours = evaluate(StablegenLM(client=asking), tasks, TASKS[1:])
    for task in TASKS[1:]:
        for mine, yours in zip(ours[task], theirs[task], strict=True):
            for (one,), (other,) in zip(mine, yours, strict=True):
                value, truth = (one[0], other[0]) if isinstance(one, tuple) else (one, other)
                assert math.isclose(value, truth, rel_tol=1e-5)
                assert not isinstance(one, tuple) or one[1] == other[1]


@pytest.mark.slow
def test_repeats_of_a_sampled_task_are_samples_of_their_own(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from stablegen.lm_eval import StablegenLM

    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = [Instance("generate_until", {}, ("Once upon a time", settings), 0)] * 3
    with client(tmp_path, policy="invariant") as asking:
        found = StablegenLM(client=asking, batch_size=2).generate_until(asked)
        assert found == StablegenLM(client=asking, batch_size=3).generate_until(asked)
        other = StablegenLM(client=asking, batch_size=3, seed=1).generate_until(asked)
    assert len({*found, *other}) == 6


# -- scoring -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["single", "padded:3", "invariant"])
def test_a_score_is_the_same_alone_beside_others_and_from_the_cache(policy: str, tmp_path: Path) -> None:
    pairs = [("Tell me about", " yourself."), ("The old man", " began to speak about music, and"), ("No", "!")]
    prompts, continuations = ([pair[side] for pair in pairs] for side in (0, 1))
    with client(tmp_path / "together", policy=policy) as asking:
        together = asking.score(prompts, continuations)
        again = asking.score(prompts[::-1], continuations[::-1])
    assert [one.cached for one in together] == [False] * 3
    assert [one.cached for one in again] == [True] * 3
    assert {one.verdict.status for one in (*together, *again)} == {"exact"}
    assert [one.record for one in again[::-1]] == [one.record for one in together]
    for pair, one in zip(pairs, together, strict=True):
        with client(tmp_path / "alone" / pair[0].replace(" ", ""), policy=policy) as asking:
            alone = asking.score(*pair)
        assert alone.logprobs == one.logprobs
        assert alone.trace == one.trace
        assert len(one.logprobs) == len(one.record.request.continuation)


def test_a_score_is_what_decoding_would_give(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant") as asking:
        answer = asking.complete("Once upon a time", max_new_tokens=12, eos_token_id=[])
        ids = answer.record.request.prompt_ids
        (score,) = asking.score([list(ids)], [list(answer.token_ids)])
        assert score.is_greedy
        assert score.trace == answer.trace  # every score row, bit for bit
        (other,) = asking.score([list(ids)], [[*answer.token_ids[:-1], 7]])
    assert not other.is_greedy
    assert other.logprobs[:-1] == score.logprobs[:-1]
    assert other.logprob < score.logprob == math.fsum(score.logprobs)


def test_scores_are_those_of_the_models_own_log_softmax(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    with Client(model, tokenizer, policy="single", cache_dir=tmp_path) as asking:
        score = asking.score("Tell me about", " yourself, my friend.")
    request = score.record.request
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *request.continuation]])).logits[0].double()
    truth = logits.log_softmax(1)[len(request.prompt_ids) - 1 : -1]
    for step, token in enumerate(request.continuation):
        assert abs(score.logprobs[step] - truth[step, token].item()) < 1e-5


def test_under_other_numerics_a_score_is_judged(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant", dtype="bfloat16") as asking:
        made = asking.score("Tell me about", " yourself.")
    with client(tmp_path, policy="single", on_risk="recompute", accepted_risk=0.0) as other:
        again = other.score("Tell me about", " yourself.")
        assert again.key == made.key
        assert not again.cached
        assert again.logprobs != made.logprobs
        assert again.record.superseded == made.record
        assert other.score("Tell me about", " yourself.").verdict.status == "exact"


def test_the_longest_score_is_one_token_longer_than_the_context(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant") as asking:
        context = asking.source.context
        (score,) = asking.score([[5] * 3], [[5] * (context - 2)])
        assert len(score.logprobs) == context - 2
        with pytest.raises(stablegen.ContextLengthError):
            asking.score([[5] * 3], [[5] * (context - 1)])


def test_a_scored_record_is_verified_and_left_out_of_calibration(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant") as asking:
        score = asking.score("Tell me about", " yourself.")
        assert asking.verify(score).verdict.status == "exact"
        with pytest.raises(stablegen.CalibrationError):
            asking.calibrate([score])


@pytest.mark.parametrize("how", ["one", "many"])
def test_bad_pairs_are_refused(how: str, tmp_path: Path) -> None:
    bad: list[Callable[[Client], Any]] = [
        lambda asking: asking.score(["a"], []),
        lambda asking: asking.score([[1]], [[]]),
        lambda asking: asking.score([[]], [[1]]),
        lambda asking: asking.score([[1]], [["x"]]),  # type: ignore[list-item]
        lambda asking: asking.score("a", ["b"]),
        lambda asking: asking.score([[1]], [[4096]]),
    ]
    with client(tmp_path) as asking:
        for act in bad[:3] if how == "one" else bad[3:]:
            with pytest.raises(stablegen.PromptError):
                act(asking)


def test_scores_asked_for_beside_generation_are_whole(tmp_path: Path) -> None:
    with client(tmp_path, policy="invariant", model=small_directory()) as asking:
        answers = asking.complete([f"Hello number {i}" for i in range(10)], max_new_tokens=40)
        pairs = [[1, 2, 3]] * 2, [list(range(10, 40)), list(range(50, 90))]
        scores = asking.score(*pairs)
        assert [len(one.logprobs) for one in scores] == [30, 40]
        asking.verify([one.key for one in [*answers, *scores]], repair=True, from_scratch=True)
        assert [one.logprobs for one in asking.score(*pairs)] == [one.logprobs for one in scores]


def test_a_prompt_as_long_as_the_context_leaves_room_for_one_token(tmp_path: Path) -> None:
    for policy in ("invariant", "single", "padded:2"):
        with client(tmp_path, policy=policy, model=small_directory()) as asking:
            context = asking.source.context
            full = list(range(1, context + 1))
            first, second = asking.score([full, full[::-1]], [[5], [7]])
            assert len(first.logprobs) == len(second.logprobs) == 1


def test_a_prompt_that_its_continuation_merges_with_is_refused(tmp_path: Path) -> None:
    with client(tmp_path) as asking, pytest.raises(stablegen.PromptError, match="between words"):
        asking.score("Tell me abou", "t yourself.")


def test_rows_of_a_scored_continuation_are_refused(tmp_path: Path) -> None:
    with client(tmp_path) as asking, pytest.raises(stablegen.InvalidRequestError, match="generated answers"):
        asking.score_rows([asking.score("Tell me about", " yourself.")])
