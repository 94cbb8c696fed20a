"""Zeros in what matrices receive: the largest entries of every token stay."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Layer, Matrix
from layerwise.core.stats import Stats

#: what a matrix is about to receive -> what it receives
Change = Callable[[Tensor], Tensor]
#: roles of matrices that write into the stream, whose inputs come from inside of the layer
WRITERS = ("o", "down")


def keep_largest(
    x: Float[Tensor, "*tokens dim"], count: int, basis: Float[Tensor, "dim dim"] | None = None
) -> Float[Tensor, "*tokens dim"]:
    """The largest entries of every token, by magnitude and in a basis; the others are 0.

    `z = x Q`, of which `count` entries stay, and `z Q^T`.

    Example:
        >>> basis = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
        >>> x = torch.tensor([2.0, 1.9])
        >>> keep_largest(x, 1), keep_largest(x, 1, basis)
        (tensor([2., 0.]), tensor([1.9500, 1.9500]))
    """
    if count >= x.shape[-1]:
        return x
    turned = x if basis is None else x @ basis.to(x)
    chosen = turned.abs().topk(count, dim=-1).indices
    kept = torch.zeros_like(turned).scatter(-1, chosen, turned.gather(-1, chosen))
    return kept if basis is None else kept @ basis.to(x).T


def _levels(
    name: str, layer: Layer, share: float, stream: float, inner: float
) -> Iterator[tuple[Matrix, float, bool]]:
    """Every matrix of a layer that is no expert, what stays of its input, and if it is inner."""
    if not 0 <= share <= 1 or stream < 0 or inner < 0:
        raise LayerwiseError(
            f"{name}, options 'share', 'stream' and 'inner'",
            allowed="a share from 0 to 1, factors of 0 or more",
            found=(share, stream, inner),
            fix="choose others",
        )
    for matrix in layer.matrices:
        if matrix.expert is None and matrix.role != "router":
            inside = matrix.role in WRITERS
            goes = (1 - share) * (inner if inside else stream)
            yield matrix, max(1 - goes, 0.0), inside


@method("activation", aliases=("larosa",), paper="arXiv:2507.01299", needs=("second_moment",))
def top_k(
    layer: Layer,
    stats: Stats,
    *,
    share: float = 0.6,
    basis: Literal["pca", "random", "none"] = "pca",
    stream: float = 0.8,
    inner: float = 1.2,
    seed: int = 0,
) -> dict[str, Change]:
    r"""So many of the largest entries of every token stay, after a rotation to principal axes.

    What reads the stream gets `keep_largest(x Q) Q^T`, `Q` the eigenvectors of the second moment
    of what it receives, not centred; what writes into the stream gets its largest entries as they
    are. Folded, `W Q` needs `x Q` alone, once for all matrices of one input.

    Args:
        layer: whose matrices receive less; those of experts are left alone.
        stats: `second_moment` by input group.
        share: of the entries that stay; 1 changes nothing.
        basis: `pca`, `random`, or `none` for entries as they are everywhere.
        stream: of what reads the stream, this much times `1 - share` goes.
        inner: of what writes into the stream, this much times `1 - share` goes.
        seed: of random rotations.

    Returns:
        By the key of a matrix, what it receives of what it would receive.

    Raises:
        LayerwiseError: `share` or a factor is out of range.

    Example:
        >>> import layerwise
        >>> layer = layerwise.open("demo").layers()[0]
        >>> sorted(top_k(layer, Stats({}), basis="none"))[:2]
        ['decoder/0/attention.k', 'decoder/0/attention.o']

    Reference: Liu et al., 2025, arXiv:2507.01299, whose code rotates back and forth at run time
    and searches the factors; without a basis it is the top-k of every token.
    """
    generator = torch.Generator().manual_seed(seed)
    moments = stats.values.get("second_moment", {})

    @cache
    def rotation(inputs: str, size: int) -> Tensor | None:
        if basis == "none" or (basis == "pca" and inputs not in moments):
            return None
        if basis == "random":
            return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        return torch.linalg.eigh(moments[inputs].double())[1].float()

    return {
        matrix.key: partial(
            keep_largest,
            count=math.ceil(kept * matrix.shape[1] - 1e-9),
            basis=None if inside else rotation(matrix.inputs, matrix.shape[1]),
        )
        for matrix, kept, inside in _levels("top_k", layer, share, stream, inner)
    }


@method("activation", aliases=("teal",), paper="arXiv:2408.14690", needs=("magnitude_quantiles",))
def magnitude_threshold(
    layer: Layer,
    stats: Stats,
    *,
    share: float = 0.6,
    stream: float = 1.0,
    inner: float = 1.0,
) -> dict[str, Change]:
    """Entries below a threshold go; it is the size that so many entries had in calibration.

    Args:
        layer: whose matrices receive less; those of experts are left alone.
        stats: `magnitude_quantiles` by input group; what has none is left as it is.
        share: of the entries that stay on the calibration text; 1 changes nothing.
        stream: of what reads the stream, this much times `1 - share` goes.
        inner: of what writes into the stream, this much times `1 - share` goes.

    Returns:
        By the key of a matrix, what it receives of what it would receive.

    Raises:
        LayerwiseError: `share` or a factor is out of range.

    Example:
        >>> import layerwise
        >>> magnitude_threshold(layerwise.open("demo").layers()[0], Stats({}))
        {}

    Reference: Liu et al., 2024, arXiv:2408.14690 (TEAL), who search the levels block by block.
    """
    known = stats.values.get("magnitude_quantiles", {})

    def cut(x: Tensor, least: float) -> Tensor:
        return x if least == 0 else torch.where(x.abs() >= least, x, 0.0)

    return {
        matrix.key: partial(cut, least=known[matrix.inputs][round(1000 * (1 - kept))].item())
        for matrix, kept, _ in _levels("magnitude_threshold", layer, share, stream, inner)
        if matrix.inputs in known
    }
