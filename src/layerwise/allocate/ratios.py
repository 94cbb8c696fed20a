"""Allocators by ratios: how much of every group stays is wished for, then met in exact bytes."""

import heapq
from collections.abc import Mapping
from typing import Literal

from layerwise.allocate.choose import smallest
from layerwise.core.damage import Choice, Damage, Menu, cost
from layerwise.core.method import method


@method("allocate", aliases=("owl_ratios",), paper="arXiv:2310.05175", needs=("scores",))
def spread_ratios(
    damage: Damage, menus: Mapping[str, Menu], budget: int, *, width: float = 0.08
) -> Choice:
    r"""The same share everywhere, more of what is important: by at most `width` up and down.

    `r_g = c + 2 width (I_g - min I) / (max I - min I)`, cut to what the menu of the group can
    hold, with the one `c` at which all groups together take the budget.

    Args:
        damage: its importance says how much more a group gets.
        menus: the options of every group.
        budget: bytes for all groups together.
        width: half of the distance between the largest and the smallest share.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.

    Example:
        >>> from layerwise.core.damage import Option
        >>> options = tuple(Option((), size, f"{size}") for size in range(100, 0, -1))
        >>> menus = {name: Menu(name, options) for name in "abc"}
        >>> damage = Damage({}, {"a": 0.5, "b": 1.5, "c": 1.0})
        >>> {g: 100 - i for g, i in spread_ratios(damage, menus, 90).items()}
        {'a': 22, 'b': 38, 'c': 30}

    Reference: Yin et al., 2023, arXiv:2310.05175 (OWL, `width` 0.08 with the share of outliers);
    Chen et al., 2025, arXiv:2505.23807 (DLP, 0.15 with the medians). Theirs centre the mean over
    layers; here the budget is exact, whatever the sizes, and no share leaves 0 to 1.
    """
    low, high = min(damage.importance.values()), max(damage.importance.values())
    room = high - low or 1.0
    lift = {g: 2 * width * (damage.importance[g] - low) / room for g in menus}
    whole = {g: menu.options[0].bytes for g, menu in menus.items()}
    least = {g: min(o.bytes for o in menu.options) for g, menu in menus.items()}

    def wanted(level: float) -> dict[str, float]:
        return {g: min(max((level + lift[g]) * whole[g], least[g]), whole[g]) for g in menus}

    below, above = -2 * width, 1.0
    for _ in range(60):
        middle = (below + above) / 2
        fits = sum(wanted(middle).values()) <= budget
        below, above = (middle, above) if fits else (below, middle)
    return met(wanted(below), menus, budget)


@method("allocate", aliases=("ecoflap_ratios",), paper="arXiv:2310.02998", needs=("scores",))
def proportional(
    damage: Damage, menus: Mapping[str, Menu], budget: int, *, margin: float = 0.1
) -> Choice:
    r"""A floor for every group, and the rest in proportion to its importance.

    Of every group `1 - s - margin` stays, where `s` is what goes of all; the rest of the budget
    is poured out in proportion to the importance, and what a full group cannot take, again.

    Args:
        damage: its importance, 0 or more, is how much a group gets.
        menus: the options of every group.
        budget: bytes for all groups together.
        margin: how much more than the mean may go of a group.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.

    Example:
        >>> from layerwise.core.damage import Option
        >>> def menu(name, size):
        ...     return Menu(name, tuple(Option((), n, f"{n}") for n in range(size, 0, -1)))
        >>> menus = {"a": menu("a", 100), "b": menu("b", 100), "c": menu("c", 200)}
        >>> choice = proportional(Damage({}, {"a": 3.0, "b": 1.0, "c": 1.0}), menus, 200)
        >>> {g: menus[g].options[i].bytes for g, i in choice.items()}
        {'a': 64, 'b': 48, 'c': 88}

    Reference: Sung et al., 2023, arXiv:2310.02998 (ECoFLaP); their code adds where its rounding
    went over the budget, here it is kept.
    """
    whole = {g: menu.options[0].bytes for g, menu in menus.items()}
    open_ = [g for g, menu in menus.items() if len(menu.options) > 1]
    total = sum(whole[g] for g in open_)
    floor = max((budget - sum(whole.values()) + total) / max(total, 1) - margin, 0.0)
    wanted = {g: floor * size if g in open_ else float(size) for g, size in whole.items()}
    important = {g: max(damage.importance[g], 0.0) for g in open_}
    while open_ and (rest := budget - sum(wanted.values())) > 0.5:
        weight = sum(important[g] for g in open_) or 1.0
        for g in open_:
            wanted[g] = min(wanted[g] + important[g] / weight * rest, whole[g])
        left = [g for g in open_ if important[g] and wanted[g] < whole[g]]
        open_ = left if len(left) < len(open_) else []
    return met(wanted, menus, budget)


