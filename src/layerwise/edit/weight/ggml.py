"""GGML's own encoders: the types of llama.cpp."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from layerwise.core.ggml import encode, fitting
from layerwise.core.method import method
from layerwise.core.weight import Packed
from layerwise.edit.weight._solve import mean_squares


@method("weight", needs=("second_moment_diagonal",))
def ggml(
    weight: Float[Tensor, "out in"], stats: Mapping[str, Any], *, type: str = "Q4_K"
) -> Packed:
    r"""Encode a matrix in a GGML type by llama.cpp's own encoder.

    Inside a block of `n` weights the encoder searches scales for the least
    `sum_i m_i sqrt(s + w_i^2) (w_i - q_i)^2`, with `m` the mean square of the inputs and `s` a
    multiple of the mean of `w^2`, or `m_i w_i^2` in place of the product: what llama.cpp calls an
    importance matrix is the diagonal of our second moment.

    Args:
        weight: `[out, in]`.
        stats: `second_moment_diagonal`, or `second_moment`, of the inputs; all inputs count alike
            without either.
        type: Q8_0, Q6_K, Q5_K, Q4_K, Q3_K, Q2_K, IQ4_XS, IQ3_XXS ... Rows that are no whole number
            of its blocks get what llama.cpp falls back to.

    Returns:
        A `Packed` record.

    Raises:
        LayerwiseError: there is no such type, or xllamacpp is not installed.

    Example:
        >>> import torch
        >>> weight = torch.linspace(-1, 1, 512).reshape(2, 256)
        >>> record = ggml(weight, {}, type="Q8_0")
        >>> record.nbytes, bool((record.dense() - weight).abs().max() < 0.005)
        (544, True)

    Reference: llama.cpp, ggml-quants.c, run as it is.
    """
    kind = fitting(type, weight.shape[1])
    return Packed(encode(weight, kind.name, mean_squares(stats)), kind.name, weight.shape[1])
