"""The exact allocator: least predicted damage within the budget, as an integer programme."""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from layerwise.allocate.choose import smallest
from layerwise.core.damage import Choice, Damage, Menu, cost, staying, total
from layerwise.core.errors import LayerwiseError
from layerwise.core.machine import quiet_stdout
from layerwise.core.method import method

#: nodes of the search tree after which the best choice so far is taken
NODES = 1000
#: a constraint: its entries by column, the least and the most that they may sum to
Row = tuple[dict[int, float], float, float]


@method("allocate", aliases=("multiple_choice",), paper="arXiv:2006.10518", needs=("scores",))
def knapsack(damage: Damage, menus: Mapping[str, Menu], budget: int, *, gone: int = -1) -> Choice:
    r"""Exact multiple-choice knapsack: the least predicted damage within the budget.

    `min sum_go d_go x_go + sum_uv d_uv z_uv` with `sum_go bytes_go x_go <= budget` and binary `x`,
    by HiGHS, once a price of bytes has ruled most options out: to optimality, or the best of 1000
    nodes, on menus of so many sizes that no more can be told apart. `sum_o x_go` is 1 for every
    group, but 0 for one inside a unit that is gone; `z_uv` is 1 where both units of a pair are.

    Args:
        damage: predicted rise of the loss per group and option.
        menus: the options of every group.
        budget: bytes for all groups together.
        gone: how many units are left out; -1 for as many as is best, one always stays.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.

    Reference: Hubara et al., 2020, arXiv:2006.10518, as an integer programme over exact bytes;
    units that hold groups, and their pairs, are added here.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    held = [g for g, menu in menus.items() if any(o.gone for o in menu.options)]
    start: Choice | None = None
    if held:
        able = [(g, i) for g, menu in menus.items() for i in range(len(menu.options))]
    else:
        smallest(menus, budget)
        start, able = promising(damage, menus, budget)
    cells = {cell: n for n, cell in enumerate(able)}
    out = {unit: _numbers(cells, menus[unit], gone=True) for unit in held}
    losses = np.array([*(damage.values[g][i] for g, i in cells), *damage.pairs.values()])
    rows = [_one_option(cells, menus, menu) for menu in menus.values()]
    rows += [row for n, pair in enumerate(damage.pairs, len(cells)) for row in _both(n, pair, out)]
    if held:
        most = (len(held) - 1, gone)[gone >= 0]
        rows.append(({n: 1.0 for columns in out.values() for n in columns}, max(gone, 0), most))
    rows.append(_within(cells, menus, budget))
    entries = [(r, n, v) for r, (row, _, _) in enumerate(rows) for n, v in row.items()]
    at = ([r for r, _, _ in entries], [n for _, n, _ in entries])
    matrix = csr_array(([v for _, _, v in entries], at), shape=(len(rows), len(losses)))
    with quiet_stdout():
        solved = milp(
            losses / (np.abs(losses).max() or 1.0),
            constraints=LinearConstraint(matrix, *np.array([row[1:] for row in rows]).T),
            integrality=[1] * len(cells) + [0] * len(damage.pairs),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "node_limit": NODES},
        )
    if solved.x is None:
        if start is not None:
            return start
        raise LayerwiseError(
            "budget",
            allowed=f"one that can be met with {gone} units left out" if gone >= 0 else "a larger",
            found=f"{budget:,} bytes",
            fix="raise it, or allow smaller options with --set menu.NAME",
        )
    choice = {g: _least(menu) for g, menu in menus.items()}
    choice |= {g: i for (g, i), n in cells.items() if solved.x[n] > 0.5}
    # HiGHS keeps constraints to a tolerance; a choice a few bytes over is not within the budget.
    while cost(menus, choice) > budget:
        inner = [g for g in staying(menus, choice) if g not in out]
        group = min(inner, key=lambda g: _step_damage(damage, menus[g], choice[g]))
        choice[group] = _next_smaller(menus[group], choice[group])
    return min(choice, start, key=partial(total, damage, menus)) if start else choice


def promising(
    damage: Damage, menus: Mapping[str, Menu], budget: int
) -> tuple[Choice, list[tuple[str, int]]]:
    r"""A choice that is nearly the best, and the groups and options that the best one may hold.

    For any price `p >= 0` of a byte `sum_g min_o (d_go + p bytes_go) - p budget` is at most the
    least damage there is. An option that would lift this bound over the damage of some choice
    within the budget is in no better one. At the price at which the cheapest options just fit,
    hardly any are left.
    """
    low, high = 0.0, 1e-15
    while cost(menus, _cheapest(damage, menus, high)) > budget:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        fits = cost(menus, _cheapest(damage, menus, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    choice = _filled(damage, menus, budget, _cheapest(damage, menus, high))
    priced = {
        g: [d + high * o.bytes for d, o in zip(damage.values[g], menu.options, strict=True)]
        for g, menu in menus.items()
    }
    bound = sum(min(row) for row in priced.values()) - high * budget
    above = sum(damage.values[g][i] for g, i in choice.items())
    room = (above - bound) * (1 + 1e-9) + 1e-9 * abs(above)
    cells = [
        (g, i)
        for g, row in priced.items()
        for i, value in enumerate(row)
        if value - min(row) <= room or i == choice[g]
    ]
    return choice, cells


def _cheapest(damage: Damage, menus: Mapping[str, Menu], price: float) -> Choice:
    """The option of every group with the least damage and price of its bytes."""
    found = {}
    for g, menu in menus.items():
        sizes, values = [o.bytes for o in menu.options], damage.values[g]
        found[g] = min(range(len(sizes)), key=lambda i: (values[i] + price * sizes[i], sizes[i]))
    return found


def _filled(damage: Damage, menus: Mapping[str, Menu], budget: int, choice: Choice) -> Choice:
    """A choice with what is left of the budget spent on options of less damage, in order."""
    choice, spare = dict(choice), budget - cost(menus, choice)
    for g, menu in menus.items():
        now = menu.options[choice[g]].bytes
        able = [i for i, o in enumerate(menu.options) if o.bytes <= now + spare]
        best = min(able, key=lambda i: damage.values[g][i])
        if damage.values[g][best] < damage.values[g][choice[g]]:
            spare -= menu.options[best].bytes - now
            choice[g] = best
    return choice


def _numbers(cells: Mapping[tuple[str, int], int], menu: Menu, gone: bool) -> list[int]:
    """The columns of a menu's options, of those that are gone or of the others."""
    numbers = ((menu.group, i) for i, o in enumerate(menu.options) if o.gone == gone)
    return [cells[cell] for cell in numbers if cell in cells]


