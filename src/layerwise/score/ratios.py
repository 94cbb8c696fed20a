"""Scores that say how much of a layer's weights should stay: by outliers, medians, slopes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.plan import Step
from layerwise.core.stack import Layer, Stack
from layerwise.core.stats import Scores, Stats

#: the matrices `[out, in]` of a layer by their key
Fetch = Callable[[str], Mapping[str, Tensor]]


def _met(layer: Layer, stats: Stats, fetch: Fetch) -> Float[Tensor, " weights"]:
    """`|w_ij| rms(x_j)` of all matrices of a layer that tokens came to, in one row."""
    squares, weights = stats["second_moment_diagonal"], fetch(layer.key)
    found = [
        (weights[m.key].float().abs() * squares[m.inputs].clamp_min(0).sqrt()).flatten()
        for m in layer.matrices
        if m.inputs in squares
    ]
    return torch.cat(found or [torch.zeros(1)])


@method("score", aliases=("owl",), paper="arXiv:2310.05175", needs=("second_moment_diagonal",))
def outlier_share(stack: Stack, stats: Stats, *, fetch: Fetch, factor: float = 5.0) -> Scores:
    r"""Percentage of a layer's weights whose `A_ij = |w_ij| ||x_j||` stands out.

    `100 #{A > factor mean(A)} / #A` over all matrices of the layer together: layers with more
    outliers should keep more.

    Args:
        stack: the layers.
        stats: with `second_moment_diagonal` per input group.
        fetch: given; the matrices `[out, in]` of a layer by their key.
        factor: how many times the mean an outlier is.

    Returns:
        One score per layer.

    Reference: Yin et al., 2023, arXiv:2310.05175. Inputs count by their root mean square, which
    is the norm but for the number of tokens; that of an expert is counted alike.
    """
    shares = {}
    for layer in stack.layers:
        sizes = _met(layer, stats, fetch)
        shares[layer.key] = 100 * (sizes > factor * sizes.mean()).double().mean().item()
    return Scores(shares, "layer", "outlier_share")


@method("score", aliases=("dlp",), paper="arXiv:2505.23807", needs=("second_moment_diagonal",))
def median_share(stack: Stack, stats: Stats, *, fetch: Fetch) -> Scores:
    r"""One minus a layer's share in the medians of `|w_ij| ||x_j||` over all layers.

    `I_l = 1 - m_l / sum m`: where the median is low, a few weights do the work, and more of them
    should stay.

    Args:
        stack: the layers.
        stats: with `second_moment_diagonal` per input group.
        fetch: given; the matrices `[out, in]` of a layer by their key.

    Returns:
        One score per layer.

    Reference: Chen et al., 2025, arXiv:2505.23807; the medians of the paper, where its code takes
    means.
    """
    medians = {la.key: _met(la, stats, fetch).median().item() for la in stack.layers}
    total = sum(medians.values()) or 1.0
    return Scores({key: 1 - m / total for key, m in medians.items()}, "layer", "median_share")


@method("score", aliases=("ecoflap",), paper="arXiv:2310.02998")
def directional_change(
    stack: Stack,
    stats: Stats,
    *,
    losses: Callable[[Sequence[Mapping[str, tuple[Step, ...]]]], list[float]],
    step: float = 1e-3,
    draws: int = 4,
) -> Scores:
    r"""Slope of the loss along random directions, by two forward passes each and none back.

    `sum_z |L(W + step z) - L(W - step z)| / (2 step)` with `z` normal, one group of matrices at a
    time: an estimate of the norm of its gradient, but for a factor. The slopes of a layer are
    added up and shared out among its groups by their size.

    Args:
        stack: the layers.
        stats: not used.
        losses: given; for each trial, chains per group, the loss in nats per token.
        step: how far.
        draws: how many directions.

    Returns:
        One score per fusion group, in nats per unit of the direction.

    Reference: Sung et al., 2023, arXiv:2310.02998, on 32 samples, 8 to a direction; weights are
    substituted at the call, where adding and taking away again leaves rounding behind.
    """
    groups = stack.groups()
    sides = [(seed, sign) for seed in range(draws) for sign in (step, -step)]
    trials = [
        {group.key: (Step("noise", {"step": side, "seed": seed}),)}
        for group in groups
        for seed, side in sides
    ]
    found = torch.tensor(losses(trials), dtype=torch.float64).reshape(len(groups), draws, 2)
    slopes = (found[..., 0] - found[..., 1]).abs().sum(1) / (2 * step)
    of_layer: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for group, slope in zip(groups, slopes.tolist(), strict=True):
        layer = group.matrices[0].layer
        of_layer[layer] = of_layer.get(layer, 0.0) + slope
        sizes[layer] = sizes.get(layer, 0) + group.size
    values = {
        group.key: of_layer[layer] * group.size / sizes[layer]
        for group in groups
        for layer in [group.matrices[0].layer]
    }
    return Scores(values, "group", "directional_change", dict.fromkeys(values, 1.0))
