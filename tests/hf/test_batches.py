"""A row is the same in every batch, and from a hit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from generating import (
    BY_POLICY,
    IN_FULL,
    NAMES,
    NEW,
    ORDERS,
    assert_as_alone,
    assert_equal_rows,
    case_of,
    each_alone,
    emptied,
    in_full,
    one,
    ours,
    padded,
    rows_of,
)

from stablegen.client import Client


@BY_POLICY
@NAMES
def test_an_argument_gives_a_row_the_same_in_every_batch(
    name: str, policy: str, small: Any, clients: dict[str, Client]
) -> None:
    rows, arguments = case_of(name, small)
    asking = clients[policy]
    alone = each_alone(asking, rows, **arguments)
    assert len({completion.token_ids for completion in alone}) > 1
    for order in ORDERS:
        assert_as_alone(in_full(emptied(asking), padded([rows[place] for place in order]), **arguments), alone, order)
    assert_as_alone(in_full(asking, padded(rows), **arguments), alone, range(8), cached=True)


def test_transformers_own_numerics_tell_the_batches_apart(small: Any, anew: Callable[..., Client]) -> None:
    asking, rows = anew(small, policy="native"), rows_of()
    alone = each_alone(asking, rows)
    batch = in_full(emptied(asking), padded(rows)).completions
    assert any(mine.trace != other.trace for mine, other in zip(batch, alone, strict=True))


@BY_POLICY
def test_scores_of_a_row_are_the_same_in_every_batch_and_from_a_hit(policy: str, clients: dict[str, Client]) -> None:
    asking = emptied(clients[policy])
    rows = rows_of()[:3]
    free = ours(asking, one(rows[1]), return_dict_in_generate=True).completions[0].token_ids
    arguments = {"repetition_penalty": 1.1, "eos_token_id": free[3], "renormalize_logits": True} | IN_FULL
    alone = [ours(asking, one(row), **arguments) for row in rows]
    lengths = [len(out.scores) for out in alone]
    assert min(lengths) < max(lengths) == NEW
    run = ours(emptied(asking), padded(rows), **arguments)
    hit = ours(asking, padded(rows), **arguments)
    assert [done.cached for done in (*run.completions, *hit.completions)] == [False] * 3 + [True] * 3
    assert_equal_rows(hit.scores, run.scores)
    assert_equal_rows(hit.logits, run.logits)
    for row, length in enumerate(lengths):
        for kind in ("scores", "logits"):
            assert_equal_rows([step[row] for step in run[kind]][:length], [step[0] for step in alone[row][kind]])
            assert not any(step[row].any() for step in run[kind][length:])  # those of rows that have ended are 0
        assert run.completions[row].trace.scores == tuple(
            run.scores[step][row, token].item() for step, token in enumerate(run.completions[row].token_ids)
        )
