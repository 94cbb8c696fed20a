"""Weights set to zero: a score per weight, a pattern in which so many go, the others updated."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.weight import Sparse
from layerwise.edit.weight._mask import (
    check_pattern,
    column_energy,
    columns_of,
    in_units,
    keep_largest,
    removed,
    spread_columns,
    unit_of,
)
from layerwise.edit.weight._solve import column_feedback, inverse_factor, mean_squares, prepared


def removed_squares(
    weight: Float[Tensor, "out in"], settings: Sequence[Mapping[str, Any]]
) -> list[float]:
    """The sum of the smallest squares that go, for many shares out of one sort per pattern."""
    sums: dict[str, list[Tensor]] = {}
    for pattern in {chosen["pattern"] for chosen in settings}:
        width, together = unit_of(pattern, weight.shape[1])
        if columns_of(pattern):
            units = [column_energy(weight.float(), columns_of(pattern))[None]]
        else:
            units = in_units(weight.float().square(), width, together)
        ordered = [members.sort(1).values.double().cumsum(1) for members in units]
        sums[pattern] = [torch.nn.functional.pad(total, (1, 0)).sum(0) for total in ordered]
    return [
        sum(total[removed(len(total) - 1, chosen["share"])].item() for total in sums[own])
        for chosen in settings
        for own in [chosen["pattern"]]
    ]


@method("weight", errors=removed_squares)
def magnitude(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    share: float = 0.5,
    pattern: str = "matrix",
) -> Sparse:
    """Keep the largest weights.

    Args:
        weight: `[out, in]`.
        stats: not used.
        share: of the weights that stay; `floor((1 - share) n)` of the `n` of every unit go.
        pattern: what a unit is: `row`; `matrix`; `block`, 128 columns of all rows; such as `2:4`,
            of which 2 of every 4 neighbours in a row stay; or such as `column:64`, by which 64
            neighbouring columns, a head's for instance, stay or go as one.

    Returns:
        A `Sparse` record: the weights that stay, and a bit for every weight.

    Raises:
        LayerwiseError: `share` or `pattern` is out of range, or they contradict each other.

    Example:
        >>> magnitude(torch.tensor([[4.0, 0.0, 1.0, -2.0]]), {}).dense()
        tensor([[ 4.,  0.,  0., -2.]])
    """
    check_pattern("magnitude", share, pattern)
    return _kept(weight, keep_largest(weight.float().abs(), share, pattern))


@method(
    "weight",
    paper="arXiv:2306.11695",
    needs=("second_moment_diagonal",),
    errors=removed_squares,
)
def wanda(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    share: float = 0.5,
    pattern: str = "row",
) -> Sparse:
    r"""Keep the weights with the largest `|w_ij| ||x_j||`, which are not changed.

    Args:
        weight: `[out, in]`.
        stats: `second_moment_diagonal`, or `second_moment`, of the inputs; all inputs count alike
            without either.
        share: of the weights that stay, see `magnitude`.
        pattern: in which so many go, see `magnitude`.

    Returns:
        A `Sparse` record.

    Raises:
        LayerwiseError: `share` or `pattern` is out of range, or they contradict each other.

    Example:
        >>> weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0]])
        >>> squares = torch.tensor([1.0, 4.0, 64.0, 9.0])
        >>> wanda(weight, {"second_moment_diagonal": squares}).dense()
        tensor([[ 4.,  0.,  1.,  0.],
                [ 0.,  0., -1., -3.]])

    Reference: Sun et al., 2023, arXiv:2306.11695. Theirs prunes all matrices of a layer on the
    inputs of the dense layer; here each sees what the ones before it left.
    """
    check_pattern("wanda", share, pattern)
    squares = mean_squares(stats)
    sizes = 1.0 if squares is None else squares.float().clamp_min(0).sqrt()
    return _kept(weight, keep_largest(weight.float().abs() * sizes, share, pattern))


@method("weight", paper="arXiv:2301.00774", needs=("second_moment",), errors=removed_squares)
def sparsegpt(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    share: float = 0.5,
    pattern: str = "block",
    damping: float = 0.01,
) -> Sparse:
    r"""Set weights to zero column by column, and let the columns that remain make up for it.

    With `U` the upper Cholesky factor of `(X X^T + d I)^-1`, those with the least `w_j^2 / U_jj^2`
    go; a column that loses weights moves the later ones by `-w_j / U_jj * U[j, j:]`. In blocks,
    and in groups such as `2:4`, weights are chosen when they are reached; else beforehand.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it this is `magnitude`.
        share: of the weights that stay, see `magnitude`.
        pattern: in which so many go, see `magnitude`.
        damping: `d` as a share of the mean of the diagonal.

    Returns:
        A `Sparse` record.

    Raises:
        LayerwiseError: `share` or `pattern` is out of range, or they contradict each other.

    Example:
        >>> moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> stats = {"second_moment": moment}
        >>> sparsegpt(torch.tensor([[1.0, 1.2]]), stats, damping=0.0).dense()
        tensor([[0.0000, 1.7000]])

    Of whole columns those go that the others can make up for best, by `tr(W_B (H^-1_BB)^-1 W_B^T)`
    of a block `B`, in eight rounds; those that stay are fitted anew, `W H[:, K] H[K, K]^-1`.

    Reference: Frantar and Alistarh, 2023, arXiv:2301.00774; Kurtic et al., 2023, arXiv:2302.04089
    for columns. Exactly the promised number goes;
    theirs is one more. Each matrix sees what the ones before it left.
    """
    check_pattern("sparsegpt", share, pattern)
    moment = stats.get("second_moment")
    if moment is None or share == 1:
        return magnitude(weight, {}, share=share, pattern=pattern)
    width = unit_of(pattern, weight.shape[1])[0]
    late = width < weight.shape[1]
    work, hessian = prepared(weight, moment)
    if columns_of(pattern):
        return _kept(*_fewer_columns(work, hessian, share, columns_of(pattern), damping, weight))
    factor = inverse_factor(hessian, damping, "sparsegpt")
    size = factor.diagonal()
    mask = keep_largest((work / size).square(), share, pattern)
    result = torch.empty_like(work)

    def choose(start: int, columns: Tensor) -> None:
        own = slice(start, start + columns.shape[1])
        mask[:, own] = keep_largest((columns / size[own]).square(), share, pattern)

    def prune(values: Tensor, place: int) -> tuple[Tensor, Tensor]:
        result[:, place] = torch.where(mask[:, place], values, 0.0)
        return mask[:, place], result[:, place]

    sequence = torch.arange(weight.shape[1], device=weight.device)
    block = width if late else 128
    column_feedback(work, factor, sequence, prune, block, choose if late else None)
    return _kept(result.to(weight.dtype), mask)


def _kept(weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]) -> Sparse:
    return Sparse(weight[mask], mask)


#: rounds in which whole columns go, each on what the last one left
ROUNDS = 8


def _fewer_columns(
    work: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    share: float,
    block: int,
    damping: float,
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """The weight with blocks of columns gone and the others fitted anew, and what stayed."""
    columns = work.shape[1]
    count = -(-columns // block)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    target, rounds = removed(count, share), min(ROUNDS, removed(count, share))
    gone = torch.empty(0, dtype=torch.long, device=work.device)
    kept, fitted = torch.arange(columns, device=work.device), work
    mask = spread_columns(gone, block, work)
    factor = inverse_factor(hessian, 0.0, "sparsegpt")
    for left in range(rounds - 1, -1, -1):
        losses = _block_losses(fitted[:, kept], factor, block)
        alive = (kept[::block] // block).unique_consecutive()
        more = target - len(gone) - left * (target // rounds)
        gone = torch.cat([gone, alive[losses.argsort(stable=True)[:more]]])
        mask = spread_columns(gone, block, work)
        kept = mask[0].nonzero()[:, 0]
        factor = inverse_factor(hessian[kept][:, kept], 0.0, "sparsegpt")
        fitted = torch.zeros_like(work)
        fitted[:, kept] = work @ hessian[:, kept] @ factor.T @ factor
    return fitted.to(weight.dtype), mask


def _block_losses(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], block: int
) -> Float[Tensor, " blocks"]:
    """What the loss grows by if a block of columns goes and all others make up for it."""
    inverse = factor.T @ factor
    if block == 1:
        return weight.square().sum(0) / inverse.diagonal()
    losses = []
    for start in range(0, weight.shape[1], block):
        own = slice(start, start + block)
        part = weight[:, own]
        losses.append((torch.linalg.solve(inverse[own, own], part.T) * part.T).sum())
    return torch.stack(losses)
