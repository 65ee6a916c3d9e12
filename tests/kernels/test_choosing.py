"""Scoring the vocabulary and choosing: what a step logs, and how it advances its slots."""

from __future__ import annotations

import pytest
import torch
from kernel_subjects import (
    FEWER,
    HAS_GPU,
    ROWS,
    VOCABULARIES,
    Layer,
    Subject,
    bits,
    choose,
    moved_rows,
    newest_rows,
    of_pairs,
    of_triton,
    overflows,
    place,
    subjects,
    take,
    tiles_of,
)

from stablegen.engine.invariant.kv_cache import TICKS
from stablegen.kernels import log, scores
from stablegen.kernels.base import Placed, Rows

pytestmark = pytest.mark.usefixtures("chained_products")


def awkward_rows(vocabulary: int) -> torch.Tensor:
    """Return scores of few bits, with ties and extremes at a row's ends and in its middle."""
    middle, last = vocabulary // 2, vocabulary - 1
    cases: list[dict[int, float]] = [
        {},
        {0: 9.0, last: 9.0},
        {middle: 9.0, last: 9.0},
        {0: 9.0, min(1, last): 9.0, last: 9.0},
        {0: 6e4, last: -6e4},
        {last: 6e4, middle: 6e4},
    ]
    rows = torch.randn(len(cases), vocabulary, generator=torch.Generator().manual_seed(3))
    rows = (8 * rows).round() / 8
    for row, changes in zip(rows, cases, strict=True):
        for spot, value in changes.items():
            row[spot] = value
    flat = torch.tensor([[0.0], [-1.0], [1.0]]).expand(3, vocabulary)
    return torch.cat([rows, -rows.abs(), flat])


@subjects()
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_best_two_and_the_hash_are_the_references(subject: Subject, vocabulary: int) -> None:
    rows = awkward_rows(vocabulary)
    chosen = choose(subject, subject.write(torch.eye(len(rows))), Layer.of(subject, rows).prepared)
    assert torch.equal(chosen.scores, rows.to(subject.dtype).float())
    assert chosen.finite.all()
    chosen.check()


@subjects()
def test_of_equal_scores_the_lower_id_comes_first(subject: Subject) -> None:
    rows = [[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-5.0, -3.0, -3.0, -3.0], [2.0, 2.0, 3.0, 1.0]]
    chosen = choose(subject, subject.write(torch.eye(4)), Layer.of(subject, torch.tensor(rows)).prepared)
    assert chosen.words[:, : log.SCORE].tolist() == [[1, 3], [0, 1], [1, 2], [2, 0]]
    assert chosen.words[:, log.SCORE : log.HASH].contiguous().view(torch.float32).tolist() == [
        [3, 3],
        [0, 0],
        [-3, -3],
        [3, 2],
    ]


@of_pairs()
def test_a_zero_has_no_sign_but_for_the_hash(subject: Subject) -> None:
    tiny = torch.tensor([[-1e-37, 1e-37, -1e-37, -1e-26], [-1e-37, -1e-37, -1e-37, -1e-26]])
    x = 1e-9 * torch.eye(2)  # their products are smaller than any float32
    chosen = choose(subject, subject.write(x), Layer.of(subject, tiny).prepared)
    assert len(set(bits(chosen.scores)[:, :3].flatten().tolist())) == 2, "both zeros should have come up"
    assert chosen.words[:, : log.SCORE].tolist() == [[0, 1], [0, 1]]
    assert chosen.words[:, log.SCORE : log.HASH].tolist() == [[0, 0], [0, 0]]
    assert chosen.hashes[0] != chosen.hashes[1]
    chosen.check()


@overflows
@subjects()
def test_a_score_that_is_not_finite_is_flagged_and_no_other_row(subject: Subject) -> None:
    vocabulary = 67
    weight = subject.layer(5, vocabulary).weight
    x = subject.normal(17, 5)
    operand = subject.write(x)
    for row, value in ((1, "inf"), (3, "-inf"), (4, "nan")):
        operand[..., row, 2] = float(value)
    chosen = choose(subject, operand, Layer.of(subject, weight).prepared)
    assert (~chosen.finite).nonzero()[:, 0].tolist() == [1, 3, 4]
    chosen.check()


@overflows
@subjects(dtypes=[torch.bfloat16])
@pytest.mark.parametrize("place", [0, 33, 66])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_infinite_score_suffices(subject: Subject, place: int, sign: int) -> None:
    weight = subject.normal(2, 67).float()
    weight[0] = 0.5
    weight[0, place] = sign * 100.0
    chosen = choose(subject, subject.write(torch.tensor([[3e38, 0.0], [0.0, 1.0]])), Layer.of(subject, weight).prepared)
    assert chosen.scores.isinf().sum() == 1
    assert chosen.finite.tolist() == [False, True]
    chosen.check()


