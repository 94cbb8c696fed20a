"""Grids that are not integers: values of a Gaussian, and sums of planes of trits."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.gaussian import gaussian_grid
from layerwise.core.method import method
from layerwise.core.weight import Codebook, Sum, Trits, in_groups


@method("weight", paper="arXiv:2411.17525", by_rows=True)
def gaussian(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    levels: int = 16,
    dim: int = 1,
    group: int = 1024,
) -> Codebook:
    """Round weights, or pairs of neighbours, to the grid that is best for a normal distribution.

    Each group of columns is divided by its root mean square first. Weights are not normally
    distributed; after `rotate` they nearly are.

    Args:
        weight: `[out, in]`.
        stats: not used.
        levels: points of the grid; 2 to 256 of single values, or 4, 16, 64, 256 of pairs.
        dim: 1 for single values, 2 for pairs.
        group: columns that share a scale; the last group may be shorter; 0 for the whole row.

    Returns:
        A `Codebook` record: `log2(levels) / dim` bits a weight and a scale per group.

    Raises:
        LayerwiseError: there is no such grid, or `group` is negative.

    Example:
        >>> record = gaussian(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), {}, levels=2)
        >>> record.dense()
        tensor([[ 0.7979, -0.7979,  0.7979, -0.7979]])

    Reference: Malinovskii et al., 2024, arXiv:2411.17525 (HIGGS is rotate, gaussian); scales have
    the dtype of the weight, and a last group that is shorter keeps its own.
    """
    if group < 0:
        raise LayerwiseError(
            "gaussian, option 'group'", allowed="0 or more", found=group, fix="choose another"
        )
    columns = weight.shape[1]
    book = gaussian_grid(levels, dim).points.to(weight.device)
    width = group or columns
    blocks = in_groups(weight.float().contiguous(), width)  # [out, groups, width]
    used = in_groups(torch.ones(1, columns, device=weight.device), width).sum(-1)
    scale = (blocks.square().sum(-1) / used).sqrt().to(weight.dtype)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    unit = (blocks / divisor[..., None]).flatten(1)[:, :columns]
    codes = nearest_points(in_groups(unit, dim), book)
    return Codebook(codes, scale.contiguous(), book, group, columns)


def nearest_points(
    vectors: Float[Tensor, "out vectors dim"], book: Float[Tensor, "levels dim"]
) -> Int[Tensor, "out vectors"]:
    """The number of the point nearest to each vector, row by row to save memory."""
    offset = book.square().sum(1) / 2
    rows = [(row @ book.T - offset).argmax(1) for row in vectors]
    return torch.stack(rows).to(torch.int16)


@method("weight", paper="arXiv:2509.16989", aliases=("ptqtp",))
def trit_planes(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    group: int = 128,
    rounds: int = 50,
) -> Sum:
    r"""Two planes of -1, 0 and 1, each times a scale per group: `w = a T + b U`.

    In turn the scales by ridge regression on the planes, `(S^T S + r I)^-1 S^T w`, and for each
    weight the best of the nine pairs.

    Args:
        weight: `[out, in]`.
        stats: not used.
        group: columns that share scales; the last group may be shorter; 0 for the whole row.
        rounds: at most; it ends when no scale moves by 1e-4 of the largest weight of its group.

    Returns:
        The sum of two `Trits` records: 3.2 bits a weight and two scales per group.

    Raises:
        LayerwiseError: `group` is negative or `rounds` not positive.

    Example:
        >>> record = trit_planes(torch.tensor([[1.0, 0.4, -0.7, 0.0]]), {})
        >>> record.dense(), record.a.codes
        (tensor([[ 0.8500,  0.4000, -0.8500,  0.0000]]), tensor([[ 1,  1, -1,  0]], ...))

    Reference: Xiao et al., 2025, arXiv:2509.16989. Planes start at the signs of the weights; of
    equal pairs the sparser one is taken, the first plane before the second. After the scales are
    rounded to the dtype of the weight the trits are chosen once more.
    """
    if group < 0 or rounds < 1:
        raise LayerwiseError(
            "trit_planes, options 'group' and 'rounds'",
            allowed="a group of 0 or more, 1 round or more",
            found=(group, rounds),
            fix="choose others",
        )
    rows, columns = weight.shape
    blocks = in_groups(weight.float().contiguous(), group or columns)  # [out, groups, width]
    size = blocks.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    scales = alternate_planes((blocks / size).flatten(0, 1), rounds).reshape(rows, -1, 2)
    scales = (scales * size).to(weight.dtype)
    planes = choose_trits(blocks.flatten(0, 1), scales.float().reshape(-1, 2))
    planes = planes.reshape(rows, -1, 2)[:, :columns].to(torch.int8)
    one, two = (
        Trits(planes[..., i].contiguous(), scales[..., i].contiguous(), group) for i in (0, 1)
    )
    return Sum(one, two)


def alternate_planes(
    values: Float[Tensor, "groups width"], rounds: int
) -> Float[Tensor, "groups 2"]:
    """Scales of two planes per group, none negative, from alternating ridge regression."""
    planes = values.sign()[..., None].expand(-1, -1, 2)
    scales = torch.zeros(len(values), 2, device=values.device)
    for _ in range(rounds):
        gram = (planes.mT @ planes).double()
        seen = (planes.mT @ values[..., None]).double()[..., 0]
        new = _ridge(gram, seen).float()
        moved = (new - scales).abs().amax()
        scales = new
        if moved < 1e-4:
            break
        planes = choose_trits(values, scales)
    return scales.abs()


def _ridge(gram: Tensor, seen: Tensor) -> Tensor:
    """2 x 2 systems, damped tenfold more while their condition exceeds 1e6, at most by 1."""
    eye = torch.eye(2, dtype=gram.dtype, device=gram.device)
    ridge = torch.full((len(gram), 1, 1), 1e-8, dtype=gram.dtype, device=gram.device)
    for _ in range(8):
        damped = gram + ridge * eye
        determinant = torch.linalg.det(damped)
        # of a 2 x 2 matrix the inverse has the same Frobenius norm over the determinant
        condition = damped.square().sum((1, 2)) / determinant.abs().clamp_min(1e-300)
        ridge = torch.where((condition > 1e6)[:, None, None], 10 * ridge, ridge)
    return torch.linalg.solve(gram + ridge * eye, seen)


def choose_trits(
    values: Float[Tensor, "groups width"], scales: Float[Tensor, "groups 2"]
) -> Float[Tensor, "groups width 2"]:
    """The best of the nine pairs for every value; of equal ones the sparser, then the first."""
    pairs = sorted(product((1.0, 0.0, -1.0), repeat=2), key=lambda p: abs(p[0]) + abs(p[1]))
    chosen = torch.zeros(*values.shape, 2, device=values.device)
    least = torch.full_like(values, torch.inf)
    for pair in pairs:
        trits = torch.tensor(pair, device=values.device)
        error = (values - (scales @ trits)[:, None]).abs()
        better = error < least
        chosen[better] = trits
        least = torch.where(better, error, least)
    return chosen
