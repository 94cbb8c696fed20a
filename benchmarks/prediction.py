"""How well predicted damage ranks plans: against what random plans really cost.

python -m benchmarks.prediction [demo|second] [count]
"""

import sys
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.allocate import knapsack
from layerwise.core.chain import nearest
from layerwise.core.damage import Choice, Damage, cost, total
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec
from layerwise.export import PACKED
from layerwise.jobs.bits import predicted, scores_of
from layerwise.jobs.menus import make_menus, units, worth_it
from layerwise.jobs.request import Request
from layerwise.jobs.scoring import trials_for
from layerwise.jobs.session import Budget, silent

COUNT, DRAWS = 50, 1000


def interval(a: Sequence[float], b: Sequence[float]) -> str:
    """A rank correlation with its 95% bootstrap interval over plans."""
    generator = np.random.default_rng(0)
    one, two = np.array(a), np.array(b)
    drawn = generator.integers(0, len(one), (DRAWS, len(one)))
    found = [spearmanr(one[d], two[d]).statistic for d in drawn]
    low, high = np.quantile(found, (0.025, 0.975))
    return f"{spearmanr(one, two).statistic:.3f} [{low:.3f}, {high:.3f}]"


def compared(model: Model, count: int) -> list[tuple[str, ...]]:
    """Rows: plans of mixed sizes, and plans of one size at three levels."""
    menu = {"menu": {"bits": [2, 3, 4, 5, 6, 8], "group": [128]}}
    request = Request(model.folder, Budget(), data=DataSpec(model.data), settings=menu)
    network = open_network(model.folder)
    menus = worth_it(make_menus(request, network, PACKED))
    groups = {g.key: g for g in units(network, PACKED)}
    scores = scores_of(request, network, PACKED, silent)
    damage = predicted(network, menus, groups, scores, silent)
    trials = trials_for(request, network)
    generator = np.random.default_rng(0)

    def measured(choice: Choice) -> float:
        chains = {g: nearest(menus[g].options[i].chain) for g, i in choice.items()}
        return trials.chains({g: c for g, c in chains.items() if c})[0]

    def both(choices: Sequence[Choice]) -> str:
        expected = [total(damage, menus, choice) for choice in choices]
        return interval(expected, [measured(choice) for choice in choices])

    def any_size() -> Choice:
        level = generator.uniform(1, 6)
        noisy = {g: level + generator.normal(0, 1) for g in menus}
        return {g: int(np.clip(round(noisy[g]), 1, len(m.options) - 1)) for g, m in menus.items()}

    def same_size(limit: int) -> Choice:
        drawn = {g: generator.lognormal(0, 1) for g in menus}
        wanted = {g: tuple(drawn[g] * v for v in damage.values[g]) for g in menus}
        return knapsack(Damage(wanted, drawn), menus, limit)

    rows = [(model.name, "2 to 8 bits", both([any_size() for _ in range(count)]))]
    for level, bits in ((5, "3"), (4, "4")):
        limit = cost(menus, {g: min(level, len(m.options) - 1) for g, m in menus.items()})
        rows.append((model.name, f"{bits} bits", both([same_size(limit) for _ in range(count)])))
    return rows


def main(words: Sequence[str] = ()) -> None:
    """Print one table."""
    count = next((int(w) for w in words if w.isdigit()), COUNT)
    chosen = [m for m in models() if not {"demo", "second"} & {*words} or m.name in words]
    rows = [row for model in chosen for row in compared(model, count)]
    header = ("model", f"{count} random plans of", "rank correlation")
    table("Predicted damage and measured KL, rounded to nearest", header, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