@subjects()
def test_the_hash_sees_one_bit_and_not_the_company(subject: Subject) -> None:
    weight = subject.normal(5, 131).float()
    first = choose(subject, subject.write(torch.eye(5)), Layer.of(subject, weight).prepared)
    assert len(set(first.hashes.tolist())) == 5
    some = choose(subject, subject.write(torch.eye(5)[3:]), Layer.of(subject, weight).prepared)
    assert torch.equal(some.hashes, first.hashes[3:])
    step = {torch.float32: 2.0**-20, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[subject.dtype]
    weight[3, 70] = 1.0
    before = choose(subject, subject.write(torch.eye(5)), Layer.of(subject, weight).prepared)
    weight[3, 70] += step
    after = choose(subject, subject.write(torch.eye(5)), Layer.of(subject, weight).prepared)
    assert (after.scores != before.scores).sum() == 1
    assert (after.hashes != before.hashes).tolist() == [False, False, False, True, False]


@of_triton(dtypes=FEWER)
@pytest.mark.parametrize(("k", "n"), [(300, 67), (768, 50257)] if HAS_GPU else [(300, 67)])
def test_every_tile_of_choose_gives_the_same_bits(subject: Subject, k: int, n: int) -> None:
    layer, x = subject.layer(k, n).prepared, subject.write(subject.normal(20, k))
    first, *others = [choose(subject, x, layer, tile) for tile in tiles_of(scores._tile, layer)]
    first.check()
    assert len(others) > 1
    for other in others:
        assert torch.equal(bits(other.scores), bits(first.scores))
        assert torch.equal(other.words, first.words)


@subjects(dtypes=FEWER)
def test_choose_is_invariant(subject: Subject) -> None:
    count = max(ROWS)
    layer, x = subject.layer(70, 67).prepared, subject.write(subject.normal(count, 70))

    def run(index: torch.Tensor) -> torch.Tensor:
        chosen = choose(subject, take(x, index), layer)
        return torch.cat([bits(chosen.scores), chosen.words], dim=1)

    assert moved_rows(run, count) == []


@subjects()
def test_choose_needs_no_room_for_the_scores(subject: Subject) -> None:
    layer, x = subject.layer(70, 67).prepared, subject.write(subject.normal(3, 70))
    seen = choose(subject, x, layer)
    cache, rows = subject.cache(3, context=64), newest_rows(subject, [0, 1, 2])
    subject.kernels.choose(x, layer, rows, place(rows, cache), cache, None)
    assert torch.equal(cache.log[0].cpu(), seen.words)


@subjects()
def test_choose_advances_its_slots_and_no_others(subject: Subject) -> None:
    device = subject.device
    layer = Layer.of(subject, torch.eye(6)).prepared
    x = subject.write(torch.eye(6)[[4, 2, 5]])
    cache = subject.cache(4, context=128)
    cache.newest.fill_(-3)
    cache.lengths.fill_(-3)
    # five tokens stand in slots 1, 1, 3, spare, 0; wanted are the scores behind the second, the fourth and the last
    slots = torch.tensor([1, 1, 3, cache.spare, 0], dtype=torch.int32, device=device)
    positions = torch.tensor([7, 8, 5, 9, 127], dtype=torch.int32, device=device)
    last = torch.tensor([1, 3, 4], dtype=torch.int32, device=device)
    tick = torch.full((3,), TICKS - 1, dtype=torch.int32, device=device)
    rows = Rows(slots, slots, positions, slots, slots, last, tick, tile=1)
    for _ in range(2):
        subject.kernels.choose(x, layer, rows, Placed(slots, positions, positions), cache, None)
    assert tick.tolist() == [TICKS + 1] * 3
    # slot 2 and slot 3, whose scores were not wanted, are as they were; the spare slot begins anew; the last position
    # that the table knows is the last
    assert cache.newest.tolist() == [5, 4, -3, -3, 2]
    assert cache.lengths.tolist() == [127, 9, -3, -3, 0]
    written = cache.log[:, :, log.TOKEN].ne(-7).nonzero().tolist()
    assert written == [[entry, row] for entry in (0, TICKS - 1) for row in range(3)], "the log should begin anew"
    assert torch.equal(cache.log[0, :3], cache.log[TICKS - 1, :3])
    assert cache.log[0, :3, log.TOKEN].tolist() == [4, 2, 5]
    assert cache.log.shape[2] == log.WIDTH