def _one_option(cells: Mapping[tuple[str, int], int], menus: Mapping[str, Menu], menu: Menu) -> Row:
    """One option of a menu is chosen; none where the unit around it does not stay."""
    own = ((menu.group, i) for i in range(len(menu.options)))
    row = dict.fromkeys((cells[cell] for cell in own if cell in cells), 1.0)
    if not menu.inside:
        return row, 1, 1
    return row | dict.fromkeys(_numbers(cells, menus[menu.inside], gone=False), -1.0), 0, 0


def _both(number: int, pair: tuple[str, str], out: Mapping[str, list[int]]) -> list[Row]:
    """A column that is 1 if both units of a pair are gone, and 0 if one of them stays."""
    one, other = (dict.fromkeys(out[unit], -1.0) for unit in pair)
    z = {number: 1.0}
    return [
        ({**z, **one}, -np.inf, 0),
        ({**z, **other}, -np.inf, 0),
        ({**z, **one, **other}, -1, np.inf),
    ]


def _within(cells: Mapping[tuple[str, int], int], menus: Mapping[str, Menu], budget: int) -> Row:
    """The bytes above the least that is possible, in whole units.

    With half a unit of room for the tolerance of HiGHS.
    """
    sizes: dict[tuple[str, int], int] = {}
    floors: dict[str, int] = {}
    inside: dict[str, list[str]] = {}
    for menu in menus.values():
        inside.setdefault(menu.inside, []).append(menu.group)

    def floor(group: str) -> int:
        held = sum(map(floor, inside.get(group, ())))
        own = [o.bytes + (0 if o.gone else held) for o in menus[group].options]
        sizes.update({(group, i): size - min(own) for i, size in enumerate(own)})
        floors[group] = min(own)
        return floors[group]

    least = sum(map(floor, inside.get("", ())))
    unit = math.gcd(*(sizes[cell] for cell in cells)) or 1
    row = {n: sizes[cell] / unit for cell, n in cells.items() if sizes[cell]}
    return row, -np.inf, (budget - least) // unit + 0.5


def _least(menu: Menu) -> int:
    return min(range(len(menu.options)), key=lambda i: menu.options[i].bytes)


def _next_smaller(menu: Menu, now: int) -> int:
    smaller = [
        (o.bytes, i) for i, o in enumerate(menu.options) if o.bytes < menu.options[now].bytes
    ]
    return max(smaller)[1] if smaller else now


def _step_damage(damage: Damage, menu: Menu, now: int) -> float:
    after = _next_smaller(menu, now)
    rise = damage.values[menu.group][after] - damage.values[menu.group][now]
    return rise if after != now else np.inf
