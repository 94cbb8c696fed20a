"""Which of the proposed tokens stay, so that what is written is what the network itself writes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def same_choices(drafted: Int[Tensor, " length"], chosen: Int[Tensor, " places"]) -> list[int]:
    """The longest start on which draft and network agree, and the network's next token.

    Args:
        drafted: the proposed tokens.
        chosen: the network's most likely token at each of their places, and after them if the
            network ran there.

    Returns:
        As many tokens as places, or fewer.

    Example:
        >>> same_choices(torch.tensor([5, 6, 7]), torch.tensor([5, 6, 8, 9]))
        [5, 6, 8]
    """
    agreed = int((drafted == chosen[: len(drafted)]).long().cumprod(0).sum())
    return chosen[: agreed + 1].tolist()


def speculative_sample(
    drafted: Int[Tensor, " length"],
    q: Float[Tensor, "length classes"],
    p: Float[Tensor, "places classes"],
    generator: torch.Generator,
) -> list[int]:
    """Tokens distributed as `p`, out of tokens that were drawn from `q`.

    Token `x` stays with probability `min(1, p(x) / q(x))`; the first that does not is drawn anew
    from `(p - q)+`, normalised, and ends the run. If all stay, one more is drawn from a last `p`.

    Args:
        drafted: the proposed tokens, each drawn from its row of `q`.
        q: the draft's probabilities.
        p: the network's, at the same places, and after the last if the network ran there.
        generator: of the draws.

    Returns:
        As many tokens as places, or fewer.

    Example:
        >>> q = torch.tensor([[0.5, 0.5]])
        >>> p = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> speculative_sample(torch.tensor([1]), q, p, torch.Generator().manual_seed(0))
        [1, 0]

    Reference: Leviathan et al., 2023, arXiv:2211.17192, algorithm 1.
    """
    for place, token in enumerate(drafted.tolist()):
        draw = torch.rand((), generator=generator).item()
        if draw * q[place, token].item() < p[place, token].item():
            continue
        rest = (p[place] - q[place]).clamp_min(0)
        rest = rest if rest.sum() > 0 else p[place]
        return [*drafted[:place].tolist(), draw_from(rest, generator)]
    return [*drafted.tolist(), *(draw_from(row, generator) for row in p[len(q) :])]


def draw_from(weights: Float[Tensor, " classes"], generator: torch.Generator) -> int:
    """One class, with a probability proportional to its weight."""
    return int(torch.multinomial(weights, 1, generator=generator))
