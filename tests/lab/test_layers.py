"""The layers of a transformer alone and in batches: the vendor's move, stablegen's do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import save, small_llama

from stablegen.errors import DeviceMemoryError, ParameterError
from stablegen.lab import layers
from stablegen.lab.reports.layers import EMBEDDING, HEAD, LayersReport, attention_of, mlp_of
from stablegen.lab.reports.wording import SAME_BITS, short_number
from stablegen.lab.subject import load_subject
from stablegen.machine.plan import find_device
from stablegen.sources.checkpoint import CheckpointSource


def test_every_half_of_every_layer_is_compared(streams: LayersReport) -> None:
    names = [EMBEDDING, *(name for i in range(6) for name in (attention_of(i), mlp_of(i))), "scores"]
    assert len(streams.runs) == 2 * 2 * 2  # kernels, batches, stages
    for one in streams.runs:
        assert [layer.layer for layer in one.layers] == names
        assert min(layer.largest for layer in one.layers) > 0


def test_transformers_moves_and_stablegen_does_not(streams: LayersReport) -> None:
    moved = {
        kernels: [one for one in streams.runs if one.kernels == kernels and one.first]
        for kernels in ("vendor", "stablegen")
    }
    assert moved["vendor"]
    assert not moved["stablegen"]
    run = moved["vendor"][-1]
    assert run.worst is not None
    assert run.worst.max_abs == max(one.max_abs for one in run.layers[:-1])
    assert "stablegen moved in 0 of 4 runs" in streams.meaning
    still = next(one for one in streams.runs if one.kernels == "stablegen").cells(short_number)
    assert (still[0].text, still[2], still[4], len(still)) == ("none", SAME_BITS, SAME_BITS, len(HEAD) - 3)
    assert run.cells(short_number)[2].moved


def test_both_record_the_same_numbers() -> None:
    """The stream through stablegen's kernels is transformers' own, but for rounding."""
    subject = load_subject(CheckpointSource.open(None), find_device("cpu", "float32"), "float32")
    sequences = layers._sequences(subject, 5, 3, 0)
    mine, theirs = layers._Own(subject, 3, 5).run(sequences), layers._Vendor(subject).run(sequences)
    assert set(mine) == set(theirs) == {"prefill", "decode"}
    for stage, stream in mine.items():
        assert set(stream) == set(theirs[stage])
        for layer, value in stream.items():
            other = theirs[stage][layer]
            if value.shape != other.shape:  # of the last layer only rows whose scores are needed are computed
                assert layer == mlp_of(5)
                other = other[-1:]
            torch.testing.assert_close(value, other.reshape(value.shape), rtol=1e-3, atol=1e-3)


def test_a_model_that_stablegens_kernels_do_not_run(tmp_path: Path) -> None:
    found = layers.measure(
        model=str(save(small_llama(), tmp_path)), dtypes=("float32",), batches=(2,), length=4, device="cpu"
    )
    assert "the model is 'llama'" in found.unavailable["stablegen"]
    assert [one.layer for one in found.runs[0].layers][:3] == ["embedding", "0 attention", "0 MLP"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batches": ()}, "batch="),
        ({"batches": (1, 2)}, "batch=1,2"),
        ({"length": 0}, "length=0"),
        ({"length": 5000}, "length=5000"),
        ({"model": "gpt2", "random_weights": True}, "together with random weights"),
    ],
)
def test_layers_that_cannot_be_measured(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        layers.measure(dtypes=("float32",), device="cpu", **given)


def test_a_batch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(layers._Vendor, "run", full)
    with pytest.raises(DeviceMemoryError, match="a batch of 1 rows did not fit"):
        layers.measure(dtypes=("float32",), device="cpu")


def test_a_model_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch, small_model: str) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("stablegen.lab.subject.load_model", full)
    with pytest.raises(DeviceMemoryError, match="did not fit into the memory of cpu"):
        layers.measure(model=small_model, dtypes=("float32",), device="cpu")
