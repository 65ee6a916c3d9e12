"""Affine layers of both kernel sets: against float64, and bit for bit in other company."""

from __future__ import annotations

import pytest
import torch
from kernel_subjects import (
    FEWER,
    HAS_GPU,
    ROWS,
    SHAPES,
    SUM_TOLERANCE,
    TOLERANCE,
    Layer,
    Subject,
    add_up,
    bits,
    error,
    feed_forward,
    in_float32,
    make_rows,
    moved_rows,
    of_pairs,
    of_triton,
    overflows,
    place,
    sequence,
    subjects,
    take,
    tiles_of,
)

from stablegen.kernels import linear, tiles

pytestmark = pytest.mark.usefixtures("chained_products")


@subjects()
@pytest.mark.parametrize("m", [2, 17])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_linear_is_accurate(subject: Subject, k: int, n: int, m: int) -> None:
    layer, x = subject.layer(k, n), subject.normal(m, k)
    result = add_up(subject.kernels.partial(subject.write(x), layer.prepared))
    assert error(result, x.double() @ layer.weight) < SUM_TOLERANCE


@subjects()
@pytest.mark.parametrize("m", [2, 17])
def test_feed_forward_is_accurate(subject: Subject, m: int) -> None:
    up, down = subject.layer(70, 300), subject.layer(300, 20, seed=3)
    x = subject.normal(m, 70)
    inner = torch.nn.functional.gelu(x.double() @ up.weight + up.bias, approximate="tanh")
    assert error(feed_forward(subject, subject.write(x), up, down), inner @ down.weight) < TOLERANCE[subject.dtype]


@subjects()
def test_qkv_is_accurate(subject: Subject) -> None:
    heads, size = 2, 12  # a column tile holds ends of queries, keys and heads
    layer, x = subject.layer(70, 3 * heads * size), subject.normal(19, 70)
    cache = subject.cache(2, heads=heads, size=size)
    rows = make_rows(subject, [(1, range(60, 70)), (0, range(9))])
    placed = place(rows, cache)
    query = subject.kernels.qkv(subject.write(x), layer.prepared, cache, 0, rows, placed)
    exact = (x.double() @ layer.weight + layer.bias).view(19, 3, heads, size)
    assert error(subject.read(query), exact[:, 0].flatten(1)) < TOLERANCE[subject.dtype]
    for kept, expected in ((cache.keys, exact[:, 1]), (cache.values, exact[:, 2])):
        for slot, start, stop, part in ((1, 60, 70, expected[:10]), (0, 0, 9, expected[10:])):
            found = subject.read(sequence(kept, cache, slot))
            assert error(found[:, start:stop], part.transpose(0, 1)) < TOLERANCE[subject.dtype]
            assert found.isnan().sum() == found[:, stop - start :].numel()  # nothing else was written


@in_float32()
@pytest.mark.parametrize("m", [9, 18])
def test_gelu_holds_at_both_ends(subject: Subject, m: int) -> None:
    x = torch.tensor([-1e5, -100.0, -10.0, -1e-3, 0.0, 1e-3, 10.0, 100.0, 1e5]).repeat(m // 9)[:, None]
    one = Layer.of(subject, torch.ones(1, 1))
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    result = feed_forward(subject, subject.write(x), one, one).cpu()
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-9)


@of_pairs()
@pytest.mark.parametrize("k", [768, 3072])
def test_pairs_are_as_good_as_a_librarys_float32(subject: Subject, k: int) -> None:
    assert torch.get_float32_matmul_precision() == "highest", "TF32 is no float32"
    layer, x = subject.layer(k, 768 if HAS_GPU else 32), subject.normal(8, k)
    exact = x.double() @ layer.weight
    library = error(x.to(subject.device) @ layer.weight.float().to(subject.device), exact)
    assert error(add_up(subject.kernels.partial(subject.write(x), layer.prepared)), exact) <= 2 * library


def test_the_order_of_a_sum_is_no_matter_of_rows() -> None:
    for k, n in SHAPES:
        plan = tiles.linear_plan(n, k)
        assert plan.slice_k % plan.block_k == 0
        assert (plan.splits - 1) * plan.slice_k < k <= plan.splits * plan.slice_k
    assert tiles.linear_plan(20, 300).splits == 2, "the tests below want slices to add up"


