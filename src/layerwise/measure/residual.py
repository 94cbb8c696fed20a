"""What a layer does to the residual stream, measured between its input and its output."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen


def _tokens(
    state: Float[Tensor, "batch seq dim"], mask: Tensor | None, which: str
) -> Float[Tensor, "tokens dim"]:
    """Rows of the tokens that count: all that are not masked, or the last of each sequence."""
    kept = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
    if mask is not None:
        kept = mask.to(state.device).bool()
    if which == "last":
        last = kept.long().cumsum(1).argmax(1)
        return state[torch.arange(len(state), device=state.device), last].float()
    return state[kept].float()


@method("measure", paper="arXiv:2403.03853")
def residual_cosine(*, tokens: Literal["all", "last"] = "all") -> Probe:
    """Mean cosine between a layer's input and output, token by token.

    `mean_t cos(h_in[t], h_out[t])` in float64; the layer's own output, before any final norm.

    Args:
        tokens: every token that is not masked, or the last of each sequence.

    Returns:
        A probe whose value per layer is a number from -1 to 1.

    Example:
        >>> seen = Seen(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]),
        ...             None, None, {}, None)
        >>> probe = residual_cosine()
        >>> round(probe.finish(probe.update(probe.init("decoder/0"), seen)), 4)
        0.7071

    Reference: Men et al., 2024, arXiv:2403.03853 (block influence is one minus this).
    """

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        assert seen.output is not None
        x = _tokens(seen.inputs, seen.mask, tokens)
        y = _tokens(seen.output, seen.mask, tokens)
        cosine = torch.cosine_similarity(x, y, dim=-1).double()
        return state[0] + cosine.sum().item(), state[1] + len(cosine)

    return Probe("layer", lambda key: (0.0, 0), update, lambda s: s[0] / max(s[1], 1))


@method("measure")
def update_norm() -> Probe:
    """Size of a layer's update relative to its input: mean of `|h_out - h_in| / |h_in|`.

    Returns:
        A probe whose value per layer is a positive number.

    Example:
        >>> seen = Seen(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[2.0, 1.0]]]),
        ...             None, None, {}, None)
        >>> probe = update_norm()
        >>> probe.finish(probe.update(probe.init("decoder/0"), seen))
        0.5
    """

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        assert seen.output is not None
        x = _tokens(seen.inputs, seen.mask, "all")
        y = _tokens(seen.output, seen.mask, "all")
        share = ((y - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-20)).double()
        return state[0] + share.sum().item(), state[1] + len(share)

    return Probe("layer", lambda key: (0.0, 0), update, lambda s: s[0] / max(s[1], 1))


@method("measure")
def last_states() -> Probe:
    """Hidden states `[sequences, 2, dim]` of the last token, before and after each layer.

    Returns:
        A probe whose value per layer is a tensor; memory is that of one token per sequence.

    Example:
        >>> seen = Seen(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), None, None, {}, None)
        >>> probe = last_states()
        >>> probe.finish(probe.update(probe.init("decoder/0"), seen)).shape
        torch.Size([2, 2, 4])
    """

    def update(state: tuple[Tensor, ...], seen: Seen) -> tuple[Tensor, ...]:
        assert seen.output is not None
        x = _tokens(seen.inputs, seen.mask, "last")
        y = _tokens(seen.output, seen.mask, "last")
        return (*state, torch.stack([x, y], 1).cpu())

    return Probe("layer", lambda key: (), update, lambda s: torch.cat(s))


@method("measure")
def output_error() -> Probe:
    """Relative squared error of a layer's output between the clean and the edited stream.

    `sum |y - y_clean|^2 / sum |y_clean|^2` over all tokens; needs a walk with a clean stream.

    Returns:
        A probe whose value per layer is a number, 0 where nothing was edited so far.

    Example:
        >>> y = torch.ones(1, 2, 4)
        >>> probe = output_error()
        >>> probe.finish(probe.update(probe.init(""), Seen(y, 1.1 * y, None, y, {}, None)))
        0.01...
    """

    def update(state: tuple[float, float], seen: Seen) -> tuple[float, float]:
        if seen.clean is None or seen.output is None:
            return state
        clean = _tokens(seen.clean, seen.mask, "all")
        edited = _tokens(seen.output, seen.mask, "all")
        error = (edited - clean).double().square().sum().item()
        return state[0] + error, state[1] + clean.double().square().sum().item()

    def finish(state: tuple[float, float]) -> float:
        return state[0] / max(state[1], 1e-300)

    return Probe("layer", lambda key: (0.0, 0.0), update, finish, clean=True)
