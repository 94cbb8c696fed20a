"""Noise: a trial edit that belongs to no format."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.weight import Dense


@method("weight")
def noise(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    step: float = 1e-3,
    seed: int = 0,
) -> Dense:
    """A weight with normal noise added: `W + step Z`. A trial for scores, not a way to store.

    Args:
        weight: `[out, in]`.
        stats: not used.
        step: standard deviation of the noise; its sign turns the noise around.
        seed: of the noise.

    Returns:
        The noisy weight, in float32.

    Example:
        >>> one, other = (noise(torch.zeros(1, 3), {}, step=s).dense() for s in (0.5, -0.5))
        >>> torch.equal(one, -other)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(weight.shape, generator=generator).to(weight.device)
    return Dense(weight.float() + step * draw)
