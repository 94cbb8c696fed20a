"""The shape of what lies between layers: moments, spectra of documents, position and context."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.fan import fan_out
from layerwise.core.method import method
from layerwise.core.spectra import smaller_gram, spectral_entropy
from layerwise.core.stats import Probe, Seen
from layerwise.core.tokens import Moments, by_token, kept, moments_of

#: documents and tokens so far, the mean of the first document before and after, moments of even
#: and odd documents
Paired = tuple[int, int, tuple[Tensor, Tensor] | None, tuple[Moments | None, Moments | None]]


@method("measure")
def stream_moments(*, per_dimension: int = 20) -> Probe:
    """Moments of tokens before (`x`) and after (`y`) a layer, of even and of odd documents.

    Both sides shifted by the mean of the first document, which changes nothing that is invariant
    to a shift but saves digits; products of the documents of a batch in float32, their sums in
    float64. `3 dim^2` multiplications per token, a quarter of a layer.

    Args:
        per_dimension: tokens that are enough for each dimension of the state: documents are looked
            at until that many have been. Unrelated states have a mean squared canonical correlation
            of one over this. 0 looks at all.

    Returns:
        A probe whose value per layer is the `Moments` of even and of odd documents, so that what
        is fitted on one can be tested on the other; none where a layer moves positions.

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3, 1)
        >>> probe = stream_moments()
        >>> seen = Seen(x, 2 * x, None, None, {}, None)
        >>> even, odd = probe.finish(probe.update(probe.init("decoder/0"), seen))
        >>> even.count, odd.count, even.plus(odd).covariance(0, 1)
        (3, 3, tensor([[5.8333]], dtype=torch.float64))
    """

    def update(state: Paired, seen: Seen) -> Paired:
        assert seen.output is not None
        documents, tokens, shift, folds = state
        x, y = by_token(seen.inputs), by_token(seen.output)
        if x.shape[:2] != y.shape[:2]:
            return state
        keep = kept(seen.inputs, seen.mask)
        if per_dimension:
            begun = tokens + keep.sum(1).cumsum(0) - keep.sum(1)
            keep = keep[begun < per_dimension * x.shape[2]]
        x, y = x[: len(keep)], y[: len(keep)]
        if not len(keep):
            return state
        if shift is None:
            shift = (x[0][keep[0]].double().mean(0), y[0][keep[0]].double().mean(0))
        found = list(folds)
        for fold in (0, 1):
            mine = slice((fold - documents) % 2, None, 2)
            if keep[mine].any():
                new = moments_of(x[mine][keep[mine]], y[mine][keep[mine]], shift)
                before = found[fold]
                found[fold] = new if before is None else before.plus(new)
        return documents + len(keep), tokens + int(keep.sum()), shift, (found[0], found[1])

    def finish(state: Paired) -> tuple[Moments, ...]:
        return tuple(fold for fold in state[3] if fold is not None)

    return Probe("layer", lambda key: (0, 0, None, (None, None)), update, finish)


@method("measure", aliases=("prompt_entropy", "curvature"), paper="arXiv:2502.02013")
def document_geometry(*, documents: int = 8, alpha: float = 1.0, clamp: bool = False) -> Probe:
    r"""Spectral entropy and curvature of the states within a document, after each layer.

    With `Z` `[tokens, dim]` the document's states minus their mean, every row of norm 1, and `p`
    the eigenvalues of `Z Z^T` over their sum: `entropy = -sum p log p`, or `log(sum p^alpha) /
    (1 - alpha)`, in nats; `rank = exp(entropy)`. `curvature` is the mean angle between successive
    steps `z_{k+1} - z_k` of the states, `turn` that between the rows of `Z`, in degrees.

    Args:
        documents: only the first so many are looked at; each costs an eigenvalue problem.
        alpha: order of the entropy.
        clamp: set negative entries of `Z Z^T` to 0 first, as the authors' code does.

    Returns:
        A probe whose value per layer has means over documents of `entropy`, `entropy_share` (of
        `log min(tokens, dim)`), `rank`, `curvature`, `turn`. A document of fewer than 3 tokens or
        of equal ones has none. Isotropic independent tokens have a curvature of 120 degrees.

    Example:
        >>> eye = torch.eye(8)[None, :5]
        >>> probe = document_geometry()
        >>> found = probe.finish(probe.update(probe.init(""), Seen(eye, eye, None, None, {}, None)))
        >>> round(found["rank"], 4), round(found["curvature"], 2)
        (4.0, 120.0)

    Reference: Skean et al., 2025, arXiv:2502.02013. Their code computes `turn` and calls it
    curvature; the clamp makes the two sides `Z Z^T` and `Z^T Z` disagree, so it is off here.
    """

    def update(state: tuple[int, tuple[Tensor, ...]], seen: Seen) -> tuple[int, tuple[Tensor, ...]]:
        assert seen.output is not None
        count, found = state
        if count >= documents:
            return state
        keep = kept(seen.output, seen.mask)
        some = slice(documents - count)
        looks = (
            _look(document[counts], clamp)
            for document, counts in zip(by_token(seen.output)[some], keep[some], strict=True)
        )
        looks = [look for look in looks if look is not None]
        spectra = fan_out(torch.linalg.eigvalsh, [look.gram for look in looks])
        for look, values in zip(looks, spectra, strict=True):
            entropy = spectral_entropy(values, alpha)
            figures = [entropy, entropy / look.most, entropy.exp(), *look.angles]
            found = (*found, torch.stack(figures))
        return count + len(keep), found

    def finish(state: tuple[int, tuple[Tensor, ...]]) -> dict[str, float]:
        names = ("entropy", "entropy_share", "rank", "curvature", "turn")
        if not state[1]:
            return {}
        return dict(zip(names, torch.stack(state[1]).mean(0).tolist(), strict=True))

    return Probe("layer", lambda key: (0, ()), update, finish, figures=True)


class _Look(NamedTuple):
    """Products of a document's rows of norm 1, the entropy that they have at most, and angles of
    successive steps and rows."""

    gram: Tensor
    most: float
    angles: list[Tensor]


def _look(x: Float[Tensor, "tokens dim"], clamp: bool) -> _Look | None:
    kind, x = torch.promote_types(x.dtype, torch.float32), x.double()
    z = x - x.mean(0)
    norms = z.norm(dim=1, keepdim=True)
    if len(x) < 3 or norms.min() <= 1e-9 * x.norm(dim=1).max():
        return None
    z = z / norms
    rows = z.to(kind)  # digits are for angles, not for eigenvalues
    gram = (rows @ rows.T).clamp_min(0) if clamp else smaller_gram(rows)
    steps = torch.nn.functional.normalize(x.diff(dim=0), dim=1)
    angles = [
        ((v[1:] * v[:-1]).sum(1)).clamp(-1, 1).arccos().mean() * 180 / math.pi for v in (steps, z)
    ]
    return _Look(gram, math.log(min(x.shape)), angles)


#: documents whose products are formed, for the one figure that needs them
PRODUCTS = 16


class Grid(NamedTuple):
    """Sums over documents of one length, less the mean of the first: per position, the mean of
    each document, of squares, and of products over the first documents."""

    shift: Float[Tensor, " dim"]
    positions: Float[Tensor, "positions dim"]
    means: tuple[Tensor, ...]
    squares: float
    products: Float[Tensor, "dim dim"]


Grids = dict[int, Grid]


@method("measure", aliases=("position_context",), paper="arXiv:2310.04861")
def position_parts(*, skip_first: bool = True, documents: int = 64) -> Probe:
    r"""How much of the states after a layer is position, how much document, how much neither.

    Over documents `c` of equal length `T`: `h = mean + pos_t + ctx_c + rest`, exactly additive:
    `sum |h - mean|^2 = C sum |pos_t|^2 + T sum |ctx_c|^2 + sum |rest|^2`. Where lengths differ,
    the length that most tokens have is taken.

    Args:
        skip_first: leave position 0 out, whose huge norm would be all of `pos`.
        documents: of one length, only the first so many are looked at.

    Returns:
        A probe whose value per layer has the shares of variance `position_share`,
        `context_share`, `rest_share`; `position_rank`, the stable rank of `pos`;
        `position_top10`, its ten largest singular values over all; `position_norm`, its spectral
        norm relative to that of `h - mean` in the first 16 documents; `incoherence`, the largest
        `|cos(pos_t, ctx_c)|`; `smoothness`, the share of `pos` in the lowest tenth of frequencies.
        Noise alone gives `pos` the share `rest_share / documents`.

    Example:
        >>> h = torch.eye(4)[:2][None] + torch.eye(4)[2:][:, None]  # [documents, positions, dim]
        >>> probe = position_parts(skip_first=False)
        >>> found = probe.finish(probe.update(probe.init(""), Seen(h, h, None, None, {}, None)))
        >>> [round(abs(found[k]), 4) for k in ("position_share", "rest_share", "incoherence")]
        [0.5, 0.0, 0.0]

    Reference: Song and Zhong, 2023, arXiv:2310.04861; they print `position_norm` and a ratio of
    singular values, which are no shares of variance.
    """

    def update(state: Grids, seen: Seen) -> Grids:
        assert seen.output is not None
        rows, keep = by_token(seen.output), kept(seen.output, seen.mask)
        found, begin = dict(state), int(skip_first)
        alike = [rows] if keep.all() else [x[m][None] for x, m in zip(rows, keep, strict=True)]
        for x in (x[:, begin:].float() for x in alike):
            before = found.get(x.shape[1])
            x = x[: max(documents - (len(before.means) if before else 0), 0)]
            if len(x):
                found[x.shape[1]] = _joined(before, x)
        return found

    return Probe("layer", lambda key: {}, update, split_positions, figures=True)


def _joined(before: Grid | None, x: Float[Tensor, "documents positions dim"]) -> Grid:
    """The sums with more documents of one length; those of one batch in float32."""
    if before is None:
        zero = torch.zeros_like(x[0], dtype=torch.float64)
        before = Grid(x[0].mean(0), zero, (), 0.0, zero.new_zeros(x.shape[2], x.shape[2]))
    x = x - before.shift
    early = x[: max(PRODUCTS - len(before.means), 0)].flatten(0, 1)
    return before._replace(
        positions=before.positions + x.sum(0),
        means=(*before.means, *x.mean(1).double()),
        squares=before.squares + x.flatten(1).norm(dim=1).double().square().sum().item(),
        products=before.products + (early.T @ early).double() if len(early) else before.products,
    )


def split_positions(state: Grids) -> dict[str, float]:
    """The figures of the length that most tokens have; none of fewer than two documents."""
    length = max(state, key=lambda n: (n * len(state[n].means), n), default=0)
    if length < 2 or len(state[length].means) < 2:
        return {}
    grid = state[length]
    ctx = torch.stack(grid.means).cpu()
    count, mean = len(ctx), ctx.mean(0)
    some, early = ctx[:PRODUCTS], ctx[:PRODUCTS].mean(0)
    covariance = grid.products.cpu() / len(some) - length * torch.outer(early, early)
    pos, ctx = grid.positions.cpu() / count - mean, ctx - mean
    total = grid.squares - count * length * mean.square().sum().item()
    parts = [count * pos.square().sum().item() / total, length * ctx.square().sum().item() / total]
    values = torch.linalg.eigvalsh(smaller_gram(pos)).flip(0).clamp_min(0).sqrt()
    unit = torch.nn.functional.normalize
    largest = torch.linalg.eigvalsh(covariance)[-1].clamp_min(0).sqrt()
    waves = torch.fft.rfft(pos, dim=0).abs().square().sum(1)
    waves[1:] *= 2
    return {
        "position_share": parts[0],
        "context_share": parts[1],
        "rest_share": 1 - sum(parts),
        "position_rank": (values.square().sum() / values[0].square().clamp_min(1e-300)).item(),
        "position_top10": (values[:10].sum() / values.sum().clamp_min(1e-300)).item(),
        "position_norm": (values[0] / largest).item(),
        "incoherence": (unit(pos, dim=1) @ unit(ctx, dim=1).T).abs().max().item(),
        "smoothness": (waves[: 1 + len(waves) // 10].sum() / waves.sum().clamp_min(1e-300)).item(),
        "documents": float(count),
    }
