"""Allocators: damage, menus and a budget in bytes in; one option per group out."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from layerwise.core.damage import Choice, Damage, Menu, cost
from layerwise.core.errors import LayerwiseError
from layerwise.core.machine import quiet_stdout
from layerwise.core.method import method

#: nodes of the search tree after which the best choice so far is taken
NODES = 1000


def smallest(menus: Mapping[str, Menu], budget: int) -> Choice:
    """Every group at its smallest option; an impossible budget is answered here."""
    choice = {
        group: min(range(len(menu.options)), key=lambda i, m=menu: m.options[i].bytes)
        for group, menu in menus.items()
    }
    if cost(menus, choice) > budget:
        raise LayerwiseError(
            "budget",
            allowed=f"at least {cost(menus, choice):,} bytes for the allocatable matrices",
            found=f"{budget:,}",
            fix="raise the budget, allow smaller options with --set menu.NAME, or unpin matrices",
        )
    return choice


@method("allocate")
def uniform(damage: Damage, menus: Mapping[str, Menu], budget: int) -> Choice:
    """One option everywhere, the largest that fits; what is left over goes in network order.

    Args:
        damage: not used.
        menus: the options of every group.
        budget: bytes for all groups together.

    Returns:
        The number of an option per group.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.
    """
    choice = smallest(menus, budget)
    labels = {option.label: option.bytes for menu in menus.values() for option in menu.options}
    for label in sorted(labels, key=lambda name: labels[name]):
        trial = {g: _closest(menu, label, choice[g]) for g, menu in menus.items()}
        if cost(menus, choice) <= cost(menus, trial) <= budget:
            choice = trial
    spare = budget - cost(menus, choice)
    for group, menu in menus.items():
        now = menu.options[choice[group]].bytes
        larger = [(o.bytes, i) for i, o in enumerate(menu.options) if o.bytes > now]
        if larger and min(larger)[0] - now <= spare:
            spare -= min(larger)[0] - now
            choice[group] = min(larger)[1]
    return choice


def _closest(menu: Menu, label: str, otherwise: int) -> int:
    found = [i for i, option in enumerate(menu.options) if option.label == label]
    return found[0] if found else otherwise


@method("allocate", aliases=("two_level",), paper="arXiv:2406.17415", needs=("scores",))
def threshold(damage: Damage, menus: Mapping[str, Menu], budget: int) -> Choice:
    """Two neighbouring options: the more important groups get the larger while it fits.

    The smaller option is the largest that fits everywhere; groups rise to the next one in order
    of their importance.

    Args:
        damage: its importance orders the groups.
        menus: the options of every group.
        budget: bytes for all groups together.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.

    Reference: Dumitru et al., 2024, arXiv:2406.17415.
    """
    base = smallest(menus, budget)
    labels = {option.label: option.bytes for menu in menus.values() for option in menu.options}
    for label in sorted(labels, key=lambda name: labels[name]):
        trial = {g: _closest(menu, label, base[g]) for g, menu in menus.items()}
        if cost(menus, base) <= cost(menus, trial) <= budget:
            base = trial
    choice, spare = dict(base), budget - cost(menus, base)
    for group in sorted(menus, key=lambda g: -damage.importance[g]):
        options = menus[group].options
        now = options[choice[group]].bytes
        larger = [(o.bytes, i) for i, o in enumerate(options) if o.bytes > now]
        if larger and min(larger)[0] - now <= spare:
            spare -= min(larger)[0] - now
            choice[group] = min(larger)[1]
    return choice


@method("allocate", aliases=("equal_loss",), paper="arXiv:2506.05664", needs=("scores",))
def waterfill(damage: Damage, menus: Mapping[str, Menu], budget: int) -> Choice:
    r"""The same loss per weight everywhere: every group falls to one level, the lowest that fits.

    A group of `n_g` weights at `b` bits loses `A_g 4^-b`; the least sum at a given size has
    `b_g = R + 1/2 log2(c_g / geomean(c))` with `c_g = A_g / n_g`, where all lose `4^-R` per
    weight. Every group takes its smallest option that loses no more than that; what is left over
    goes to those that lose most.

    Args:
        damage: predicted rise of the loss per group and option.
        menus: the options of every group.
        budget: bytes for all groups together.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.

    Reference: Zhang et al., 2025, arXiv:2506.05664, equations for columns; here for groups, with
    the budget kept exactly.
    """
    choice = smallest(menus, budget)
    loss = {g: [v / menu.options[0].bytes for v in damage.values[g]] for g, menu in menus.items()}
    levels = sorted({v for row in loss.values() for v in row})
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        trial = {g: _below(menu, loss[g], levels[middle]) for g, menu in menus.items()}
        if cost(menus, trial) <= budget:
            choice, high = trial, middle
        else:
            low = middle + 1
    spare = budget - cost(menus, choice)
    for group in sorted(menus, key=lambda g: -loss[g][choice[g]]):
        now = menus[group].options[choice[group]].bytes
        larger = [
            (loss[group][i], o.bytes, i)
            for i, o in enumerate(menus[group].options)
            if now < o.bytes <= now + spare and loss[group][i] < loss[group][choice[group]]
        ]
        if larger:
            spare -= min(larger)[1] - now
            choice[group] = min(larger)[2]
    return choice


def _below(menu: Menu, loss: Sequence[float], level: float) -> int:
    """The smallest option that loses no more than a level; the least loss if there is none."""
    able = [(o.bytes, i) for i, o in enumerate(menu.options) if loss[i] <= level]
    return min(able)[1] if able else min(range(len(loss)), key=loss.__getitem__)


@method("allocate", aliases=("multiple_choice",), paper="arXiv:2006.10518", needs=("scores",))
def knapsack(damage: Damage, menus: Mapping[str, Menu], budget: int) -> Choice:
    r"""Exact multiple-choice knapsack: the least predicted damage within the budget.

    `min sum_go d_go x_go` with `sum_o x_go = 1` for every group, `sum_go bytes_go x_go <= budget`
    and `x` binary, by HiGHS, once a price of bytes has ruled most options out: to optimality, or
    the best of 1000 nodes, on menus of so many sizes that no more can be told apart.

    Args:
        damage: predicted rise of the loss per group and option.
        menus: the options of every group.
        budget: bytes for all groups together.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.

    Reference: Hubara et al., 2020, arXiv:2006.10518, as an integer programme over exact bytes.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    least = smallest(menus, budget)
    start, cells = promising(damage, menus, budget)
    losses = np.array([damage.values[g][i] for g, i in cells])
    # Whole units above the smallest choice, and half a unit of room for the tolerance of HiGHS.
    above = [menus[g].options[i].bytes - menus[g].options[least[g]].bytes for g, i in cells]
    unit = math.gcd(*above) or 1
    sizes = np.array(above, dtype=float) / unit
    room = (budget - cost(menus, least)) // unit + 0.5
    row = {g: n for n, g in enumerate(menus)}
    pick = csr_array(
        (np.ones(len(cells)), ([row[g] for g, _ in cells], range(len(cells)))),
        shape=(len(menus), len(cells)),
    )
    scale = losses.max() or 1.0
    with quiet_stdout():
        solved = milp(
            losses / scale,
            constraints=[
                LinearConstraint(pick, 1, 1),
                LinearConstraint(sizes[None], -np.inf, room),
            ],
            integrality=np.ones(len(cells)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "node_limit": NODES},
        )
    if solved.x is None:
        return start
    choice = {g: i for (g, i), x in zip(cells, solved.x, strict=True) if x > 0.5}
    # HiGHS keeps constraints to a tolerance; a choice a few bytes over is not within the budget.
    while cost(menus, choice) > budget:
        group = min(choice, key=lambda g: _step_damage(damage, menus[g], choice[g]))
        choice[group] = _next_smaller(menus[group], choice[group])
    total = lambda found: sum(damage.values[g][i] for g, i in found.items())  # noqa: E731
    return min(choice, start, key=total)


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


def _next_smaller(menu: Menu, now: int) -> int:
    smaller = [
        (o.bytes, i) for i, o in enumerate(menu.options) if o.bytes < menu.options[now].bytes
    ]
    return max(smaller)[1] if smaller else now


def _step_damage(damage: Damage, menu: Menu, now: int) -> float:
    after = _next_smaller(menu, now)
    rise = damage.values[menu.group][after] - damage.values[menu.group][now]
    return rise if after != now else np.inf
