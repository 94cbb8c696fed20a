"""Every search stays within its limit, ends, and settles on the best that it has seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.core.method import Method, methods
from layerwise.core.search import Space, Trace

every_search = pytest.mark.parametrize("method", methods("search"), ids=lambda m: m.name)
costs = st.lists(st.integers(-9, 9), min_size=2, max_size=6)
limits = st.integers(1, 40)


def dropping(
    costs: list[int], count: int, optional: bool, neighbours: int = 3
) -> tuple[Space, Callable]:
    """Leave out `count` of some items, neighbours of which hurt each other."""

    def moves(gone: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [tuple(sorted((*gone, i))) for i in range(len(costs)) if i not in gone]

    def loss(gone: tuple[int, ...]) -> float:
        return float(sum(costs[i] for i in gone) + sum(neighbours for i in gone if i + 1 in gone))

    return Space((), moves, lambda gone: len(gone) == count, optional), loss


def run(method: Method, space: Space, loss: Callable, limit: int) -> tuple[Trace, list[Any]]:
    """A search and the states that it evaluated."""
    asked: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    evaluate = lambda states: (asked.extend(states), [loss(s) for s in states])[1]  # noqa: E731
    return method.bind({}, generator=generator)(space, evaluate, limit), asked


@every_search
@given(costs=costs, limit=limits, optional=st.booleans())
def test_within_the_limit_and_deterministic(
    method: Method, costs: list[int], limit: int, optional: bool
) -> None:
    space, loss = dropping(costs, len(costs) - 1, optional)
    trace, asked = run(method, space, loss, limit)
    assert len(asked) <= limit
    assert len(set(asked)) == len(asked)
    assert trace.values == {state: loss(state) for state in asked}
    assert trace.value == loss(trace.state)
    assert run(method, space, loss, limit) == (trace, asked)


@every_search
@given(costs=costs, limit=limits)
def test_never_worse_than_the_start_where_nothing_is_asked_for(
    method: Method, costs: list[int], limit: int
) -> None:
    space, loss = dropping(costs, len(costs), optional=True)
    trace, _ = run(method, space, loss, limit)
    assert trace.value == min(trace.values.values()) <= loss(space.start)


@every_search
@given(costs=costs, data=st.data())
def test_reaches_the_goal(method: Method, costs: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(costs)))
    space, loss = dropping(costs, count, optional=False)
    trace, asked = run(method, space, loss, 1000)
    assert len(trace.state) == count
    assert trace.value == min(loss(state) for state in asked if len(state) == count)


@every_search
@given(costs=costs, data=st.data())
def test_finds_the_best_where_items_do_not_interact(
    method: Method, costs: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(costs)))
    space, loss = dropping(costs, count, optional=False, neighbours=0)
    assert run(method, space, loss, 1000)[0].value == sum(sorted(costs)[:count])


@every_search
def test_ends_where_moves_go_round(method: Method) -> None:
    """A dip at 1 on the way to 4: going back and forth must not last for ever."""
    roads = {0: [1, 2], 1: [0, 2, 3], 2: [0, 1], 3: [1, 4], 4: [3]}
    height = {0: 2.0, 1: 0.0, 2: 6.0, 3: 5.0, 4: 1.0}
    stood: list[int] = []

    def moves(state: int) -> list[int]:
        stood.append(state)
        assert len(stood) < 100
        return roads[state]

    space = Space(0, moves, lambda state: state == 4)
    trace, asked = run(method, space, height.__getitem__, 1000)
    assert trace.state == 4
    assert sorted(asked) == [0, 1, 2, 3, 4]


@every_search
def test_no_move_leaves_the_start(method: Method) -> None:
    trace, asked = run(method, Space(7, lambda s: [], lambda s: False), float, 5)
    assert (trace.state, trace.value, asked) == (7, 7.0, [7])
