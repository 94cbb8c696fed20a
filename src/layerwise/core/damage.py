"""Menus of options with exact costs, and the one way from scores to predicted damage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from layerwise.core.plan import Step
from layerwise.core.stats import Scores


class Option(NamedTuple):
    """A chain of methods and the bytes it takes in the target; no step means as it is.

    `weights` counts those that may differ from 0. A unit that is `gone` takes with it all that is
    inside.
    """

    chain: tuple[Step, ...]
    bytes: int
    label: str
    weights: int = 0
    gone: bool = False


class Menu(NamedTuple):
    """The options of one group, from the largest to the smallest; the first is as it is.

    `inside` names the menu of the unit that holds the group, if that may go as a whole.
    """

    group: str
    options: tuple[Option, ...]
    inside: str = ""


@dataclass(frozen=True)
class Damage:
    """Predicted rise of the loss (nats per token) per group and option of its menu.

    `importance` is what the scores said of a group before errors were weighed in. `pairs` is what
    two units cost beyond the sum of both when they are gone together.
    """

    values: Mapping[str, tuple[float, ...]]
    importance: Mapping[str, float]
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)


Choice = dict[str, int]


def predict_damage(
    scores: Scores | None, errors: Mapping[str, tuple[float, ...]], owner: Mapping[str, str]
) -> Damage:
    r"""Damage of a group under an option: its sensitivity times the option's relative error.

    Measured scores (nats) are linear in the squared relative error, so that
    `damage[g][o] = score[g] * error[g][o] / error of the trial` (linearity theorem, arXiv
    2411.17525). Other scores only rank: they are mapped onto 1 to 2, so that the least important
    unit counts half as much as the most. Without scores all groups count 1.

    Args:
        scores: per group, or per layer, or none.
        errors: relative squared output error per group and option; 0 for "as it is".
        owner: group -> the unit of the scores that it belongs to.
    """
    if scores is None:
        return Damage(errors, dict.fromkeys(errors, 1.0))
    values = list(scores.values.values())
    low, high = min(values), max(values)
    spread = high - low or 1.0
    importance = {}
    for group in errors:
        unit = group if group in scores.values else owner[group]
        score = scores.values[unit]
        if scores.nats:
            importance[group] = max(score, 0.0) / max(scores.trial[unit], 1e-12)
        else:
            importance[group] = 1 + (score - low) / spread
    damage = {g: tuple(importance[g] * e for e in found) for g, found in errors.items()}
    return Damage(damage, importance)


def cost(menus: Mapping[str, Menu], choice: Choice) -> int:
    """Bytes of a choice."""
    return sum(menus[group].options[choice[group]].bytes for group in staying(menus, choice))


def staying(menus: Mapping[str, Menu], choice: Choice) -> list[str]:
    """The groups and units that are in no unit that is gone; their own option may be to go."""

    def stays(name: str) -> bool:
        holder = menus[name].inside
        return not holder or (not menus[holder].options[choice[holder]].gone and stays(holder))

    return [group for group in menus if stays(group)]


def left_out(menus: Mapping[str, Menu], choice: Choice) -> list[str]:
    """The units that are gone."""
    return [unit for unit in staying(menus, choice) if menus[unit].options[choice[unit]].gone]


def total(damage: Damage, menus: Mapping[str, Menu], choice: Choice) -> float:
    """The predicted damage of a choice, that of pairs included."""
    gone = set(left_out(menus, choice))
    alone = sum(damage.values[group][choice[group]] for group in staying(menus, choice))
    return alone + sum(more for pair, more in damage.pairs.items() if gone.issuperset(pair))
