"""Every edit of the execution order: a valid wiring, and none at its neutral setting."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Identity

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, find, methods
from layerwise.core.stack import Layer, Stack, Visit, Wiring, plain_wiring
from layerwise.core.stats import Scores
from layerwise.core.visits import entries_of, parse_wiring, read_wiring
from layerwise.edit.stack.collapse import combined

#: method -> options that change as much as a number says, 0 for nothing
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "collapse": lambda count: {"count": count},
    "drop": lambda count: {"count": count},
    "recur": lambda count: {"times": (count + 1,)},
    "side_by_side": lambda count: {"width": count + 1},
    "tie": lambda count: {"count": count, "rank": 4},
}
every_edit = pytest.mark.parametrize("method", methods("stack"), ids=lambda m: m.name)
values = st.lists(st.floats(-2, 2), min_size=1, max_size=8)


def a_stack(depth: int, wiring: Wiring | None = None) -> Stack:
    layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(depth))
    return Stack("decoder", "layers", layers, wiring or plain_wiring(depth))


def scores(values: list[float], unit: str = "layer") -> Scores:
    """Of the stack, and of another one that must not matter."""
    mine = {f"decoder/{i}": value for i, value in enumerate(values)}
    return Scores({"decoder2/0": -9.0, **mine, "decoder2/1": -9.0}, unit, "")


@every_edit
@given(values=values, data=st.data())
def test_a_valid_wiring(method: Method, values: list[float], data: st.DataObject) -> None:
    stack = a_stack(len(values))
    count = data.draw(st.integers(0, len(values) - 1))
    given = {"similarity": lambda wiring: values[len(wiring) - 1] / 2}
    wiring = method.bind(OPTIONS[method.name](count), **given)(stack, scores(values))
    assert wiring
    assert {visit.layer for visit in wiring} <= {visit.layer for visit in stack.wiring}
    assert parse_wiring(entries_of(wiring), len(values), "") == _numbered(wiring)
    assert method.bind({}, **given)(stack, scores(values)) == stack.wiring


def _numbered(wiring: Wiring) -> Wiring:
    """Groups under the number of their first visit, as they are read."""
    first: dict[int, int] = {}
    for place, visit in enumerate(wiring):
        if visit.parallel is not None:
            first.setdefault(visit.parallel, place)
    return tuple(
        v if v.parallel is None else replace(v, parallel=first[v.parallel]) for v in wiring
    )


def test_recur_is_the_reuse_map() -> None:
    found = find("intra_layer_recurrence").bind({"times": (4, 2, 1, 1)})(a_stack(4), scores([]))
    assert [visit.layer for visit in found] == [0, 0, 0, 0, 1, 1, 2, 3]
    assert read_wiring("0*4,1*2,2,3") == entries_of(found)


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("recur", {"times": (1, 1, 1, 1, 1)}, "at most 4 numbers"),
        ("recur", {"times": (0,)}, "each 1 or more"),
        ("side_by_side", {"first": 3, "width": 2}, "found 2 from 3 on"),
    ],
)
def test_orders_that_are_none(name: str, options: dict[str, Any], found: str) -> None:
    with pytest.raises(LayerwiseError, match=found):
        find(name).bind(options)(a_stack(4), scores([]))


@pytest.mark.parametrize(
    ("how", "wanted"), [("sum", 9.0), ("mean", 11 / 3), ("last", 6.0)], ids=str
)
def test_worked_example_of_a_merge(how: str, wanted: float) -> None:
    """Weights 1, 4 and 6: `1 + 3 + 5 = 9` by the paper, 6 by its code."""
    visit = combined([Visit(0), Visit(1), Visit(2)], how)
    assert sum(share * (1, 4, 6)[layer] for layer, share in visit.mix or ()) == pytest.approx(
        wanted
    )


def test_a_merge_of_what_was_merged() -> None:
    """`b + (c - b) + (d - b)`, then `a + (that - a) + (e - a)`, each from its definition."""
    inner = combined([Visit(1), Visit(2), Visit(3)], "sum")
    outer = combined([Visit(0), inner, Visit(4)], "sum")
    a, b, c, d, e = 2.0, 3.0, 5.0, 7.0, 11.0
    merged = b + (c - b) + (d - b)
    wanted = a + (merged - a) + (e - a)
    found = sum(share * (a, b, c, d, e)[layer] for layer, share in outer.mix or ())
    assert found == pytest.approx(wanted)


def test_collapse_merges_from_the_end_where_outputs_stay_similar() -> None:
    asked: list[list[int]] = []

    def similarity(wiring: Wiring) -> float:
        asked.append([visit.layer for visit in wiring])
        return 0.9 if wiring[-1] == Visit(5) else 0.1  # the last layer is needed as it is

    bind = find("laco").bind({"count": 2, "width": 2}, similarity=similarity)
    found = bind(a_stack(6), scores([]))
    assert asked[0] == [0, 1, 2, 3, 4]
    assert [visit.layer for visit in found] == [0, 1, 2, 5]
    assert [visit.mix for visit in found] == [None, None, ((4, 1),), None]


@pytest.mark.parametrize("options", [{"count": 4}, {"count": 1, "width": 1}])
def test_merges_that_are_none(options: dict[str, int]) -> None:
    bind = find("collapse").bind(options, similarity=lambda wiring: 1.0)
    with pytest.raises(LayerwiseError, match="0 to 3 layers, a width of 2 or more"):
        bind(a_stack(4), scores([]))


@given(values=values, data=st.data())
def test_drop_leaves_out_the_least_important(values: list[float], data: st.DataObject) -> None:
    stack = a_stack(len(values))
    count = data.draw(st.integers(0, len(values) - 1))
    kept = [visit.layer for visit in find("drop").bind({"count": count})(stack, scores(values))]
    gone = [i for i in range(len(values)) if i not in kept]
    assert len(gone) == count
    assert kept == sorted(kept)
    assert max((values[i] for i in gone), default=-9) <= min(values[i] for i in kept)


@pytest.mark.parametrize("count", [-1, 4, 5])
def test_nothing_would_remain(count: int) -> None:
    with pytest.raises(LayerwiseError, match=f"count.*0 to 3 of 4 layers.*found {count}"):
        find("drop").bind({"count": count})(a_stack(4), scores([1.0] * 4))


def test_drop_of_a_span() -> None:
    spans = scores([0.2, 0.1, 0.3], "span")
    wiring = find("drop").bind({"count": 2})(a_stack(4), spans)
    assert wiring == (Visit(0), Visit(3))


def test_drop_counts_layers_where_some_run_twice_or_not_at_all() -> None:
    looped = a_stack(4, (Visit(0), Visit(1), Visit(1), Visit(3)))
    found = scores([3.0, 1.0, 0.0, 2.0])
    assert find("drop").bind({"count": 1})(looped, found) == (Visit(0), Visit(3))
    assert find("drop").bind({"count": 2})(looped, found) == (Visit(0),)
    with pytest.raises(LayerwiseError, match="0 to 2 of 3 layers"):
        find("drop").bind({"count": 3})(looped, found)