@of_triton(dtypes=FEWER)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_every_tile_gives_the_same_bits(subject: Subject, k: int, n: int) -> None:
    layer, x = subject.layer(k, n), subject.write(subject.normal(70 if HAS_GPU else 33, k))
    taken = tiles_of(tiles.linear_tile, layer.prepared)
    assert {tile.split_programs for tile in taken} == {True, False}, "slices should meet in both ways"
    sums = [bits(add_up(linear.partial(x, layer.prepared, tile=tile))) for tile in taken]
    inner = [bits(linear.gelu(x, layer.prepared, tile=tile)) for tile in taken]
    assert all(torch.equal(found, sums[0]) for found in sums)
    assert all(torch.equal(found, inner[0]) for found in inner)


@of_triton(dtypes=FEWER)
def test_every_tile_of_qkv_gives_the_same_bits(subject: Subject) -> None:
    layer, x = subject.layer(300, 48), subject.write(subject.normal(33, 300))
    places = torch.arange(33, dtype=torch.int32, device=subject.device)
    results = []
    for tile in tiles_of(tiles.linear_tile, layer.prepared):
        cache = subject.cache(1)
        keys, values = cache.keys[0], cache.values[0]
        query = linear.qkv(x, layer.prepared, keys, values, places, tile=tile)
        assert not keys[..., :1, :, :33, :].isnan().any()
        results.append([bits(part) for part in (query, keys, values)])
    for found in results:
        assert all(map(torch.equal, found, results[0]))


@of_triton(dtypes=FEWER)
def test_summands_give_the_bits_of_one_program(subject: Subject) -> None:
    up, down = subject.layer(300, 100), subject.layer(100, 20, seed=3)
    x = subject.write(subject.normal(17, 300))
    summands = linear.partial(x, up.prepared, tile=tiles.linear_tile(up.prepared, 1))
    assert len(summands) == 2
    expected = add_up(linear.partial(linear.gelu(x, up.prepared), down.prepared))
    for rows in (1, 2, 16, 17):
        few = summands[:, :rows].contiguous()
        found = linear.partial(few, down.prepared, up.prepared, tile=tiles.linear_tile(down.prepared, 1))
        assert torch.equal(add_up(found), expected[:rows]), rows


@subjects(dtypes=FEWER)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_linear_is_invariant(subject: Subject, k: int, n: int) -> None:
    count = max(ROWS)
    layer, x = subject.layer(k, n), subject.write(subject.normal(count, k))
    run = lambda index: add_up(subject.kernels.partial(take(x, index), layer.prepared))  # noqa: E731
    assert moved_rows(run, count) == []


@subjects(dtypes=FEWER)
def test_feed_forward_is_invariant(subject: Subject) -> None:
    count = max(ROWS)
    up, down = subject.layer(70, 300), subject.layer(300, 20, seed=3)
    x = subject.write(subject.normal(count, 70))
    assert moved_rows(lambda index: feed_forward(subject, take(x, index), up, down), count) == []


@overflows
@subjects(dtypes=FEWER)
@pytest.mark.parametrize("m", [16, 17])
@pytest.mark.parametrize("neighbour", [6e4, float("inf"), float("nan")])
def test_linear_ignores_its_neighbours(subject: Subject, neighbour: float, m: int) -> None:
    up, down = subject.layer(70, 100), subject.layer(100, 20, seed=3)
    x = subject.write(subject.normal(m, 70))
    expected = feed_forward(subject, x, up, down)
    x[..., 1:, :] = neighbour
    assert torch.equal(feed_forward(subject, x, up, down)[0], expected[0])


@subjects(dtypes=[torch.float16, torch.bfloat16])
def test_linear_ignores_where_its_rows_begin(subject: Subject) -> None:
    layer, x = subject.layer(101, 20), subject.write(subject.normal(5, 101))  # 202 bytes a row: few begin aligned
    expected = add_up(subject.kernels.partial(x, layer.prepared))
    for i in range(1, 5):
        assert torch.equal(add_up(subject.kernels.partial(x[i:], layer.prepared)), expected[i:])


@of_triton()
def test_a_sum_split_by_batch_size_is_caught(subject: Subject) -> None:
    x = subject.normal(33, 128)
    layer, first, second = (
        Layer.of(subject, subject.layer(128, 20).weight[part]) for part in (slice(None), slice(50), slice(50, None))
    )

    def split_when_few(index: torch.Tensor) -> torch.Tensor:
        rows = x[index]
        if len(index) >= 16:
            return add_up(linear.partial(subject.write(rows), layer.prepared))
        halves = (rows[:, :50], first.prepared), (rows[:, 50:], second.prepared)
        return add_up(torch.cat([linear.partial(subject.write(half), half_layer) for half, half_layer in halves]))

    moved = moved_rows(split_when_few, 33)
    assert "the first 1" in moved
    assert "permuted" not in moved
