"""Products of two thin factors: dense, quantized, or beside what was rounded."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.weight import Dense, Product, Sum, Weight
from layerwise.edit.weight._grid import check_bits
from layerwise.edit.weight._solve import mean_squares, must_be_moment
from layerwise.edit.weight.gptq import gptq
from layerwise.edit.weight.rtn import rtn

#: how the error of inputs is counted: all alike, each by its size, or by their second moment
Metric = Literal["none", "diag", "full"]


class Spectrum(NamedTuple):
    """`W S = U diag(s) V^T`, and `V^T S^-1`: what is left behind a rank is lost in this metric."""

    left: Float[Tensor, "out least"]
    values: Float[Tensor, " least"]
    right: Float[Tensor, "least in"]

    def factors(self, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """The best product of a rank, with the singular values shared out evenly."""
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def spectrum(weight: Float[Tensor, "out in"], stats: Mapping[str, Any], metric: Metric) -> Spectrum:
    """Singular values of a weight in a metric of its inputs; without statistics a plain one."""
    work, (rows, columns) = weight.float(), weight.shape
    if not work.any():  # what is asked for its bytes alone
        least = min(rows, columns)
        none = torch.zeros(rows, least), torch.zeros(least), torch.zeros(least, columns)
        return Spectrum(*(part.to(work.device) for part in none))
    root, inverse = _root(stats, metric)
    if root is not None:
        work = work @ root if root.ndim == 2 else work * root
    left, values, right = torch.linalg.svd(work, full_matrices=False)
    if inverse is not None:
        right = right @ inverse if inverse.ndim == 2 else right * inverse
    return Spectrum(left, values, right)


def _root(stats: Mapping[str, Any], metric: Metric) -> tuple[Tensor | None, Tensor | None]:
    """`S` with `S S^T` the moment, and its inverse; vectors where it is diagonal.

    Directions that are hardly used count a millionth of the most used one, so that `S` has an
    inverse. Roots of ill-conditioned moments lose half of the digits: float64.
    """
    if metric == "full" and "second_moment" in stats:
        must_be_moment(stats["second_moment"], "low_rank")
        sizes, axes = torch.linalg.eigh(stats["second_moment"].double())
        if sizes[-1] <= 0:
            return None, None
        size = sizes.clamp_min(1e-6 * sizes[-1]).sqrt()
        return (axes * size).float(), (axes / size).T.float()
    squares = mean_squares(stats)
    if metric == "none" or squares is None or squares.max() <= 0:
        return None, None
    size = squares.float().clamp_min(1e-6 * squares.max()).sqrt()
    return size, 1 / size


def truncation_curve(
    weight: Float[Tensor, "out in"], stats: Mapping[str, Any], metric: Metric = "full"
) -> Float[Tensor, " ranks"]:
    """Squared error of the best product of every rank, from 0 up, out of one decomposition.

    Example:
        >>> stats = {"second_moment": torch.diag(torch.tensor([100.0, 1.0]))}
        >>> truncation_curve(torch.diag(torch.tensor([1.0, 2.0])), stats).round()
        tensor([104.,   4.,   0.], dtype=torch.float64)
    """
    squares = spectrum(weight, stats, metric).values.double().square()
    return torch.nn.functional.pad(squares.flip(0).cumsum(0).flip(0), (0, 1))


def rank_of(name: str, shape: Sequence[int], share: float, rank: int = 0) -> int:
    """How many ranks are meant: those named, or a share of the smaller side; at least one.

    Raises:
        LayerwiseError: in the name of a method, share or rank are out of range.
    """
    if not 0 <= share <= 1 or rank < 0:
        raise LayerwiseError(
            f"{name}, options 'share' and 'rank'",
            allowed="a share from 0 to 1, and a rank of 1 or more, or 0 to go by the share",
            found=(share, rank),
            fix="choose others",
        )
    return min(rank, *shape) if rank else max(1, math.floor(share * min(shape) + 1e-9))


def _truncation_errors(
    weight: Float[Tensor, "out in"], settings: Sequence[Mapping[str, Any]]
) -> list[float]:
    curve = truncation_curve(weight, {}, "none")
    rank = partial(rank_of, "low_rank", weight.shape)
    return [curve[rank(chosen["share"], chosen["rank"])].item() for chosen in settings]


@method(
    "weight",
    aliases=("svd_llm", "asvd"),
    paper="arXiv:2403.07378",
    needs=("second_moment",),
    errors=_truncation_errors,
)
def low_rank(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    before: Weight,
    target: Float[Tensor, "out in"],
    share: float = 0.5,
    rank: int = 0,
    metric: Metric = "full",
) -> Product | Sum:
    r"""The product `A B` of a rank that is nearest to a weight, on the inputs that it has.

    `min ||(W - A B) S||_F`, `S S^T` the second moment of the inputs (`full`), its diagonal
    (`diag`) or the identity (`none`): the first singular values of `W S` stay, the squares of the
    others are the error. Behind a step that rounded, `W` is what that step lost, and the product
    is added to what it left.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it the metric is `none`.
        before: given; what the step before left.
        target: given; the last weight of the chain that was not rounded.
        share: rank over the smaller side; a square matrix takes fewer bytes only below one half.
        rank: a rank in place of the share, as far as the matrix has it.
        metric: how the error of inputs is counted.

    Returns:
        A `Product`, or the `Sum` of what the step before left and a `Product`.

    Raises:
        LayerwiseError: `share` or `rank` are out of range, or the second moment is none.

    Example:
        >>> w, h = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([100.0, 1.0]))
        >>> found = low_rank(w, {"second_moment": h}, before=Dense(w), target=w)
        >>> found.dense().round().abs()
        tensor([[1., 0.],
                [0., 0.]])

    Reference: Wang et al., 2024, arXiv:2403.07378 (`full`), with an eigenvalue root, which needs
    no positive definite moment; Yuan et al., 2023, arXiv:2312.05821 (`diag`), who count by
    sqrt(mean |x|). Beside rounding: Zhang et al., 2024, arXiv:2402.02446.
    """
    chosen = rank_of("low_rank", weight.shape, share, rank)
    alone = isinstance(before, Dense)
    missed = weight if alone else target.float() - before.dense().float()
    factors = spectrum(missed, stats, metric).factors(chosen)
    product = Product(*(Dense(factor.to(target.dtype).contiguous()) for factor in factors))
    return product if alone else Sum(before, product)


def _quantized_errors(
    weight: Float[Tensor, "out in"], settings: Sequence[Mapping[str, Any]]
) -> list[float]:
    found, errors = spectrum(weight, {}, "none"), []
    for chosen in settings:
        rank = rank_of("quantized_factors", weight.shape, chosen["share"])
        a, b = (rtn(f, {}, bits=chosen["bits"], group=0, shrink=True) for f in found.factors(rank))
        errors.append((Product(a, b).dense() - weight.float()).square().sum().item())
    return errors


@method(
    "weight",
    aliases=("mlorq",),
    paper="arXiv:2507.09616",
    needs=("second_moment",),
    errors=_quantized_errors,
)
def quantized_factors(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    share: float = 0.5,
    bits: Literal[4, 6, 8] = 4,
    metric: Metric = "full",
) -> Product:
    r"""The product of two quantized factors, each rounded on what it receives.

    `B` of `W ~ A B` is rounded by `gptq` on the second moment `H` of the inputs; `A` is fitted
    anew to what `B` became, `A = W H B^T (B H B^T)^-1`, and rounded on `B H B^T`.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it factors are rounded to nearest.
        share: rank over the smaller side.
        bits: of both factors, one scale per row.
        metric: in which the product is nearest, see `low_rank`.

    Returns:
        A `Product` of two `Quantized` records.

    Raises:
        LayerwiseError: `share` or `bits` are out of range.

    Example:
        >>> weight = torch.outer(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([3.0, -1.0, 0.5]))
        >>> record = quantized_factors(weight, {}, share=0.4, bits=8)
        >>> bool((record.dense() - weight).abs().max() < 0.05)
        True

    Reference: Gordon et al., 2025, arXiv:2507.09616, whose rows count by the curvature of the
    output, and whose factors have bits of their own; the menu holds ranks and bits, and the
    allocator chooses among them.
    """
    check_bits("quantized_factors", bits, 0)
    rank = rank_of("quantized_factors", weight.shape, share)
    moment = stats.get("second_moment")
    a, b = (f.to(weight.dtype) for f in spectrum(weight, stats, metric).factors(rank))
    if moment is None:
        return Product(*(rtn(f, {}, bits=bits, group=0, shrink=True) for f in (a, b)))
    inner = gptq(b, stats, bits=bits, group=0)
    rows = inner.dense().double()
    seen = rows @ moment.double() @ rows.T
    wanted = weight.double() @ moment.double() @ rows.T
    damped = seen + 1e-6 * seen.diagonal().mean() * torch.eye(rank, device=seen.device)
    fitted = torch.linalg.lstsq(damped, wanted.T).solution.T.to(weight.dtype)
    fitted = fitted if fitted.isfinite().all() else a
    outer = gptq(fitted, {"second_moment": seen.float()}, bits=bits, group=0)
    return Product(outer, inner)
