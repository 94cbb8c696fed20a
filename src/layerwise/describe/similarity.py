"""How alike two sets of states are: CKA, canonical correlations, and the best affine map."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats
from layerwise.core.tokens import Moments, Sample


def boundaries(samples: Sequence[Sample]) -> list[Tensor]:
    """States before the first layer and after every one; only those of the last one's tokens."""
    last, first = samples[-1], samples[0]
    same = [s.after.double() for s in samples if torch.equal(s.where, last.where)]
    enters = torch.equal(first.where, last.where) and first.before.numel() > 0
    return [first.before.double(), *same] if enters else same


def centred_gram(x: Float[Tensor, "rows dim"], unbiased: bool = True) -> Float[Tensor, "rows rows"]:
    """`x x^T`, centred; unbiased, its diagonal is 0 and its rows sum to 0 without it.

    Example:
        >>> centred_gram(torch.randn(6, 3)).sum(0).abs().max() < 1e-5
        tensor(True)
    """
    shifted = x - x.mean(0)
    gram = shifted @ shifted.T
    if not unbiased:
        return gram
    n = len(x)
    gram.fill_diagonal_(0)
    rows = gram.sum(1)
    gram = gram - (rows[:, None] + rows[None]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)


def cka_map(
    left: Sequence[Float[Tensor, "rows _"]],
    right: Sequence[Float[Tensor, "rows _"]],
    unbiased: bool = True,
) -> Float[Tensor, "left right"]:
    """Linear CKA between all pairs: the cosine between their centred Gram matrices."""
    unit = []
    for side in (left, right):
        grams = [centred_gram(x, unbiased) for x in side]
        unit.append(torch.stack([g.flatten() / g.norm().clamp_min(1e-300) for g in grams]))
    return unit[0] @ unit[1].T


def hsic(m: Moments, i: int, j: int) -> Float[Tensor, ""]:
    """Unbiased HSIC of two sides, streamed: from sums over rows, no pair of rows is formed.

    `[tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n (n-3))`, diagonals 0.
    """
    n, s, r = m.count, m.total[m.side(i)], m.total[m.side(j)]
    cross, both = m.product(i, j), m.norm_product[i, j]
    trace = cross.square().sum() - both
    sums = (s @ s - m.norms[i], r @ r - m.norms[j])
    middle = s @ cross @ r - s @ m.weighted[m.side(i), j] - r @ m.weighted[m.side(j), i] + both
    total = trace + sums[0] * sums[1] / ((n - 1) * (n - 2)) - 2 / (n - 2) * middle
    return total / (n * (n - 3))


def streamed_cka(m: Moments) -> float:
    """Unbiased linear CKA of the two sides of moments; n at least 4."""
    return (hsic(m, 0, 1) / (hsic(m, 0, 0) * hsic(m, 1, 1)).clamp_min(1e-300).sqrt()).item()


@method("describe", aliases=("cka",), paper="arXiv:1905.00414", needs=("token_sample",))
def similarity(stack: Stack, stats: Stats, *, unbiased: bool = True) -> Figures:
    """Linear CKA between the states before and after every layer, and between all layers.

    Args:
        stack: the layers.
        stats: with `token_sample`; with `stream_moments` also over every token.
        unbiased: without the bias that makes unrelated states look alike when tokens are few.

    Returns:
        `cka` per layer on the sample, `cka_all` over every token where it was streamed, and a map
        of all pairs of layers, the first row and column being what enters the stack.

    Reference: Kornblith et al., 2019, arXiv:1905.00414; unbiased after Song et al., 2012. A
    sample is a token, so massive tokens dominate.
    """
    samples = stats.along("token_sample", stack)
    streams = stats.along("stream_moments", stack) if "stream_moments" in stats.values else {}
    states = boundaries(list(samples.values()))
    table = cka_map(states, states, unbiased)
    found: dict[str, dict[str, float]] = {}
    for i, key in enumerate(samples):
        whole = len(states) == len(samples) + 1
        found[key] = {"cka": table[i, i + 1].item()} if whole else {}
        if len(streams.get(key, ())) == 2 and unbiased:
            found[key]["cka_all"] = streamed_cka(streams[key][0].plus(streams[key][1]))
    note = f"{len(states[-1])} tokens; unrelated states: 0 if unbiased"
    return Figures(found, note, {"cka": table})


#: the covariance of what left a layer and its whitening: both enter the next one
Whitened = dict[str, Tensor]


def directions(cov: Float[Tensor, "dim dim"], keep: float) -> Float[Tensor, "dim kept"]:
    """Whitening of the principal directions that hold a share `keep` of the variance."""
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(cov))
    good = values > 1e-10 * values[0].clamp_min(1e-300)
    share = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum().clamp_min(1e-300)
    count = int((good & (share - values / values.clamp_min(0).sum() < keep)).sum())
    return vectors[:, :count] / values[:count].sqrt()


@method("describe", aliases=("cca", "svcca", "pwcca"), needs=("stream_moments",))
def canonical(stack: Stack, stats: Stats, *, keep: float = 0.99) -> Figures:
    r"""Canonical correlations between the states before and after a layer, over every token.

    `rho` are the singular values of `Cxx^{-1/2} Cxy Cyy^{-1/2}` within the directions that hold a
    share `keep` of each side's variance (SVCCA). `cca` is their mean, `cca_squared` that of their
    squares, `pwcca` a mean weighted by `sum_j |<c_i, x_j>|` of the side with fewer directions.

    Args:
        stack: the layers.
        stats: with `stream_moments`.
        keep: share of the variance; 1 keeps all but directions without any.

    Returns:
        The three, `kept` directions and `floor`, the `cca_squared` of unrelated states.

    Reference: Raghu et al., 2017, arXiv:1706.05806; Morcos et al., 2018, arXiv:1806.05759. The
    mean is over all correlations, not over the first 98% of their sum.
    """
    found: dict[str, dict[str, float]] = {}
    known: Whitened = {}
    for key, folds in stats.along("stream_moments", stack).items():
        m = folds[0].plus(folds[1]) if len(folds) == 2 else None
        found[key] = {} if m is None else correlations(m, keep, known)
    return Figures(found, "a sample is a token; unrelated states have a cca_squared of `floor`")


