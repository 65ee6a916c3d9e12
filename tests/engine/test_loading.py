"""Engines made from a checkpoint's files: what is damaged or does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import TINY, alone, make_engine, make_ids, make_request

from stablegen.core.policy import load_policy
from stablegen.engine import loading
from stablegen.engine.base import Engine
from stablegen.engine.loading import load_model, load_weights, make_engine_from_files
from stablegen.errors import CheckpointError, DeviceMemoryError
from stablegen.machine.plan import find_device, numerics_on

CPU = torch.device("cpu")
FILES = [TINY / "model.safetensors"]


def engine_of(policy: str, **named: Any) -> Engine:
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    planned = numerics_on(find_device("cpu", "float32"), load_policy(policy), "float32")
    engine = make_engine_from_files(TINY, FILES, config, planned, "cpu", context=1024, **named)
    assert engine.numerics == planned
    return engine


@pytest.mark.parametrize("policy", ["invariant", "single"])
def test_files_make_the_engine_that_a_loaded_model_makes(policy: str) -> None:
    asked = make_request(make_ids(1, 9, 4096), 5)
    expected = alone(make_engine("tiny-gpt2", policy, "float32"), asked).trace
    assert alone(engine_of(policy), asked).trace == expected


@pytest.mark.parametrize(("named", "said"), [({"name": "a-model"}, "a-model"), ({}, str(TINY))])
@pytest.mark.parametrize(("policy", "function"), [("invariant", "load_weights"), ("single", "load_model")])
def test_a_model_that_does_not_fit_is_named(
    policy: str, function: str, named: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(loading, function, full)
    with pytest.raises(DeviceMemoryError, match=f"the model {said} did not fit into the memory of cpu"):
        engine_of(policy, **named)


def test_weights_that_are_damaged_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no tensors")
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    for load in (lambda: load_weights([file]), lambda: load_model(tmp_path, torch.float32, CPU)):
        with pytest.raises(CheckpointError, match=r"cannot be (read|loaded)"):
            load()


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = dict(load_weights(FILES))
    del tensors["transformer.h.0.mlp.c_fc.weight" if "transformer.wte.weight" in tensors else "h.0.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no weights for .*h\.0\.mlp\.c_fc\.weight"):
        load_model(tmp_path, torch.float32, CPU)
