"""The benchmark's arms: those that the registry gives, and what each asks of transformers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import small_gpt2

from stablegen.core.policy import BATCH_INVARIANT, registered_policies
from stablegen.errors import EngineError
from stablegen.lab import arms
from stablegen.lab.arms import EagerArm, StaticArm, known_arms
from stablegen.lab.compared import arm_names, of_rows, own_policy, promising_policies, runs_one_by_one
from stablegen.lab.subject import Subject
from stablegen.machine.device import Device

CPU = Device("cpu", "a processor", threads=1)
GPU = Device("cuda:0", "a GPU", capability=(9, 0), sm_count=132)


@pytest.fixture
def subject() -> Subject:
    from transformers import GenerationConfig

    model = small_gpt2()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return Subject(model, "float32", CPU, 256, 4096)


def test_every_policy_that_promises_has_an_arm() -> None:
    promising = {kind.name: kind for kind in registered_policies() if kind.promises}
    assert set(promising) <= set(arm_names())
    made = {name: make() for name, make in known_arms().items()}
    assert tuple(made) == arm_names()
    assert {name: arm.name for name, arm in made.items()} == {name: name for name in arm_names()}
    assert all(arm.label and arm.about for arm in made.values())
    assert {name: made[name].label for name in promising} == {name: kind.form for name, kind in promising.items()}
    assert made["single"].about == "stablegen's single policy: one request after another"
    assert made["padded"].about == "stablegen's padded:N policy, N being the batch size"
    assert {name for name, arm in made.items() if arm.once} == {"single", "static"}
    assert {name for name, arm in made.items() if arm.golden_runs} == {"invariant", "eager"}
    assert {name for name, arm in made.items() if arm.prefills} == {"invariant", "vendor", "eager"}


def test_policies_come_from_the_registry() -> None:
    kinds = {kind.name: kind for kind in registered_policies()}
    assert of_rows(kinds["padded"], 3).spec == "padded:3"
    assert of_rows(kinds["single"], 3).spec == "single"
    assert [runs_one_by_one(kinds[name]) for name in ("single", "padded", "invariant")] == [True, False, False]
    assert [policy.spec for policy in promising_policies()] == ["single", "padded:8", "invariant"]
    assert own_policy().engines == BATCH_INVARIANT


@pytest.mark.parametrize("name", ["invariant", "vendor", "single", "padded", "eager"])
def test_an_arm_generates_what_is_asked(subject: Subject, name: str) -> None:
    arm = known_arms()[name]()
    arm.prepare(subject, 3, 9)
    arm.run([[1, 2], [3, 4], [5, 6]], 4)
    memory = arm.memory()
    assert (memory is not None) == (name in ("invariant", "vendor"))
    if memory is not None:
        assert memory["weights"] > 0 and memory["kv_cache"] > 0
    assert arm.note(3) == ("3 requests one after another" if name == "single" else "")
    assert arm.note(1) == ""
    arm.close()
    assert arm.memory() is None
    assert subject.model(torch.tensor([[1]])).logits.shape == (1, 1, 4096)  # the subject stays usable


def test_transformers_runs_a_set_in_groups_of_like_length(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "GROUP", 2)
    seen: list[tuple[list[int], torch.Tensor]] = []
    honest = subject.model.generate

    def generate(**arguments: Any) -> Any:
        mask = arguments["attention_mask"]
        seen.append((mask.sum(1).tolist(), mask[:, -1]))
        return honest(**arguments)

    monkeypatch.setattr(subject.model, "generate", generate)
    arm = EagerArm()
    arm.prepare(subject, None, 12)
    arm.run_set([[1] * 5, [2] * 2, [3] * 4], 3)
    assert [lengths for lengths, _ in seen] == [[2, 4], [5]]
    assert [bool(last.all()) for _, last in seen] == [True, True]


def test_an_answer_of_another_length_is_no_measurement(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.model, "generate", lambda **arguments: arguments["input_ids"])
    arm = EagerArm()
    arm.prepare(subject, 1, 8)
    with pytest.raises(EngineError, match="0 tokens were generated where 4 were asked for"):
        arm.run([[1, 2]], 4)


def test_the_static_arm_asks_for_a_static_cache(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    arm = StaticArm()
    arm.prepare(subject, 2, 8)
    arm.run([[1, 2], [3, 4]], 3)
    assert arm._model is not subject.model
    assert hasattr(arm._model, "_previous_max_cache_length")
    arm.close()
    assert (arm._model, resets) == (None, [1])


def test_batch_invariant_ops_is_used_where_it_is_installed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = known_arms()["batch_invariant_ops"]()
    assert "cannot be imported" in str(arm.missing(GPU))
    entered: list[bool] = []

    @contextlib.contextmanager
    def mode(enabled: bool) -> Iterator[None]:
        entered.append(enabled)
        yield

    monkeypatch.setitem(sys.modules, "batch_invariant_ops", SimpleNamespace(set_batch_invariant_mode=mode))
    assert arm.missing(GPU) is None
    assert "GPU" in str(arm.missing(CPU))
    arm.prepare(subject, 1, 8)
    arm.run([[1, 2]], 2)
    assert entered == [True]
