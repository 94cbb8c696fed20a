"""What the weights say by themselves: norms, spectra, tails, outliers, and how far they turned."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats

Fetch = Callable[[str], Mapping[str, Tensor]]
#: ranks of a spectrum that are kept
POINTS = 32


@method(
    "describe",
    aliases=("stable_rank", "alpha", "outliers"),
    cost=lambda size, chosen: (
        f"takes singular values of {size.matrices} matrices, the smaller side up to {size.widest}"
    ),
)
def spectrum(
    stack: Stack, stats: Stats, *, fetch: Fetch, exact: int = 1024, factor: float = 5.0
) -> Figures:
    r"""Norms, effective ranks, tail exponents and outliers of every matrix; needs no data.

    With `l` the squared singular values: `stable_rank = sum l / max l`, `entropy = -sum p log p /
    log(count)` with `p = l / sum l`, `alpha` the exponent of the tail of `l` (`tail_index`, by
    search) and `alpha_median` the one from the median on. `outliers` is the share of weights
    larger than `factor` times the mean of their absolute values; 6.6e-5 for a Gaussian and 5.

    Args:
        stack: the layers.
        stats: not used.
        fetch: given; the matrices `[out, in]` of a layer by their key.
        exact: the smaller side up to which all singular values are computed; of larger matrices
            the 256 largest are, by two random projections, and the rest counted as equal.
        factor: how large an outlier is.

    Returns:
        Figures per matrix, and their means per layer. A map of singular values per kind of matrix,
        at a few ranks: its first row are the ranks, the others the layers, 0 where one has none.

    Reference: Martin and Mahoney, 2021, arXiv:1810.01075 (search); Zhou et al., 2023,
    arXiv:2312.00359 (median). The two exponents are not comparable.
    """
    found: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[int, Tensor]] = {}
    sketched = 0
    for i, layer in enumerate(stack.layers):
        rows = {}
        for key, weight in fetch(layer.key).items():
            w = weight.float()
            values = squared_values(w, exact)
            rows[key] = _figures(w, values) | {"outliers": share_above(w, factor)}
            kind = key.removeprefix(f"{layer.key}/").partition("[")[0]
            curves.setdefault(kind, {}).setdefault(i, values.flip(0).sqrt())
            sketched += min(w.shape) > exact
        found[layer.key] = _mean(list(rows.values()))
        found |= rows
    note = "layers: means of their matrices; alpha of a Gaussian matrix depends on its shape"
    maps = {kind: _at_ranks(mine, len(stack.layers)) for kind, mine in curves.items()}
    return Figures(found, note + (f"; {sketched} matrices sketched" if sketched else ""), maps)


def _at_ranks(curves: Mapping[int, Tensor], layers: int) -> Float[Tensor, "rows ranks"]:
    """Values of some layers at ranks that grow geometrically, below these ranks; of one expert."""
    most = max(map(len, curves.values()))
    ranks = torch.logspace(0, math.log10(most), POINTS).round().unique().long()
    table = torch.zeros(1 + layers, len(ranks), dtype=torch.float64)
    table[0] = ranks
    for i, values in curves.items():
        here = ranks <= len(values)
        table[1 + i, here] = values[ranks[here] - 1].cpu()
    return table


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    names = list(dict.fromkeys(k for row in rows for k in row))
    kept = {k: [r[k] for r in rows if math.isfinite(r.get(k, math.nan))] for k in names}
    return {k: sum(v) / len(v) for k, v in kept.items() if v}


def share_above(weight: Float[Tensor, "out in"], factor: float) -> float:
    """Share of the weights larger than `factor` times their mean absolute value."""
    size = weight.abs()
    return (size > factor * size.mean()).float().mean().item()


def _figures(weight: Float[Tensor, "out in"], values: Float[Tensor, " count"]) -> dict[str, float]:
    total = weight.double().square().sum().item()
    if total == 0:
        return {"norm": 0.0}
    rest, count = max(total - values.sum().item(), 0.0), min(weight.shape) - len(values)
    p = torch.cat([values, values.new_full((count,), rest / max(count, 1))]) / total
    return {
        "norm": math.sqrt(total),
        "largest": values.max().sqrt().item(),
        "stable_rank": total / values.max().item(),
        "entropy": (-torch.xlogy(p, p).sum() / math.log(max(len(p), 2))).item(),
        "alpha": tail_index(values),
        **({} if count else {"alpha_median": tail_index(values, how="median")}),
    }


def squared_values(weight: Float[Tensor, "out in"], exact: int) -> Float[Tensor, " count"]:
    """Squared singular values, ascending; of a large matrix the 256 largest, by projection.

    Example:
        >>> squared_values(torch.diag(torch.tensor([1.0, 2.0])), 10)
        tensor([1., 4.], dtype=torch.float64)
    """
    w = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if len(w) > exact:
        generator = torch.Generator(w.device).manual_seed(0)
        start = torch.randn(w.shape[1], 272, generator=generator, device=w.device)
        basis = torch.linalg.qr(w @ start).Q
        for _ in range(2):
            basis = torch.linalg.qr(w @ (w.T @ basis)).Q
        w = basis.T @ w
    w = w.double()
    values = torch.linalg.eigvalsh(w @ w.T).clamp_min(0)
    return values if len(weight) == len(values) or len(values) < 272 else values[-256:]


def tail_index(
    values: Float[Tensor, " count"], how: Literal["search", "median"] = "search"
) -> float:
    r"""Exponent of a power law fitted to the upper tail of squared singular values.

    `alpha = 1 + n / sum_{j >= i} ln(l_j / l_i)` with `n` values from the `i`-th on. `search`
    takes the `i` whose fit is nearest to the values (Kolmogorov-Smirnov); `median` the middle one.

    Returns:
        The exponent; not a number of fewer than 3 values or of equal ones.

    Example:
        >>> round(tail_index(torch.tensor([1.0, math.e, math.e**2]).double()), 6)
        2.0
    """
    kept = values[values > 1e-12 * values.max()].sort().values
    n = len(kept)
    if n < 3:
        return math.nan
    logs = kept.log()
    counts = torch.arange(n, 0, -1, dtype=kept.dtype, device=kept.device)
    sums = logs.flip(0).cumsum(0).flip(0) - counts * logs
    alphas = 1 + counts / sums
    if how == "median":
        return alphas[n // 2].item() if sums[n // 2] > 0 else math.nan
    ranks = torch.arange(n, dtype=kept.dtype, device=kept.device)
    model = 1 - ((logs[None] - logs[:, None]) * (1 - alphas[:, None])).exp()  # [start, value]
    gaps = (model - (ranks[None] - ranks[:, None]) / counts[:, None]).abs().triu()
    distance = gaps.amax(1)
    distance[~(sums > 1e-12 * counts)] = torch.inf
    best = int(distance[:-1].argmin())
    return alphas[best].item() if distance[best].isfinite() else math.nan


@method("describe", paper="arXiv:1806.01603")
def rotation(stack: Stack, stats: Stats, *, fetch: Fetch, reference: Fetch) -> Figures:
    r"""How far every matrix turned away from another checkpoint: `1 - <w, w0> / (|w| |w0|)`.

    Args:
        stack: the layers.
        stats: not used.
        fetch: given; the matrices of a layer.
        reference: given; those of the same layer in the other checkpoint.

    Returns:
        `rotation` (0 the same direction, 1 a right angle, 2 turned around) and `growth`, the ratio
        of norms, per matrix, and their means per layer; none for a matrix that is zero in either.

    Reference: Carbonnelle and De Vleeschouwer, 2018, arXiv:1806.01603; one rotation per matrix.
    """
    found: dict[str, dict[str, float]] = {}
    for layer in stack.layers:
        before = reference(layer.key)
        rows = {k: turned(w, before[k]) for k, w in fetch(layer.key).items() if k in before}
        rows = {k: row for k, row in rows.items() if row}
        found[layer.key] = _mean(list(rows.values()))
        found |= rows
    return Figures(found, "0: same direction; 1: unrelated")


def turned(weight: Float[Tensor, "out in"], before: Float[Tensor, "out in"]) -> dict[str, float]:
    """Rotation through half the squared distance of the unit matrices, exact near 0.

    Example:
        >>> round(turned(torch.eye(2), -3 * torch.eye(2))["rotation"], 6)
        2.0
    """
    a, b = weight.double(), before.double()
    sizes = a.norm(), b.norm()
    if min(sizes) == 0:
        return {}
    distance = (a / sizes[0] - b / sizes[1]).square().sum() / 2
    return {"rotation": distance.item(), "growth": (sizes[0] / sizes[1]).item()}