def correlations(m: Moments, keep: float, known: Whitened | None = None) -> dict[str, float]:
    """CCA of the two sides of moments, by the eigenvectors of the side with fewer directions."""
    known = {} if known is None else known
    enters, leaves = (m.covariance(i, i) for i in (0, 1))
    same = bool(known) and torch.equal(known["covariance"], enters)
    sides = [known["whitening"] if same else directions(enters, keep), directions(leaves, keep)]
    known |= {"covariance": leaves, "whitening": sides[1]}
    one = int(sides[0].shape[1] > sides[1].shape[1])
    few = sides[one].shape[1]
    across = sides[one].T @ m.covariance(one, 1 - one) @ sides[1 - one]
    values, vectors = torch.linalg.eigh(across @ across.T)  # a third of the time of an SVD
    rho = values.clamp(0, 1).sqrt()
    weights = (vectors.T @ sides[one].T @ m.covariance(one, one)).abs().sum(1)
    return {
        "cca": rho.sum().item() / few,
        "cca_squared": rho.square().sum().item() / few,
        "pwcca": ((weights * rho).sum() / weights.sum()).item(),
        "kept": float(few),
        "floor": max(side.shape[1] for side in sides) / (m.count - 1),
    }


def match_map(
    left: Sequence[Float[Tensor, "rows _"]],
    right: Sequence[Float[Tensor, "rows _"]],
    held_out: Tensor,
    ridge: float,
) -> tuple[Float[Tensor, "left right"], Float[Tensor, "left right"]]:
    """Error of the best affine map from each of `left` to each of `right`, on held-out rows.

    Returns:
        `|X W + b - Y|^2` over `|Y|^2`, and over `|Y - mean|^2`.
    """
    train, test = ~held_out, held_out
    hats = [ridge_hat(x[train] - x[train].mean(0), x[test] - x[train].mean(0), ridge) for x in left]
    squares = torch.stack([(hat.T @ hat).flatten() for hat in hats])
    weights = torch.stack([hat.flatten() for hat in hats])
    columns = []
    for y in right:  # |hat y - true|^2, multiplied out
        known, true = y[train] - y[train].mean(0), y[test] - y[train].mean(0)
        both = squares @ (known @ known.T).flatten() - 2 * weights @ (true @ known.T).flatten()
        error = (both + true.square().sum()).clamp_min(0)
        sizes = y[test].square().sum(), (y[test] - y[test].mean(0)).square().sum()
        columns.append(torch.stack([error / size.clamp_min(1e-300) for size in sizes]))
    raw, centred_error = torch.stack(columns, 2)
    return raw, centred_error


def ridge_hat(
    train: Float[Tensor, "rows dim"], test: Float[Tensor, "more dim"], ridge: float
) -> Float[Tensor, "more rows"]:
    """What least squares of anything on `train` makes of it at `test`, as weights of its rows."""
    wide = train.shape[1] > train.shape[0]
    inner = train @ train.T if wide else train.T @ train
    damp = ridge * train.square().sum() / len(train) + 1e-12 * inner.diagonal().mean()
    inner.diagonal().add_(damp)
    if wide:
        return torch.linalg.solve(inner, train @ test.T).T
    return test @ torch.linalg.solve(inner, train.T)


@method("describe", aliases=("stitching",), paper="arXiv:2412.11299", needs=("token_sample",))
def direct_match(stack: Stack, stats: Stats, *, ridge: float = 0.001) -> Figures:
    r"""How well the states of one layer become those of another by the best affine map.

    `min |X W + b - Y|^2` on the tokens of even documents, `|X W + b - Y|^2 / |Y - mean|^2` on
    those of odd ones: 0 says that nothing of `Y` is lost in `X`. It is not symmetric.

    Args:
        stack: the layers.
        stats: with `token_sample`.
        ridge: as a share of the mean square of the source; needed where tokens are fewer than
            dimensions.

    Returns:
        `error` per layer, from what enters it to what leaves it; `error_raw`, over the uncentred
        `|Y|^2` as published, which is near 0 for any data with a large mean; maps of all pairs.

    Reference: Balogh and Jelasity, 2024, arXiv:2412.11299; with a ridge, on held-out documents.
    """
    samples = stats.along("token_sample", stack)
    states = boundaries(list(samples.values()))
    held_out = next(iter(samples.values())).where[:, 0] % 2 == 1
    if len(states) != len(samples) + 1 or not 1 < int(held_out.sum()) < len(held_out) - 1:
        return Figures({key: {} for key in samples}, "needs the same tokens of several documents")
    raw, centred_error = match_map(states, states, held_out, ridge)
    found = {
        key: {"error": centred_error[i, i + 1].item(), "error_raw": raw[i, i + 1].item()}
        for i, key in enumerate(samples)
    }
    used = f"{int((~held_out).sum())} tokens fitted, {int(held_out.sum())} measured"
    return Figures(found, f"{used}, {states[-1].shape[1]} dimensions", {"error": centred_error})
