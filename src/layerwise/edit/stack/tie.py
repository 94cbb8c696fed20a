"""Let layers share their weights in a loop; each visit may keep something of its own."""

from dataclasses import replace
from itertools import cycle
from typing import Literal

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import LowRank, Stack, Visit, Wiring
from layerwise.core.stats import Scores


@method("stack", aliases=("relaxed_recursive",), paper="arXiv:2410.20672")
def tie(
    stack: Stack,
    scores: Scores,
    *,
    count: int = 0,
    pick: Literal["mean", "step", "lower"] = "mean",
    rank: int = 0,
) -> Wiring:
    """Tie all visits to `K`, `count` fewer, which run in a loop: visit `l` shares layer `l mod K`.

    `W_l = W'_{l mod K} + B_l A_l`, where the product is the nearest one of its rank. With a rank,
    each visit also has its own norms and biases.

    Args:
        stack: the layers and their present order.
        scores: not used.
        count: how many layers fewer there are.
        pick: what is shared: the `mean` of the layers that are tied, `K` of them from the first to
            the last in even steps, or the `lower` ones.
        rank: of the products; 0 for no adapters at all.

    Returns:
        An order of as many visits, of `K` layers; with `count` 0 the order as it is.

    Raises:
        LayerwiseError: not even one layer would remain, or the rank is negative.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, plain_wiring
        >>> layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(6))
        >>> stack = Stack("decoder", "", layers, plain_wiring(6))
        >>> found = tie(stack, Scores({}, "layer", ""), count=4, pick="step", rank=8)
        >>> [visit.layer for visit in found], found[3].adapter
        ([0, 5, 0, 5, 0, 5], LowRank(of=3, rank=8))

    Reference: Bae et al., 2024, arXiv:2410.20672, without their training; `layerwise heal` does a
    little of it. A depth that is no multiple of `K` ends within a loop.
    """
    before = [visit.layer for visit in stack.wiring]
    depth, kept = len(before), len(before) - count
    if not 0 <= count < depth or rank < 0:
        raise LayerwiseError(
            "tie, options 'count' and 'rank'",
            allowed=f"0 to {depth - 1} layers, a rank of 0 or more",
            found=f"{count} and {rank}",
            fix="keep at least one layer",
        )
    if count == 0:
        return stack.wiring
    shared = [_shared(before, place, kept, pick) for place in range(kept)]
    tied = zip(cycle(shared), before, strict=False)
    return tuple(
        one if not rank or one == Visit(layer) else replace(one, adapter=LowRank(layer, rank))
        for one, layer in tied
    )


def _shared(layers: list[int], place: int, kept: int, pick: str) -> Visit:
    """The layer that the visits of one place in the loop share."""
    if pick == "step":
        return Visit(layers[round(place * (len(layers) - 1) / max(kept - 1, 1))])
    members = layers[place::kept]
    if pick == "lower" or len(members) == 1:
        return Visit(members[0])
    shares = {layer: members.count(layer) / len(members) for layer in sorted(members)}
    return Visit(members[0], mix=tuple(shares.items()))
