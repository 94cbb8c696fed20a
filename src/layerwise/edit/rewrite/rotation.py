"""Rotations of the residual stream."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.mixing import Stream
from layerwise.core.rotation import hadamard


@method("rewrite", paper="arXiv:2404.00456", aliases=("quarot",))
def rotate_stream(
    seam: Stream, stats: Mapping[str, Any], *, seed: int = 0
) -> Float[Tensor, "size size"]:
    r"""Rotate the residual stream at random, so that no channel of it stands out.

    `x' = x Q`, `Q = D (H x R)`, with random signs `D`, the Hadamard matrix `H` of the largest power
    of two in the size, and a random rotation `R` of the rest. The embedding and what writes into
    the stream get `Q` on their outputs, what reads it on their inputs, after the gains of the norms
    in between are folded into the latter. A head that was tied to the embedding is so no more.

    Args:
        seam: the stream.
        stats: not used.
        seed: of the signs and of the rotation of what is no power of two.

    Returns:
        `Q`, orthogonal.

    Example:
        >>> q = rotate_stream(Stream(12), {})
        >>> torch.allclose(q @ q.T, torch.eye(12), atol=1e-6)
        True

    Reference: Ashkboos et al., 2024, arXiv:2404.00456 (QuaRot), its rotation of the stream alone;
    those within a layer, which an engine must do while it runs, are left out. It was made for
    rounding activations too.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = seam.size & -seam.size
    rest = torch.randn(seam.size // whole, seam.size // whole, generator=generator)
    signs = torch.randint(0, 2, (seam.size, 1), generator=generator) * 2.0 - 1
    return signs * torch.kron(hadamard(whole), torch.linalg.qr(rest)[0].contiguous())


@method("rewrite", paper="arXiv:2401.15024", aliases=("slicegpt",), needs=("stream_moment",))
def principal_axes(seam: Stream, stats: Mapping[str, Any]) -> Float[Tensor, "size size"]:
    """Rotate the residual stream to its principal axes, the largest first; nothing is cut.

    `Q` holds the eigenvectors of the mean over layers of the second moment of what they receive.

    Args:
        seam: the stream.
        stats: `stream_moment` by layer, `[size, size]`.

    Returns:
        `Q`, orthogonal.

    Example:
        >>> moment = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> principal_axes(Stream(2), {"stream_moment": {"decoder/0": moment}}).abs()
        tensor([[0., 1.],
                [1., 0.]])

    Reference: Ashkboos et al., 2024, arXiv:2401.15024, whose rotation is another one at every
    layer, and which cuts the last axes. Rounding likes equal channels; this makes them unequal, and
    is here to be compared with.
    """
    total = sum(moment.double() for moment in stats["stream_moment"].values())
    return torch.linalg.eigh(total)[1].flip(1).float()
