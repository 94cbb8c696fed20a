"""The shape of the states between layers, and how much of an update is local to its token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from layerwise.core.method import method
from layerwise.core.spectra import smaller_gram, spectral_entropy
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats
from layerwise.core.tokens import Moments


@method("describe", aliases=("effective_rank", "anisotropy"), needs=("token_sample",))
def spread(stack: Stack, stats: Stats) -> Figures:
    r"""In how many directions the states after a layer lie, on a sample of tokens.

    `rank = exp(-sum p log p)` with `p` the eigenvalues of the centred states' covariance over
    their sum; `top_share` the largest `p`; `anisotropy` the mean cosine between two tokens;
    `norm` the median norm, and `largest_norm` the largest over it: a massive token.

    Returns:
        Five numbers per layer. The rank is at most the number of tokens less one.

    Example:
        >>> from layerwise.core.stack import Layer
        >>> from layerwise.core.tokens import Sample
        >>> layers = (Layer("decoder", 0, "", torch.nn.Identity(), (), ()),)
        >>> x = torch.eye(4)[:, :3]
        >>> sample = Sample(torch.zeros(4, 2).long(), x, x)
        >>> stats = Stats({"token_sample": {"decoder/0": sample}})
        >>> found = spread(Stack("decoder", "", layers, ()), stats)
        >>> round(found.values["decoder/0"]["rank"], 3)
        2.625
    """
    found, count = {}, 0
    for key, sample in stats.along("token_sample", stack).items():
        x = sample.after.double()
        norms, count = x.norm(dim=1), len(x)
        centred = x - x.mean(0)
        p = torch.linalg.eigvalsh(smaller_gram(centred)).clamp_min(0)
        p = p / p.sum().clamp_min(1e-300)
        unit = torch.nn.functional.normalize(x, dim=1).sum(0)
        found[key] = {
            "rank": spectral_entropy(p).exp().item(),
            "top_share": p[-1].item(),
            "anisotropy": ((unit @ unit - count) / max(count * (count - 1), 1)).item(),
            "norm": norms.median().item(),
            "largest_norm": (norms.max() / norms.median().clamp_min(1e-300)).item(),
        }
    return Figures(found, f"{count} tokens; anisotropy of unrelated directions is 0")


@method("describe", paper="arXiv:2502.02013", needs=("pooled_states",))
def dataset_entropy(
    stack: Stack, stats: Stats, *, alpha: float = 1.0, normed: bool = True
) -> Figures:
    r"""In how many directions the documents differ after a layer: entropy of their Gram spectrum.

    `entropy = -sum p log p` in nats, or `log(sum p^alpha) / (1 - alpha)`, with `p` the eigenvalues
    of `Z Z^T` over their sum; `rank = exp(entropy)`. `Z` holds a row per document, its state.

    Args:
        stack: the layers.
        stats: with `pooled_states`.
        alpha: order of the entropy.
        normed: divide every row by its norm; without, and with `pooled_states.how=unit`, it is
            what the authors' code computes, whose rows are means of centred and normed tokens.

    Returns:
        `entropy` and `rank` per layer, the latter at most the number of documents.

    Example:
        >>> from layerwise.core.stack import Layer
        >>> from layerwise.core.tokens import Sample
        >>> layers = (Layer("decoder", 0, "", torch.nn.Identity(), (), ()),)
        >>> x = torch.eye(4).repeat(2, 1)
        >>> sample = Sample(torch.zeros(8, 2).long(), x, x)
        >>> stats = Stats({"pooled_states": {"decoder/0": sample}})
        >>> found = dataset_entropy(Stack("decoder", "", layers, ()), stats)
        >>> round(found.values["decoder/0"]["rank"], 4)
        4.0

    Reference: Skean et al., 2025, arXiv:2502.02013, whose formula suggests plain means.
    """
    found, count = {}, 0
    for key, sample in stats.along("pooled_states", stack).items():
        x, count = sample.after.double(), len(sample.after)
        z = torch.nn.functional.normalize(x, dim=1) if normed else x
        entropy = spectral_entropy(torch.linalg.eigvalsh(smaller_gram(z)), alpha)
        found[key] = {"entropy": entropy.item(), "rank": entropy.exp().item()}
    return Figures(found, f"{count} documents, a state each")


def affine(m: Moments, ridge: float) -> tuple[Float[Tensor, "left right"], Float[Tensor, " right"]]:
    """Least squares `y = x W + b` from moments; the ridge is a share of the mean variance."""
    xx, xy = m.covariance(0, 0), m.covariance(0, 1)
    damp = ridge * xx.diagonal().mean() + 1e-12
    weight = torch.linalg.solve(
        xx + damp * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy
    )
    mean = m.total / m.count
    return weight, mean[m.side(1)] - mean[m.side(0)] @ weight


def neighbours(
    at: Float[Tensor, "some dim"], x: Float[Tensor, "tokens dim"], count: int
) -> Int[Tensor, "some count"]:
    """Which of some tokens are nearest to others, and not the very same."""
    distance = torch.cdist(at, x)
    if at is x:
        distance.fill_diagonal_(torch.inf)
    itself = distance <= 1e-6 * at.norm(dim=1, keepdim=True)
    return distance.masked_fill(itself, torch.inf).topk(min(count, len(x) - 1), largest=False)[1]


def local_map(
    x: Float[Tensor, "tokens dim"],
    y: Float[Tensor, "tokens dim"],
    count: int,
    at: Float[Tensor, "some dim"] | None = None,
) -> Float[Tensor, "some dim"]:
    """`A(h) h` with a diagonal `A`, least squares of `y` on `x` over the tokens nearest to `h`.

    `h` are the tokens `at`, those of `x` without it.
    """
    at = x if at is None else at
    near = neighbours(at, x, count)
    above, below = (embedding_bag(near, z, mode="sum") for z in (x * y, x.square()))
    return at * above / (below + 1e-3 * below.mean(1, keepdim=True) + 1e-300)


@method(
    "describe",
    aliases=("tokenwise",),
    paper="arXiv:2604.02459",
    needs=("token_sample", "stream_moments"),
)
def update_fit(
    stack: Stack, stats: Stats, *, neighbors: int = 16, ridge: float = 0.001, top: int = 16
) -> Figures:
    r"""How much of a layer's update is a function of its own token, and what is left.

    With `u = h_out - h_in`, a fitted update `û` and `r = u - û`. `local`: `û = A(h) h - h` with a
    diagonal map fitted on the nearest other tokens of the sample. `global`: one affine map for
    all tokens, fitted on every token of even documents and measured on odd ones.

    Args:
        stack: the layers.
        stats: with `token_sample` and `stream_moments` per layer.
        neighbors: tokens that a local map is fitted on.
        ridge: of the global map, as a share of the mean variance.
        top: directions of `û` that `r` is projected on.

    Returns:
        Per layer and kind: `error`, the mean of `|r| / |u|` (1 for a plain copy of the input);
        `aligned`, the mean of `cos(u, û)`; `residual_cosine`, that of `cos(r, û)`; and
        `residual_share`, the part of `|r|^2` in the `top` directions of `û`.

    Reference: arXiv:2604.02459; measured on updates, since states resemble each other anyway.
    """
    moments = stats.along("stream_moments", stack)
    found: dict[str, dict[str, float]] = {}
    count = 0
    for key, sample in stats.along("token_sample", stack).items():
        found[key] = {}
        if sample.before.shape != sample.after.shape:
            continue
        x, y, count = sample.before.double(), sample.after.double(), len(sample.after)
        odd = sample.where[:, 0] % 2 == 1
        fits = {"local": (local_map(x, y, neighbors), torch.ones_like(odd))}
        if len(moments.get(key, ())) == 2:
            fits["global"] = (_global_map(x, moments[key][0], ridge), odd)
        for name, (fitted, rows) in fits.items():
            parts = residual(y[rows] - x[rows], fitted[rows] - x[rows], top)
            found[key] |= {f"{name}_{k}": v for k, v in parts.items()}
    return Figures(found, f"{count} tokens; global maps fitted on even, measured on odd documents")


def _global_map(x: Tensor, m: Moments, ridge: float) -> Tensor:
    """The affine map in the coordinates of the moments, which are shifted and lie elsewhere."""
    weight, offset = affine(m, ridge)
    inner = x.to(weight.device) - m.shift[m.side(0)]
    return (inner @ weight + offset + m.shift[m.side(1)]).to(x.device)


def leading(rows: Float[Tensor, "tokens dim"], count: int) -> Float[Tensor, "dim count"]:
    """The directions in which rows are longest, from the Gram matrix of the smaller side."""
    if rows.shape[0] < rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        turned = rows.T @ vectors[:, -count:] / values[-count:].clamp_min(1e-300).sqrt()
        return turned * (values[-count:] > 1e-12 * values[-1])
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -count:]


def residual(
    update: Float[Tensor, "tokens dim"], fitted: Float[Tensor, "tokens dim"], top: int
) -> dict[str, float]:
    """How a fitted update relates to the true one, token by token."""
    if not len(update):
        return {}
    rest = update - fitted
    size = update.norm(dim=1).clamp_min(1e-12)
    cosine = torch.cosine_similarity
    basis = leading(fitted, top)
    inside = (rest @ basis).square().sum() / rest.square().sum().clamp_min(1e-300)
    return {
        "error": (rest.norm(dim=1) / size).mean().item(),
        "aligned": cosine(update, fitted, dim=1).mean().item(),
        "residual_cosine": cosine(rest, fitted, dim=1).mean().item(),
        "residual_share": inside.item(),
    }
