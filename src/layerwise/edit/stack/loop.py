"""Run layers several times, or several of them on one input; no weights are added."""

from dataclasses import replace

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Stack, Wiring
from layerwise.core.stats import Scores


@method("stack", aliases=("intra_layer_recurrence",), paper="arXiv:2505.01855")
def recur(stack: Stack, scores: Scores, *, times: tuple[int, ...] = ()) -> Wiring:
    """Run visit `l` `times[l]` times before the next: `h <- f_l(h)`, with a cache slot each time.

    Args:
        stack: the layers and their present order.
        scores: not used; the map is the user's.
        times: one number a visit, 1 or more; visits beyond its end run once.

    Returns:
        The longer order, whose repeated visits share their weights.

    Raises:
        LayerwiseError: there are more numbers than visits, or one is below 1.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, plain_wiring
        >>> layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(4))
        >>> stack = Stack("decoder", "", layers, plain_wiring(4))
        >>> [visit.layer for visit in recur(stack, Scores({}, "layer", ""), times=(3, 2))]
        [0, 0, 0, 1, 1, 2, 3]

    Reference: Nguyen and Lin, 2025, arXiv:2505.01855; `examples/orders` trains such maps. For
    `[4, 2, 1, 1]` the command line takes `--wiring 0*4,1*2,2,3`.
    """
    if len(times) > len(stack.wiring) or any(count < 1 for count in times):
        raise LayerwiseError(
            "recur, option 'times'",
            allowed=f"at most {len(stack.wiring)} numbers, each 1 or more",
            found=times,
            fix="give one number a layer; `drop` leaves layers out",
        )
    counts = [*times, *[1] * (len(stack.wiring) - len(times))]
    return tuple(v for v, n in zip(stack.wiring, counts, strict=True) for _ in range(n))


@method("stack", aliases=("shallow_again",), paper="arXiv:2309.08414")
def side_by_side(stack: Stack, scores: Scores, *, first: int = 0, width: int = 1) -> Wiring:
    """Let `width` visits from `first` on read one input: `y = x + sum_l (f_l(x) - x)`.

    The first order of the stack's expansion; the terms in which one layer reads what another
    added are left out.

    Args:
        stack: the layers and their present order.
        scores: not used.
        first: the first visit of the group.
        width: how many; 1 for the order as it is.

    Returns:
        The order with these visits in one group.

    Raises:
        LayerwiseError: the stack has fewer visits.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, plain_wiring
        >>> layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(4))
        >>> stack = Stack("decoder", "", layers, plain_wiring(4))
        >>> [v.parallel for v in side_by_side(stack, Scores({}, "layer", ""), first=1, width=2)]
        [None, 1, 1, None]

    Reference: Bermeitinger, Hrycej and Handschuh, 2023, arXiv:2309.08414, whose claim is about
    training the wide form from scratch (`examples/orders`); a trained network loses by it.
    """
    if width < 1 or not 0 <= first <= len(stack.wiring) - width:
        raise LayerwiseError(
            "side_by_side, options 'first' and 'width'",
            allowed=f"a group within {len(stack.wiring)} visits",
            found=f"{width} from {first} on",
            fix="choose a smaller or an earlier one",
        )
    if width == 1:
        return stack.wiring
    group = range(first, first + width)
    return tuple(
        replace(visit, parallel=first) if i in group else visit
        for i, visit in enumerate(stack.wiring)
    )
