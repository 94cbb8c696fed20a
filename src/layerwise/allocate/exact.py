"""The exact allocator: least predicted damage within the budget, as an integer programme."""

import math
from collections.abc import Mapping

import numpy as np

from layerwise.allocate.choose import smallest
from layerwise.core.damage import Choice, Damage, Menu, cost, staying
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method

#: a constraint: its entries by column, the least and the most that they may sum to
Row = tuple[dict[int, float], float, float]


@method("allocate", aliases=("multiple_choice",), paper="arXiv:2006.10518")
def knapsack(damage: Damage, menus: Mapping[str, Menu], budget: int, *, gone: int = -1) -> Choice:
    r"""Exact multiple-choice knapsack: the least predicted damage within the budget.

    `min sum_go d_go x_go + sum_uv d_uv z_uv` with `sum_go bytes_go x_go <= budget` and binary `x`,
    solved to optimality by HiGHS. `sum_o x_go` is 1 for every group, but 0 for one inside a unit
    that is gone; `z_uv` is 1 where both units of a pair are gone.

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

    cells = {(g, i): n for n, (g, i) in enumerate(_cells(menus))}
    out = {g: _numbers(cells, menu, gone=True) for g, menu in menus.items()}
    out = {unit: columns for unit, columns in out.items() if columns}
    if not out:
        smallest(menus, budget)
    count = len(cells) + len(damage.pairs)
    losses = np.array([*(damage.values[g][i] for g, i in cells), *damage.pairs.values()])
    rows = [_one_option(cells, menus, menu) for menu in menus.values()]
    rows += [row for n, pair in enumerate(damage.pairs, len(cells)) for row in _both(n, pair, out)]
    if out:
        most = (len(out) - 1, gone)[gone >= 0]
        rows.append(({n: 1.0 for columns in out.values() for n in columns}, max(gone, 0), most))
    rows.append(_within(cells, menus, budget))
    entries = [(r, n, v) for r, (row, _, _) in enumerate(rows) for n, v in row.items()]
    at = ([r for r, _, _ in entries], [n for _, n, _ in entries])
    matrix = csr_array(([v for _, _, v in entries], at), shape=(len(rows), count))
    solved = milp(
        losses / (np.abs(losses).max() or 1.0),
        constraints=LinearConstraint(matrix, *np.array([row[1:] for row in rows]).T),
        integrality=[1] * len(cells) + [0] * len(damage.pairs),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise LayerwiseError(
            "budget",
            allowed=f"one that can be met with {gone} units left out" if gone >= 0 else "a larger",
            found=f"{budget:,} bytes",
            fix="raise it, or allow smaller options with --set menu.bits",
        )
    choice = {g: _least(menu) for g, menu in menus.items()}
    choice |= {g: i for (g, i), n in cells.items() if solved.x[n] > 0.5}
    # HiGHS keeps constraints to a tolerance; a choice a few bytes over is not within the budget.
    while cost(menus, choice) > budget:
        able = [g for g in staying(menus, choice) if g not in out]
        group = min(able, key=lambda g: _step_damage(damage, menus[g], choice[g]))
        choice[group] = _next_smaller(menus[group], choice[group])
    return choice


def _cells(menus: Mapping[str, Menu]) -> list[tuple[str, int]]:
    return [(g, i) for g, menu in menus.items() for i in range(len(menu.options))]


def _numbers(cells: Mapping[tuple[str, int], int], menu: Menu, gone: bool) -> list[int]:
    """The columns of a menu's options, of those that are gone or of the others."""
    return [cells[menu.group, i] for i, o in enumerate(menu.options) if o.gone == gone]


def _one_option(cells: Mapping[tuple[str, int], int], menus: Mapping[str, Menu], menu: Menu) -> Row:
    """One option of a menu is chosen; none where the unit around it does not stay."""
    row = dict.fromkeys((cells[menu.group, i] for i in range(len(menu.options))), 1.0)
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
    unit = math.gcd(*sizes.values()) or 1
    row = {cells[cell]: size / unit for cell, size in sizes.items() if size}
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
