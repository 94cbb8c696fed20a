"""Scores of the experts of a layer: the more, the more is lost without one."""

from typing import Literal

from layerwise.core.method import method
from layerwise.core.stack import Stack
from layerwise.core.stats import Scores, Stats


@method("score", aliases=("reap",), paper="arXiv:2510.13999", needs=("expert_use",))
def expert_saliency(
    stack: Stack, stats: Stats, *, by: Literal["gated", "total", "frequency", "norm"] = "gated"
) -> Scores:
    r"""Saliency of every expert: the mean size of what it adds to the tokens that come to it.

    `S_e = mean_{t: e in topk(x_t)} g_e(x_t) ||f_e(x_t)||`

    Args:
        stack: the layers.
        stats: with `expert_use` per layer.
        by: `gated`, this mean; `total`, the sum over these tokens; `frequency`, the share of the
            tokens that came to it; `norm`, the sum of the norms of its outputs, without gates,
            which the paper calls EAN.

    Returns:
        One score per expert, `decoder/3[5]`; none for layers without experts, nor for those behind
        the last expert that a token came to.

    Example:
        >>> import torch
        >>> from layerwise.core.stack import Layer
        >>> use = torch.tensor([[2.0, 3.0, 8.0], [4.0, 2.0, 4.0]])
        >>> stats = Stats({"expert_use": {"decoder/0": use}})
        >>> layer = Layer("decoder", 0, "", torch.nn.Identity(), (), ())
        >>> stack = Stack("decoder", "", (layer,), ())
        >>> expert_saliency(stack, stats).values
        {'decoder/0[0]': 1.5, 'decoder/0[1]': 0.5}

    Reference: Lasby et al., 2025, arXiv:2510.13999 (REAP). The gates are those that stock code
    multiplies outputs with, after any normalisation.
    """
    values: dict[str, float] = {}
    for key, use in stats.along("expert_use", stack).items():
        tokens, gated, norms = use.T
        each = {
            "gated": gated / tokens.clamp_min(1),
            "total": gated,
            "frequency": tokens / tokens.sum().clamp_min(1),
            "norm": norms,
        }[by]
        values |= {f"{key}[{expert}]": value for expert, value in enumerate(each.tolist())}
    return Scores(values, "expert", f"expert_saliency ({by})")
