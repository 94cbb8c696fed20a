"""Merge layers into an earlier one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Stack, Visit, Wiring
from layerwise.core.stats import Scores

#: by how much the threshold falls when the whole stack was tried and too many layers are left
LOWER = 0.05


@method("stack", aliases=("laco",), paper="arXiv:2402.11187")
def collapse(
    stack: Stack,
    scores: Scores,
    *,
    similarity: Callable[[Wiring], float],
    count: int = 0,
    width: int = 3,
    how: Literal["sum", "mean", "last"] = "sum",
    threshold: float = 0.65,
) -> Wiring:
    """Merge `count` layers into earlier ones, from the end of the stack on.

    `theta_l <- theta_l + sum_k (theta_{l+k} - theta_l)` over the `width - 1` layers behind `l`,
    which go. It is kept if what the stack returns stays similar, `similarity > threshold`; then
    the layer before it is tried, which may merge what was merged. Where the threshold leaves too
    many layers, it falls by 0.05 and the stack is tried again.

    Args:
        stack: the layers and their present order.
        scores: not used.
        similarity: given; order -> mean cosine with what the stack returns as it is.
        count: how many layers go.
        width: how many layers become one, at most.
        how: `sum` as above; `mean` of the layers as they are by then; `last` keeps the last of
            them, which is what the authors' code comes to, but for its norms.
        threshold: of the cosine, to begin with.

    Returns:
        The shorter order, whose merged visits say which sum of layers they are.

    Raises:
        LayerwiseError: not even one layer would remain, or a merge has a width below 2.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, plain_wiring
        >>> layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(4))
        >>> stack = Stack("decoder", "", layers, plain_wiring(4))
        >>> merge = lambda **how: collapse(stack, Scores({}, "layer", ""),
        ...                                similarity=lambda wiring: 1.0, **how)
        >>> [(v.layer, v.mix) for v in merge(count=2)]
        [(0, None), (1, ((1, -1), (2, 1), (3, 1)))]

    Reference: Yang, Cao and Zhao, 2024, arXiv:2402.11187. Norms are merged as matrices are.
    """
    goal = len(stack.wiring) - count
    if not 0 <= count < len(stack.wiring) or width < 2:
        raise LayerwiseError(
            "collapse, options 'count' and 'width'",
            allowed=f"0 to {len(stack.wiring) - 1} layers, a width of 2 or more",
            found=f"{count} and {width}",
            fix="keep at least one layer",
        )
    kept, known, place = stack.wiring, {}, len(stack.wiring) - width
    while len(kept) > goal:
        if place < 0:
            place, threshold = len(kept) - 2, threshold - LOWER
        place = min(place, len(kept) - 2)
        end = min(place + width, place + 1 + len(kept) - goal)
        shorter = (*kept[:place], combined(kept[place:end], how), *kept[end:])
        if shorter not in known:
            known[shorter] = similarity(shorter)
        kept = shorter if known[shorter] > threshold else kept
        place -= 1
    return kept


def combined(visits: Sequence[Visit], how: str) -> Visit:
    """One visit in the place of several.

    Example:
        >>> combined([Visit(0), Visit(1)], "mean").mix
        ((0, 0.5), (1, 0.5))
    """
    first, more = visits[0], len(visits) - 1
    shares = {
        "sum": [1 - more] + [1] * more,
        "mean": [1 / len(visits)] * len(visits),
        "last": [0] * more + [1],
    }[how]
    total: dict[int, float] = {}
    for visit, share in zip(visits, shares, strict=True):
        own: Mapping[int, float] = dict(visit.mix or ((visit.layer, 1),))
        for layer, part in own.items():
            total[layer] = total.get(layer, 0) + share * part
    mix = tuple(sorted((layer, share) for layer, share in total.items() if share))
    return replace(first, mix=mix)
