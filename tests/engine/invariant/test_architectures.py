"""How architectures of the batch-invariant engine are found, checked and added, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from engines import alone, load_model, make_ids, make_request

from stablegen.core.policy import load_policy
from stablegen.engine.invariant import architectures
from stablegen.engine.invariant.architectures import (
    ENTRY_POINTS,
    Architecture,
    check_invariant,
    find_architecture,
    register_architecture,
)
from stablegen.engine.invariant.architectures.gpt2 import GPT2, problem
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.invariant.model import Model
from stablegen.engine.loading import make_engine_around
from stablegen.errors import CheckpointError, PolicyError
from stablegen.kernels.reference import ReferenceKernels
from stablegen.machine.plan import find_device, numerics_on

GPT2_CONFIG: dict[str, Any] = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16}


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(architectures, "_REGISTERED", dict(architectures._REGISTERED))


def test_a_built_in_architecture_is_found_by_its_file_name() -> None:
    folder = Path(architectures.__file__).parent
    names = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    assert "gpt2" in names
    for name in names:
        assert find_architecture({"model_type": name}).model_type == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "'llama', not GPT-2"),
        ({"model_type": "../gpt2"}, "'../gpt2', not GPT-2"),
        ({"model_type": "__init__"}, "'__init__', not GPT-2"),
        ({"model_type": None}, "None, not GPT-2"),
        ({"activation_function": "relu"}, "activation is 'relu', not one of gelu_new, gelu_pytorch_tanh"),
        ({"add_cross_attention": True}, "the model has cross-attention"),
    ],
)
def test_what_cannot_run_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        check_invariant(GPT2_CONFIG | changes)
    assert said in str(caught.value)
    assert "policy 'invariant' cannot run this model" in str(caught.value)
    assert "Accepted: 'single', 'padded:N', 'native' for this model" in str(caught.value)


def test_a_configuration_that_makes_no_model_is_named() -> None:
    with pytest.raises(CheckpointError, match="no usable n_head, n_layer"):
        check_invariant(GPT2_CONFIG | {"n_head": 0, "n_layer": "two"})


def test_checking_a_configuration_loads_no_torch() -> None:
    code = (
        "import json, sys\n"
        "from stablegen.engine.invariant.architectures import check_invariant\n"
        f"check_invariant({GPT2_CONFIG!r})\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_an_architecture_from_outside_runs() -> None:
    register_architecture(Architecture("renamed-gpt2", "Renamed GPT-2", problem, GPT2Renamed))
    model = load_model("random-gpt2")
    config = model.config.to_dict()
    kernels, cpu = ReferenceKernels(), torch.device("cpu")
    found = find_architecture(config | {"model_type": "renamed-gpt2"})
    own = found.build(config, model.state_dict(), kernels, dtype=torch.float32, device=cpu)
    numerics = numerics_on(find_device("cpu", "float32"), load_policy("invariant"), "float32")
    asked = make_request(make_ids(1, 20, 1031), 4)
    expected = alone(make_engine_around(model, numerics, context=256), asked).trace
    assert alone(InvariantEngine(own, numerics), asked).trace == expected


class GPT2Renamed(GPT2):
    """The same forward pass under another name."""


def test_two_architectures_of_one_type_are_refused() -> None:
    known = find_architecture(GPT2_CONFIG)
    register_architecture(known)
    with pytest.raises(PolicyError, match=r"two architectures .* 'gpt2': GPT-2 and Another"):
        register_architecture(Architecture("gpt2", "Another", problem, GPT2))


def test_an_entry_point_is_loaded_when_its_type_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    module = ModuleType("a_package_of_somebody_else")

    class Entry:
        """An entry point of another package."""

        def load(self) -> ModuleType:
            loaded.append("ringed")
            register_architecture(Architecture("ringed", "Ringed", lambda config: "it has a ring", GPT2))
            return module

    def entry_points(*, group: str, name: str) -> list[Entry]:
        assert group == ENTRY_POINTS
        return [Entry()] if name == "ringed" else []

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    check_invariant(GPT2_CONFIG)
    assert loaded == []
    with pytest.raises(PolicyError, match="it has a ring"):
        check_invariant({"model_type": "ringed"})
    assert loaded == ["ringed"]


# --- what a model knows of itself -------------------------------------------------------------------------------------


def test_a_model_counts_its_weights_once() -> None:
    model = load_model("random-gpt2")
    own = GPT2(
        model.config.to_dict(),
        model.state_dict(),
        ReferenceKernels(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert isinstance(own, Model)
    assert own.weight_bytes() == sum(p.numel() * 4 for p in model.parameters())  # tied weights are one parameter
    assert own.kv_cache_bytes_per_page() * 4 == own.new_cache(1, 3).bytes  # a page is spare
