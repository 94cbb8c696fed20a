"""Allocators: damage, menus and a budget in bytes in; one option per group out."""

from collections.abc import Mapping, Sequence

from layerwise.core.damage import Choice, Damage, Menu, cost
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method


def smallest(menus: Mapping[str, Menu], budget: int) -> Choice:
    """Every group at its smallest option, every unit there; an impossible budget is answered."""
    choice = {
        group: min((o.bytes, i) for i, o in enumerate(menu.options) if not o.gone)[1]
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
