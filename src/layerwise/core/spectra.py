"""Entropies of spectra."""

from jaxtyping import Float
from torch import Tensor


def spectral_entropy(values: Float[Tensor, " count"], alpha: float = 1.0) -> Float[Tensor, ""]:
    """Renyi entropy in nats of eigenvalues over their sum; `alpha` 1 is Shannon's.

    Example:
        >>> import torch
        >>> round(spectral_entropy(torch.tensor([1.0, 1.0, 1.0, 0.0])).exp().item(), 4)
        3.0
    """
    p = values.clamp_min(0) / values.clamp_min(0).sum()
    p = p[p > 1e-14]
    if alpha == 1:
        return -(p * p.log()).sum()
    return (p**alpha).sum().log() / (1 - alpha)


def smaller_gram(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "side side"]:
    """`x x^T` or `x^T x`, whichever is smaller: both have the same eigenvalues but for zeros.

    Example:
        >>> import torch
        >>> smaller_gram(torch.ones(5, 2))
        tensor([[5., 5.],
                [5., 5.]])
    """
    return rows.T @ rows if rows.shape[1] < rows.shape[0] else rows @ rows.T
