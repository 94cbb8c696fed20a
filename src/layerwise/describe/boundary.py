"""Where between two amounts an outcome tips: a logistic curve fitted to shares."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares


class Boundary(NamedTuple):
    """`p = 1 / (1 + exp(-steepness (log10 amount - log10 critical)))`, and a 95% interval."""

    critical: float
    steepness: float
    interval: tuple[float, float]


def logistic_boundary(
    amounts: Sequence[float], reached: Sequence[bool], *, repeats: int = 1500, seed: int = 42
) -> Boundary:
    """The amount at which half of all runs reach something, such as weight decay and grokking.

    Unweighted least squares of the curve on the share of runs per amount; the interval is that of
    a bootstrap over runs, of the repetitions in which a curve could be fitted.

    Args:
        amounts: of every run, above 0.
        reached: whether the run got there.
        repeats: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: there are fewer than two amounts.

    Example:
        >>> amounts = [0.01] * 4 + [0.1] * 4 + [1.0] * 4
        >>> found = logistic_boundary(amounts, [False] * 6 + [True] * 6, repeats=0)
        >>> round(found.critical, 3)
        0.1

    Reference: Verma, 2026, arXiv:2605.20441.
    """
    logs, hits = np.log10(np.asarray(amounts, float)), np.asarray(reached, float)
    if len(np.unique(logs)) < 2:
        raise ValueError(f"logistic_boundary: two amounts or more are needed, not {set(amounts)}")
    middle, steepness = _fitted(logs, hits)
    generator = np.random.default_rng(seed)
    again = []
    for _ in range(repeats):
        chosen = generator.integers(0, len(logs), len(logs))
        if len(np.unique(logs[chosen])) > 1 and 0 < hits[chosen].mean() < 1:
            again.append(_fitted(logs[chosen], hits[chosen])[0])
    low, high = np.quantile(again, [0.025, 0.975]) if again else (middle, middle)
    return Boundary(float(10**middle), steepness, (float(10**low), float(10**high)))


def _fitted(logs: np.ndarray, hits: np.ndarray) -> tuple[float, float]:
    """Middle and steepness on the shares of each amount, both within what amounts can tell."""
    places = np.unique(logs)
    shares = np.array([hits[logs == place].mean() for place in places])

    def gap(fit: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-fit[1] * (places - fit[0]))) - shares

    above = np.flatnonzero(shares >= 0.5)
    first = int(above[0]) if len(above) else len(places) - 1
    start = ((places[first] + places[max(first - 1, 0)]) / 2, 5.0)
    limits = ([places[0] - 1, 0.1], [places[-1] + 1, 100.0])
    middle, steepness = least_squares(gap, start, bounds=limits).x
    return float(middle), float(steepness)
