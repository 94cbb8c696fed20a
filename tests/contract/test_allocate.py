"""Every allocator meets the budget; the exact one is as good as trying everything."""

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layerwise.core.damage import Choice, Damage, Menu, Option, cost, staying
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, find, methods

Problem = tuple[Damage, dict[str, Menu]]
Row = list[tuple[int, float]]
every_allocator = pytest.mark.parametrize("method", methods("allocate"), ids=lambda m: m.name)


def problem(rows: list[Row]) -> Problem:
    """Groups from rows of (bytes, loss): the first option is the largest and damages nothing.

    The loss at its place is the importance of the group.
    """
    menus, values, importance = {}, {}, {}
    for number, row in enumerate(rows):
        sizes = sorted((size for size, _ in row), reverse=True)
        options = tuple(Option((), size, f"{i}") for i, size in enumerate(sizes))
        group = f"g{number}"
        menus[group] = Menu(group, options)
        values[group] = (0.0, *(float(loss) for _, loss in row[1:]))
        importance[group] = float(row[0][1])
    return Damage(values, importance), menus


def tables(sizes: st.SearchStrategy[int], losses: st.SearchStrategy) -> st.SearchStrategy:
    row = st.lists(st.tuples(sizes, losses), min_size=1, max_size=4)
    return st.lists(row, min_size=1, max_size=4)


small = tables(st.integers(1, 40), st.integers(0, 30))
shares = st.floats(0, 1)


def bounds(menus: dict[str, Menu]) -> tuple[int, int]:
    """Bytes of the smallest and of the largest choice."""
    sizes = [[option.bytes for option in menu.options] for menu in menus.values()]
    return sum(map(min, sizes)), sum(map(max, sizes))


def between(menus: dict[str, Menu], share: float) -> int:
    low, high = bounds(menus)
    return round(low + share * (high - low))


def total(damage: Damage, choice: Choice) -> float:
    return sum(damage.values[group][option] for group, option in choice.items())


def least(damage: Damage, menus: dict[str, Menu], budget: int) -> float:
    """The least damage within the budget, by trying every choice."""
    every = product(*(range(len(menu.options)) for menu in menus.values()))
    choices = [dict(zip(menus, numbers, strict=True)) for numbers in every]
    return min(total(damage, choice) for choice in choices if cost(menus, choice) <= budget)


@every_allocator
@given(rows=small, share=shares)
def test_one_option_per_group_within_the_budget(
    method: Method, rows: list[Row], share: float
) -> None:
    damage, menus = problem(rows)
    budget = between(menus, share)
    choice = method.function(damage, menus, budget)
    assert choice.keys() == menus.keys()
    assert all(0 <= choice[g] < len(menu.options) for g, menu in menus.items())
    assert cost(menus, choice) <= budget
    assert method.function(damage, menus, budget) == choice


@every_allocator
@given(rows=small)
def test_an_impossible_budget_is_answered_with_the_smallest_possible(
    method: Method, rows: list[Row]
) -> None:
    damage, menus = problem(rows)
    smallest, _ = bounds(menus)
    assert cost(menus, method.function(damage, menus, smallest)) == smallest
    with pytest.raises(
        LayerwiseError, match=f"at least {smallest:,} bytes.*found {smallest - 1:,}"
    ):
        method.function(damage, menus, smallest - 1)


@every_allocator
@given(rows=small)
def test_nothing_is_damaged_where_all_fits(method: Method, rows: list[Row]) -> None:
    damage, menus = problem(rows)
    choice = method.function(damage, menus, bounds(menus)[1])
    assert total(damage, choice) == 0 or cost(menus, choice) == bounds(menus)[1]


@given(rows=small, share=shares)
def test_knapsack_is_as_good_as_trying_everything(rows: list[Row], share: float) -> None:
    damage, menus = problem(rows)
    budget = between(menus, share)
    choice = find("knapsack").function(damage, menus, budget)
    assert total(damage, choice) == pytest.approx(least(damage, menus, budget), abs=1e-9)


real = tables(st.integers(10**6, 10**9), st.floats(-6, 1).map(lambda e: 10.0**e))
a_byte_apart = [(10**6 + 2, 1.0), (10**6 + 1, 10.0), (10**6, 1.0)]


@given(
    rows=real,
    numbers=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    off=st.integers(-1, 1),
)
@example(rows=[[(10**6, 1.0)], a_byte_apart], numbers=[0, 0, 0, 0], off=-1)
def test_knapsack_of_real_sizes_at_the_very_edge(
    rows: list[Row], numbers: list[int], off: int
) -> None:
    """The budget is the cost of some choice, one byte more or less; damages span decades."""
    damage, menus = problem(rows)
    edge = {g: n % len(m.options) for (g, m), n in zip(menus.items(), numbers, strict=False)}
    budget = max(cost(menus, edge) + off, bounds(menus)[0])
    choice = find("knapsack").function(damage, menus, budget)
    assert cost(menus, choice) <= budget
    worst = max(max(values) for values in damage.values.values())
    assert total(damage, choice) <= least(damage, menus, budget) + 2e-6 * worst


@given(rows=small, first=shares, second=shares)
def test_a_larger_budget_never_damages_more(rows: list[Row], first: float, second: float) -> None:
    damage, menus = problem(rows)
    budgets = (between(menus, share) for share in sorted((first, second)))
    less, more = (total(damage, find("knapsack").function(damage, menus, b)) for b in budgets)
    assert more <= less + 1e-9


