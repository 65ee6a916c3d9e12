"""Planning: each request once, in a shape that is a function of that request alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import request

from stablegen.core.policy import (
    BUCKET,
    CAPACITY_STEP,
    Batch,
    ExecutionPolicy,
    Invariant,
    Limits,
    Native,
    Padded,
    Shape,
    Single,
    capacity_for,
    load_policy,
)
from stablegen.core.request import Request
from stablegen.errors import PolicyError

CONTEXT = 1024
policies = st.one_of(st.just(Single()), st.just(Invariant()), st.just(Native()), st.builds(Padded, st.integers(1, 9)))
waiting = st.lists(st.integers(1, CONTEXT - 1), max_size=40).map(
    lambda lengths: [request((index,) * length) for index, length in enumerate(lengths)]
)
limits = st.builds(Limits, st.just(CONTEXT), st.booleans(), st.booleans())


@given(policies, waiting, limits)
def test_every_request_is_planned_exactly_once(policy: ExecutionPolicy, asked: list[Request], limits: Limits) -> None:
    planned = [row for batch in policy.plan(asked, limits) for _, row in batch.requests]
    assert Counter(map(id, planned)) == Counter(map(id, asked))


@given(st.sampled_from([Single(), Invariant(), Native()]), waiting, limits)
def test_only_padded_pads(policy: ExecutionPolicy, asked: list[Request], limits: Limits) -> None:
    batches = policy.plan(asked, limits)
    assert all(batch.shape.width is None and None not in batch.rows for batch in batches)
    assert [row for batch in batches for row in batch.rows] == asked


@given(waiting, limits)
def test_row_counts(asked: list[Request], limits: Limits) -> None:
    assert [len(batch.rows) for batch in Single().plan(asked, limits)] == [1] * len(asked)
    assert [len(batch.rows) for batch in Native().plan(asked, limits)] == [len(asked)] * bool(asked)
    assert [len(batch.rows) for batch in Invariant().plan(asked, limits)] == [len(asked)] * bool(asked)


@given(st.integers(1, 9), waiting, limits)
def test_padded_shapes_are_fixed(rows: int, asked: list[Request], limits: Limits) -> None:
    policy = Padded(rows)
    batches = policy.plan(asked, limits)
    for batch in batches:
        assert len(batch.rows) == rows
        assert batch.requests
        assert {policy.width(len(row.prompt_ids), CONTEXT) for _, row in batch.requests} == {batch.shape.width}
        if not limits.slot_free:
            assert [slot for slot, _ in batch.requests] == [0]
    # fillers make up the last batch of each width and no more
    real = rows if limits.slot_free else 1
    by_width = Counter(policy.width(len(row.prompt_ids), CONTEXT) for row in asked)
    assert len(batches) == sum(-(-count // real) for count in by_width.values())
    fillers = sum(row is None for batch in batches for row in batch.rows)
    assert fillers == len(batches) * rows - len(asked)


@given(
    st.one_of(st.just(Single()), st.builds(Padded, st.integers(1, 9))),
    st.integers(1, CONTEXT - 1),
    st.integers(1, CONTEXT),
    waiting,
    st.booleans(),
    st.data(),
)
def test_a_shape_is_a_function_of_the_request_alone(
    policy: ExecutionPolicy, length: int, new: int, others: list[Request], static: bool, data: st.DataObject
) -> None:
    one, limits = request((7,) * length, new=new, prompt="the one"), Limits(CONTEXT, static_cache=static)
    (alone,) = policy.plan([one], limits)
    place = data.draw(st.integers(0, len(others)))
    batches = policy.plan([*others[:place], one, *others[place:]], limits)
    beside = next(batch for batch in batches if any(row is one for row in batch.rows))
    assert len(beside.rows) == len(alone.rows)
    shape = alone.shape
    assert beside.shape == shape == policy.shape(length, new, limits)
    assert (shape.capacity is not None) == static
    if shape.capacity is not None:
        assert shape.capacity >= (shape.width or length) + new


@given(st.integers(1, 200_000))
def test_a_capacity_is_at_most_a_quarter_too_long(tokens: int) -> None:
    capacity = capacity_for(tokens)
    assert tokens <= capacity < tokens + max(CAPACITY_STEP, tokens // 4 + 1)
    assert capacity % CAPACITY_STEP == 0


@pytest.mark.parametrize(
    ("tokens", "capacity"),
    [(1, 256), (256, 256), (257, 512), (1024, 1024), (1025, 1280), (2048, 2048), (2049, 2560), (5000, 5120)],
)
def test_capacities(tokens: int, capacity: int) -> None:
    assert capacity_for(tokens) == capacity


@given(st.integers(1, 5000), st.integers(2, 5000))
def test_a_padded_row_is_never_full(length: int, context: int) -> None:
    width = Padded(4).width(length, context)
    if length < context:
        assert length < width <= context
        assert width == context or width % BUCKET == 0
        assert width - length <= BUCKET
    else:
        assert width == context


@pytest.mark.parametrize(
    ("length", "width"), [(1, 64), (63, 64), (64, 128), (127, 128), (128, 192), (959, 960), (1000, 1024), (1023, 1024)]
)
def test_widths(length: int, width: int) -> None:
    assert Padded(8).width(length, CONTEXT) == width


def test_slots_skip_fillers() -> None:
    one, other = request((1,)), request((2,))
    assert Batch((None, one, None, other), Shape(64)).requests == [(1, one), (3, other)]


@pytest.mark.parametrize(
    ("spec", "policy", "promises"),
    [
        ("single", Single(), True),
        ("padded:1", Padded(1), True),
        ("padded:4096", Padded(4096), True),
        ("invariant", Invariant(), True),
        ("native", Native(), False),
    ],
)
def test_policies_by_name(spec: str, policy: ExecutionPolicy, promises: bool) -> None:
    assert load_policy(spec) == policy == load_policy(policy)
    assert policy.spec == str(policy) == spec
    assert policy.promises is promises


@pytest.mark.parametrize(
    "spec",
    ["", "Single", "padded", "padded:", "padded:0", "padded:-1", "padded:4097", "padded:1.5", "padded:8 ", None, 8],
)
def test_an_unknown_policy_is_refused(spec: object) -> None:
    with pytest.raises(
        PolicyError, match="'single', 'padded:N' with N from 1 to 4096, 'invariant', or 'native'"
    ) as info:
        load_policy(spec)  # type: ignore[arg-type]
    assert repr(spec)[:20] in str(info.value)
