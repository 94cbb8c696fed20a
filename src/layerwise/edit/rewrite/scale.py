"""Scales of channels: what is made smaller where it is given, and larger where it is read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.seam import Place

#: rows of a matrix on which a scale is tried
ROWS = 512


@method("rewrite", paper="arXiv:2306.00978", needs=("mean_magnitude", "second_moment"))
def awq(
    seam: Place,
    stats: Mapping[str, Mapping[str, Any]],
    *,
    rounded: Mapping[str, Callable[[Tensor], Tensor]],
    points: int = 20,
    weigh: bool = False,
    inside: bool = True,
) -> Float[Tensor, " size"]:
    r"""Make channels that are large smaller, and the columns that read them larger.

    `s = (mean |x|)^rho`, or `s = (mean |x|)^rho / (max |W|)^(1 - rho)` with `weigh`, with the one
    `rho` of `0, 1/points, ... 1 - 1/points` at which `sum tr(E H E^T)` over all matrices that read
    the channels is least, `E = Q(W diag(s)) diag(s)^-1 - W`.

    Args:
        seam: where channels can be scaled, and the matrices that read them.
        stats: of what each matrix receives: `mean_magnitude`, `[in]`, and `second_moment`,
            `[in, in]`; a matrix that nothing came to does not count.
        rounded: given; what the steps that follow make of a matrix, by its key: rounding to the
            nearest point of the grid that its chain ends in. What stays as it is is not in it.
        points: exponents to try.
        weigh: divide by the largest weight that reads a channel as well.
        inside: also between two matrices, not only behind norms.

    Returns:
        `s`, a factor per channel, its largest the inverse of its smallest; ones where nothing that
        reads the channels is rounded, or where no scale does better.

    Raises:
        LayerwiseError: `points` is not positive.

    Example:
        >>> w, h = torch.tensor([[0.3, -1.0, 0.8, 0.1]]), torch.diag(torch.tensor([81.0, 1, 1, 1]))
        >>> place = Place(4, True, {"up": w}, {"up": torch.arange(4)})
        >>> stats = {"up": {"mean_magnitude": h.diagonal().sqrt(), "second_moment": h}}
        >>> coarse = lambda w: (w / w.abs().max() * 3).round() * w.abs().max() / 3
        >>> scale = awq(place, stats, rounded={"up": coarse})
        >>> scale[0] / scale[1]
        tensor(3.3484)

    Reference: Lin et al., 2023, arXiv:2306.00978. Theirs measures the error of the module that
    reads the channels, ours that of the matrices in it, on at most 512 rows of each; theirs leaves
    out grouped heads, ours lets the heads of a group share their factors.
    """
    if points < 1:
        raise LayerwiseError(
            "awq, option 'points'", allowed="1 or more", found=points, fix="raise it"
        )
    readers = [
        k for k in seam.weights if k in rounded and stats[k].get("mean_magnitude") is not None
    ]
    best = torch.ones(seam.size)
    if not readers or not (inside or seam.norm):
        return best
    size = seam.largest({key: stats[key]["mean_magnitude"] for key in readers})
    above = seam.largest({key: seam.weights[key].abs().amax(0) for key in readers})
    least = None
    some = {k: seam.weights[k][:: -(-len(seam.weights[k]) // ROWS)].float() for k in readers}
    for step in range(points):
        power = step / points
        scale = evened(size, power, above if weigh else None) if step or weigh else best.to(size)
        error = sum(
            len(seam.weights[key])
            / len(weight)
            * _error(weight, scale[seam.channels[key]], rounded[key], stats[key]["second_moment"])
            for key, weight in some.items()
        )
        if least is None or error < least:
            best, least = scale, error
    return best


def _error(
    weight: Tensor, scale: Tensor, rounded: Callable[[Tensor], Tensor], moment: Tensor
) -> float:
    """`tr(E H E^T)` when a matrix is rounded with its columns scaled."""
    own = scale.to(weight)
    off = rounded(weight * own) / own - weight
    return ((off @ moment) * off).sum().item()


@method("rewrite", paper="arXiv:2211.10438", needs=("largest_magnitude",))
def smoothquant(
    seam: Place,
    stats: Mapping[str, Mapping[str, Any]],
    *,
    alpha: float = 0.5,
    inside: bool = False,
) -> Float[Tensor, " size"]:
    r"""Share the range of a channel between what gives it and the columns that read it.

    `s_j = max |x_j|^alpha / max |W_j|^(1 - alpha)`: at `alpha` 0.5 the largest activation and the
    largest weight of a channel are equally large afterwards.

    Args:
        seam: where channels can be scaled, and the matrices that read them.
        stats: `largest_magnitude` of what each matrix receives, `[in]`.
        alpha: how much of the range goes to the weights, 0 to 1.
        inside: also between two matrices, not only behind norms.

    Returns:
        `s`, a factor per channel; ones where no data came to.

    Raises:
        LayerwiseError: `alpha` is not from 0 to 1.

    Example:
        >>> place = Place(2, True, {"up": torch.tensor([[0.25, 1.0]])}, {"up": torch.arange(2)})
        >>> smoothquant(place, {"up": {"largest_magnitude": torch.tensor([4.0, 1.0])}})
        tensor([4., 1.])

    Reference: Xiao et al., 2022, arXiv:2211.10438. It was made for rounding activations too; for
    weights alone it helps only by chance.
    """
    if not 0 <= alpha <= 1:
        raise LayerwiseError(
            "smoothquant, option 'alpha'", allowed="0 to 1", found=alpha, fix="choose another"
        )
    readers = [k for k in seam.weights if stats[k].get("largest_magnitude") is not None]
    if not readers or not (inside or seam.norm):
        return torch.ones(seam.size)
    size = seam.largest({key: stats[key]["largest_magnitude"] for key in readers})
    above = seam.largest({key: seam.weights[key].abs().amax(0) for key in readers})
    scale = size.clamp_min(1e-5).pow(alpha) / above.clamp_min(1e-5).pow(1 - alpha)
    return torch.where((size > 0) & (above > 0), scale.clamp_min(1e-5), torch.ones_like(scale))


def evened(
    size: Float[Tensor, " size"], power: float, above: Float[Tensor, " size"] | None = None
) -> Float[Tensor, " size"]:
    """`size^power [/ above^(1 - power)]`, its largest the inverse of its smallest; dead ones at 1.

    Example:
        >>> evened(torch.tensor([16.0, 1.0, 0.0]), 0.5)
        tensor([2.0000, 0.5000, 1.0000])
    """
    live = size > 0
    if not live.any():
        return torch.ones_like(size)
    found = torch.where(live, size, torch.ones_like(size)).pow(power)
    if above is not None:
        found = found / above.clamp_min(1e-5).pow(1 - power)
    found = found.clamp_min(1e-4)
    found = found / (found[live].max() * found[live].min()).sqrt()
    return torch.where(live, found, torch.ones_like(found))