@method("allocate", aliases=("lamp",), paper="arXiv:2010.07611", needs=("errors",))
def global_threshold(
    damage: Damage,
    menus: Mapping[str, Menu],
    budget: int,
    *,
    normalise: Literal["remaining", "none"] = "remaining",
) -> Choice:
    r"""One threshold for all groups: what costs least goes first, until the rest fits.

    A step from an option to the next smaller one costs, per byte, its rise of the relative error
    over what is still there, `(e' - e) / (1 - e)` (`remaining`), or its rise of the damage
    (`none`). Where a step takes one weight and the error is the share of the squares that went,
    the first is the score of LAMP, `w_u^2 / sum_{v >= u} w_v^2`.

    Args:
        damage: the damage of every option, and the importance that its error was weighed by.
        menus: the options of every group.
        budget: bytes for all groups together.
        normalise: by what is left of the group, or not.

    Raises:
        LayerwiseError: even the smallest options exceed the budget.

    Example:
        >>> from layerwise.core.damage import Option
        >>> options = tuple(Option((), size, f"{size}") for size in (3, 2, 1))
        >>> menus = {name: Menu(name, options) for name in "ab"}
        >>> errors = {"a": (0.0, 1 / 14, 5 / 14), "b": (0.0, 1 / 102, 2 / 102)}
        >>> global_threshold(Damage(errors, {"a": 1.0, "b": 1.0}), menus, 3)
        {'a': 1, 'b': 2}

    Reference: Lee et al., 2020, arXiv:2010.07611 (LAMP), who count every weight of every layer.
    """
    smallest(menus, budget)
    ladder = {g: _ladder(menu) for g, menu in menus.items()}

    def step(g: str, place: int) -> float:
        here, below = ladder[g][place], ladder[g][place + 1]
        options, values = menus[g].options, damage.values[g]
        bytes_ = options[here].bytes - options[below].bytes
        rise = values[below] - values[here]
        if normalise == "none":
            return rise / bytes_
        unit = damage.importance[g] or 1.0
        return rise / max(unit - values[here], 1e-12 * unit) / bytes_

    place = dict.fromkeys(menus, 0)
    order = {g: number for number, g in enumerate(menus)}
    heap = [(step(g, 0), order[g], g) for g in menus if len(ladder[g]) > 1]
    heapq.heapify(heap)
    spent = sum(menus[g].options[ladder[g][0]].bytes for g in menus)
    while spent > budget:
        _, _, g = heapq.heappop(heap)
        before, place[g] = menus[g].options[ladder[g][place[g]]].bytes, place[g] + 1
        spent -= before - menus[g].options[ladder[g][place[g]]].bytes
        if place[g] + 1 < len(ladder[g]):
            heapq.heappush(heap, (step(g, place[g]), order[g], g))
    choice = {g: ladder[g][place[g]] for g in menus}
    raised = sorted(
        (g for g in menus if place[g]), key=lambda g: (-step(g, place[g] - 1), order[g])
    )
    return risen(choice, menus, budget, raised)


def _ladder(menu: Menu) -> list[int]:
    """Its options from the largest to the smallest, the first of equals."""
    largest: dict[int, int] = {}
    for number, option in enumerate(menu.options):
        largest.setdefault(option.bytes, number)
    return [largest[size] for size in sorted(largest, reverse=True)]


def met(wanted: Mapping[str, float], menus: Mapping[str, Menu], budget: int) -> Choice:
    """The options nearest below what is wanted, then as much of the rest as fits.

    Groups that lack most of what they want rise first. Where menus hold nothing as small as that,
    groups that have most beyond it fall first.
    """
    choice, least = {}, smallest(menus, budget)
    for g, menu in menus.items():
        below = [i for i in _ladder(menu) if menu.options[i].bytes <= wanted[g] + 1e-6]
        choice[g] = below[0] if below else least[g]
    while cost(menus, choice) > budget:
        able = [g for g in menus if choice[g] != least[g]]
        g = max(able, key=lambda g: menus[g].options[choice[g]].bytes - wanted[g])
        ladder = _ladder(menus[g])
        choice[g] = ladder[ladder.index(choice[g]) + 1]
    lack = lambda g: menus[g].options[choice[g]].bytes - wanted[g]  # noqa: E731
    return risen(choice, menus, budget, sorted(menus, key=lack))


def risen(choice: Choice, menus: Mapping[str, Menu], budget: int, order: list[str]) -> Choice:
    """One option up for every group in an order while it fits, again and again."""
    choice, spare = dict(choice), budget - cost(menus, choice)
    moved = True
    while moved:
        moved = False
        for g in order:
            ladder, now = _ladder(menus[g]), menus[g].options[choice[g]].bytes
            above = [i for i in ladder if now < menus[g].options[i].bytes <= now + spare]
            if above:
                spare -= menus[g].options[above[-1]].bytes - now
                choice[g], moved = above[-1], True
    return choice