@every_allocator
@given(rows=small, share=shares)
def test_options_listed_twice_change_nothing(method: Method, rows: list[Row], share: float) -> None:
    damage, menus = problem(rows)
    twice = {g: Menu(g, tuple(o for o in m.options for _ in "ab")) for g, m in menus.items()}
    values = {g: tuple(d for d in found for _ in "ab") for g, found in damage.values.items()}
    budget = between(menus, share)
    choice = method.function(Damage(values, damage.importance), twice, budget)
    single = method.function(damage, menus, budget)
    assert cost(twice, choice) <= budget
    if method.name == "knapsack":
        assert total(Damage(values, {}), choice) == pytest.approx(total(damage, single), abs=1e-9)
    else:
        assert cost(twice, choice) == cost(menus, single)


def alike(importance: list[float]) -> Problem:
    """Groups with the same menu of 16, 4 and 2 bytes."""
    return problem([[(16, i), (4, 1.0), (2, 3.0)] for i in importance])


@given(importance=st.lists(st.floats(0, 1), min_size=5, max_size=5), budget=st.integers(10, 80))
def test_threshold_prefers_the_important(importance: list[float], budget: int) -> None:
    damage, menus = alike(importance)
    choice = find("two_level").function(damage, menus, budget)
    ranked = sorted(menus, key=lambda g: -damage.importance[g])
    given_bytes = [menus[g].options[choice[g]].bytes for g in ranked]
    assert given_bytes == sorted(given_bytes, reverse=True)
    assert len(set(given_bytes)) <= 2


@pytest.mark.parametrize(
    ("budget", "expected"), [(16, [1, 1, 1, 1]), (41, [0, 0, 1, 1]), (13, [1, 1, 2, 2])]
)
def test_uniform_is_one_option_and_the_rest_in_network_order(
    budget: int, expected: list[int]
) -> None:
    damage, menus = alike([0.0, 1.0, 2.0, 3.0])
    assert list(find("uniform").function(damage, menus, budget).values()) == expected


def test_water_finds_one_level() -> None:
    """Losses 4 and 1 at 2 bits, four times less for every further bit: one bit goes over."""
    menus, values = {}, {}
    for group, scale in (("a", 4.0), ("b", 1.0)):
        options = tuple(Option((), 100 * bits, f"{bits}") for bits in (4, 3, 2, 1))
        menus[group] = Menu(group, options)
        values[group] = tuple(scale * 4.0 ** (2 - bits) for bits in (4, 3, 2, 1))
    damage = Damage(values, {"a": 4.0, "b": 1.0})
    choice = find("waterfill").bind()(damage, menus, 500)
    assert {g: menus[g].options[i].label for g, i in choice.items()} == {"a": "3", "b": "2"}
    assert total(damage, choice) == 2.0


def holding(rows: list[Row], sizes: list[tuple[int, float]], pair: float) -> Problem:
    """Groups of which the first two are in one unit each, which may go; each unit has its bytes."""
    damage, menus = problem(rows)
    units = {f"u{i}": size for i, size in enumerate(sizes)}
    found = {
        name: Menu(name, (Option((), own, "stays"), Option((), 0, "left out", gone=True)))
        for name, (own, _) in units.items()
    }
    inner = [m._replace(inside=f"u{min(i, len(sizes) - 1)}") for i, m in enumerate(menus.values())]
    found |= {menu.group: menu for menu in inner}
    values = {**damage.values, **{name: (0.0, float(loss)) for name, (_, loss) in units.items()}}
    return Damage(values, dict.fromkeys(values, 0.0), {("u0", "u1"): pair}), found


def weighed(damage: Damage, menus: dict[str, Menu], choice: Choice) -> float:
    """What is left counts; groups of a unit that is gone do not, pairs that are both gone do."""
    there = staying(menus, choice)
    gone = {g for g in there if menus[g].options[choice[g]].gone}
    return sum(damage.values[g][choice[g]] for g in there) + sum(
        value for pair, value in damage.pairs.items() if gone.issuperset(pair)
    )


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=3),
        min_size=2,
        max_size=3,
    ),
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=2, max_size=2),
    pair=st.integers(-20, 20),
    share=shares,
)
def test_units_that_may_go_are_weighed_exactly(
    rows: list[Row], sizes: list[tuple[int, float]], pair: int, share: float
) -> None:
    damage, menus = holding(rows, sizes, float(pair))
    every = product(*(range(len(menu.options)) for menu in menus.values()))
    choices = [dict(zip(menus, numbers, strict=True)) for numbers in every]
    able = [c for c in choices if c["u0"] + c["u1"] < 2]
    costs = sorted(cost(menus, choice) for choice in able)
    budget = costs[0] + round(share * (costs[-1] - costs[0]))
    best = min(weighed(damage, menus, c) for c in able if cost(menus, c) <= budget)
    found = find("knapsack").function(damage, menus, budget)
    assert cost(menus, found) <= budget
    assert weighed(damage, menus, found) == pytest.approx(best, abs=1e-6)


def test_a_number_of_units_can_be_asked_for() -> None:
    damage, menus = holding([[(8, 0)], [(8, 0)]], [(1, 3.0), (1, 2.0)], 0.0)
    one = find("knapsack").bind({"gone": 1})(damage, menus, 100)
    assert (one["u0"], one["u1"]) == (0, 1)
    with pytest.raises(LayerwiseError, match="0 units left out"):
        find("knapsack").bind({"gone": 0})(damage, menus, 10)
