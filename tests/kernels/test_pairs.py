"""Pairs of float16 in place of float32: how good they are, and what happens at their limits."""

from __future__ import annotations

import pytest
import torch
from kernel_subjects import (
    SUM_TOLERANCE,
    Layer,
    Subject,
    add_up,
    attend,
    choose,
    error,
    in_float32,
    make_rows,
    newest_rows,
    of_pairs,
    overflows,
    subjects,
)

pytestmark = pytest.mark.usefixtures("chained_products")


@of_pairs()
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e30])
def test_pairs_hold_22_bits(subject: Subject, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    small = 2.0 ** -(27 * torch.rand(64, 40, generator=generator))
    weight = scale * small * torch.randn(64, 40, generator=generator).sign()
    weight[0, 0] = scale
    prepared = subject.kernels.prepare(weight.to(subject.device), None)
    assert prepared.exponent is not None
    high, low = prepared.weight.cpu().double()
    found = (high + low * 2.0**-11).t() * 2.0**-prepared.exponent
    assert ((found - weight.double()).abs() / weight.double().abs()).max() <= 2.0**-22


@in_float32()
@pytest.mark.parametrize("scale", [1e-40, 1e-37, 1e-30, 1e30, 3e38])
def test_weights_of_any_size_are_multiplied(subject: Subject, scale: float) -> None:
    x = torch.tensor([[1.0, 0.5, -0.25]])
    layer = Layer.of(subject, scale * torch.tensor([[1.0, 0.25], [-0.5, 0.5], [1.0, 1.0]]))
    result = add_up(subject.kernels.partial(subject.write(x), layer.prepared)).cpu().double()
    # numbers as small as the first two have few bits left
    assert error(result / scale, x.double() @ layer.weight / scale) < (0.1 if scale < 1e-36 else 2e-6)


@subjects()
def test_a_weight_of_zeros_gives_zeros(subject: Subject) -> None:
    layer = Layer.of(subject, torch.zeros(70, 20))
    result = add_up(subject.kernels.partial(subject.write(subject.normal(2, 70)), layer.prepared))
    assert torch.equal(result.cpu(), torch.zeros(2, 20))


@of_pairs()
def test_activations_up_to_a_million_survive(subject: Subject) -> None:
    layer, x = subject.layer(70, 20), subject.normal(3, 70)
    x[1] *= 1e6 / x[1].abs().max()
    x[2, 7] = -1.04e6
    result = add_up(subject.kernels.partial(subject.write(x), layer.prepared))
    for found, row in zip(result, x, strict=True):
        assert error(found, row.double() @ layer.weight) < SUM_TOLERANCE


@overflows
@of_pairs()
@pytest.mark.parametrize("m", [3, 17])
def test_larger_activations_are_flagged_all_the_way(subject: Subject, m: int) -> None:
    """What overflows between two layers must not become a number again on its way to the scores."""
    kernels = subject.kernels
    weight = subject.layer(20, 40).weight
    weight[7, 5] = 1e6
    up, down, head = Layer.of(subject, weight), subject.layer(40, 20, seed=3), subject.layer(20, 67, seed=5)
    x = subject.normal(m, 20)
    x[:, 7] = 0.1
    x[1, 7] = 2.0  # its activation 5 is two millions
    hidden = kernels.partial(kernels.gelu(subject.write(x), up.prepared), down.prepared, up.prepared)
    stream = torch.zeros(m, 20, device=subject.device)
    _, normed = kernels.add_norm(stream, hidden, down.prepared, subject.norm(20))
    chosen = choose(subject, normed, head.prepared)
    assert chosen.finite.tolist() == [i != 1 for i in range(m)]


@overflows
@of_pairs()
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_larger_activations_never_leave_attention_as_numbers(subject: Subject, part: str) -> None:
    layer, x = subject.layer(20, 48), subject.normal(20, 20)
    layer.prepared.bias[["query", "key", "value"].index(part) * 16 + 3] = 2e6  # type: ignore[index]
    cache = subject.cache(1)
    by_tiles = attend(subject, cache, x, layer, make_rows(subject, [(0, range(20))]))
    cache.lengths[0] = 19
    newest = attend(subject, cache, x[19:], layer, newest_rows(subject, [0]))
    reached = slice(3, 4) if part == "value" else slice(None)
    assert not torch.isfinite(subject.read(by_tiles)[:, reached]).any()
    assert not torch.isfinite(subject.read(newest)[:, reached]).any()
