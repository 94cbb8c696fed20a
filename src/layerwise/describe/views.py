"""How little a layer's summary of a document changes when the document is perturbed."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.spectra import spectral_entropy
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats

Views = Float[Tensor, "documents views dim"]


@method(
    "describe",
    aliases=("infonce", "lidar", "dime"),
    paper="arXiv:2502.02013",
    needs=("pooled_states",),
    cost=lambda size, chosen: "reads {} documents, {} perturbed copies each".format(*size.views),
)
def invariance(
    stack: Stack,
    stats: Stats,
    *,
    views: int,
    temperature: float = 0.1,
    delta: float = 0.0001,
    permutations: int = 10,
) -> Figures:
    """InfoNCE, LiDAR and DiME of the documents' states under small changes of their text.

    Args:
        stack: the layers.
        stats: with `pooled_states` of `views` perturbed copies of every document, one after the
            other.
        views: given; how many copies there are of each document.
        temperature: of InfoNCE.
        delta: what LiDAR adds to the scatter within documents.
        permutations: that DiME averages over.

    Returns:
        `infonce`, lower where views of one document are told from others; `lidar`, the effective
        number of directions in which documents differ more than their views; `dime`, 0 where two
        views have nothing in common.

    Reference: Skean et al., 2025, arXiv:2502.02013.
    """
    found: dict[str, dict[str, float]] = {}
    count = 0
    for key, sample in stats.along("pooled_states", stack).items():
        x = sample.after.double()
        x = x.reshape(-1, views, x.shape[-1])  # [documents, views, dim]
        count = len(x)
        found[key] = {
            "infonce": infonce(x, temperature),
            "lidar": lidar(x, delta),
            "dime": dime(x, permutations),
        }
    chance = math.log(max(2 * count - 1, 1))
    return Figures(found, f"{count} documents, {views} views; infonce of equal states {chance:.3f}")


def infonce(x: Views, temperature: float) -> float:
    """`-log(e^{pos} / sum of positives and negatives)` of two views, mean over both.

    Example:
        >>> x = torch.eye(3)[:, None].repeat(1, 2, 1)
        >>> abs(infonce(x, 0.1) - math.log(1 + 4 * math.exp(-10))) < 1e-6
        True
    """
    pair = torch.cat([x[:, 0], x[:, 1]])
    n = len(x)
    scores = (pair @ pair.T / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(2 * n).roll(n)
    positive = scores[torch.arange(2 * n), other]
    return (scores.logsumexp(1) - positive).mean().item()


def lidar(x: Views, delta: float) -> float:
    """`exp` of the entropy of `Sw^{-1/2} Sb Sw^{-1/2}`: scatter of documents, of their views."""
    n, q, dim = x.shape
    means = x.mean(1)
    inside = (x - means[:, None]).reshape(n * q, dim)
    within = inside.T @ inside / (n * q) + delta * torch.eye(dim, dtype=x.dtype)
    between = means - means.mean(0)
    values, vectors = torch.linalg.eigh(within)
    white = between @ vectors / values.sqrt()
    p = torch.linalg.svdvals(white).square()
    p = p / p.sum().clamp_min(1e-300)
    return (-torch.xlogy(p, p).sum()).exp().item()


def dime(x: Views, permutations: int) -> float:
    """`E_P S(A o P B P^T) - S(A o B)` with `A`, `B` the cosines between documents in two views."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(x[:, :2], dim=-1)
    a, b = unit[:, 0] @ unit[:, 0].T, unit[:, 1] @ unit[:, 1].T
    orders = [torch.randperm(len(x), generator=generator) for _ in range(permutations)]
    products = [a * b, *(a * b[order][:, order] for order in orders)]
    own, *apart = (spectral_entropy(torch.linalg.eigvalsh(p)).item() for p in products)
    return sum(apart) / len(apart) - own
