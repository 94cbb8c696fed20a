"""Grids that represent normally distributed values with the least squared error."""

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import norm
from torch import Tensor

from layerwise.core.errors import LayerwiseError

#: found once by weighted k-means on a fine mesh: levels -> points and mean squared error
PLANE = Path(__file__).with_name("gaussian_plane.json")


class GaussianGrid(NamedTuple):
    """Points `[levels, dim]`, and the mean squared error per value of a standard normal."""

    points: Float[Tensor, "levels dim"]
    error: float


@cache
def gaussian_grid(levels: int, dim: int = 1) -> GaussianGrid:
    """The points to which values of a standard normal, one or two at a time, are rounded best.

    Single values: each point is the mean of the values nearest to it, found by iteration. Pairs:
    out of a table for 4, 16, 64 and 256 points.

    Raises:
        LayerwiseError: there is no such grid.

    Example:
        >>> grid = gaussian_grid(4)
        >>> grid.points[:, 0], round(grid.error, 5)
        (tensor([-1.5104, -0.4528,  0.4528,  1.5104]), 0.11748)

    Reference: Max, 1960; Lloyd, 1982; as used by Malinovskii et al., 2024, arXiv:2411.17525.
    """
    table = json.loads(PLANE.read_text()) if dim == 2 else {}
    if dim == 2 and str(levels) in table:
        found = table[str(levels)]
        return GaussianGrid(torch.tensor(found["points"]), found["mse"])
    if dim != 1 or not 2 <= levels <= 256:
        raise LayerwiseError(
            "gaussian grid, levels and dim",
            allowed="2 to 256 levels of single values, or 4, 16, 64 or 256 of pairs",
            found=(levels, dim),
            fix="choose one of these",
        )
    points = norm.ppf((np.arange(levels) + 0.5) / levels) * math.sqrt(3)
    for _ in range(20000):
        edges = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
        share = np.diff(norm.cdf(edges))
        new = -np.diff(norm.pdf(edges)) / share
        done = np.abs(new - points).max() < 1e-12
        points = new
        if done:
            break
    points = (points - points[::-1]) / 2
    return GaussianGrid(torch.tensor(points)[:, None].float(), float(1 - share @ points**2))
