"""Leave layers out."""

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Stack, Wiring
from layerwise.core.stats import Scores


@method("stack", paper="arXiv:2403.03853")
def drop(stack: Stack, scores: Scores, *, count: int = 0) -> Wiring:
    """Leave out the `count` least important layers, or the least important span of that length.

    Args:
        stack: the layers and their present order.
        scores: per layer, or per span of `count` layers under the key of its first.
        count: how many layers go.

    Returns:
        The visits that remain; with `count` 0 the wiring as it is.

    Raises:
        LayerwiseError: not even one layer would remain, or none of the layers has a score.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, plain_wiring
        >>> layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(3))
        >>> stack = Stack("decoder", "", layers, plain_wiring(3))
        >>> scores = Scores({"decoder/0": 3.0, "decoder/1": 1.0, "decoder/2": 2.0}, "layer", "")
        >>> [visit.layer for visit in drop(stack, scores, count=1)]
        [0, 2]
    """
    present = {visit.layer for visit in stack.wiring}
    depth = len(present)
    if not 0 <= count < depth:
        raise LayerwiseError(
            "drop, option 'count'",
            allowed=f"0 to {depth - 1} of {depth} layers",
            found=count,
            fix="keep at least one layer",
        )
    if count == 0:
        return stack.wiring
    number = {layer.key: layer.index for layer in stack.layers if layer.index in present}
    mine = {number[key]: value for key, value in scores.values.items() if key in number}
    if not mine:
        raise LayerwiseError(
            "drop, scores",
            allowed=f"one of every layer of {stack.name!r}",
            found=f"{len(scores.values)} of others",
            fix="rank the layers first, such as with --score shortgpt",
        )
    if scores.unit == "span":
        start = min(mine, key=lambda i: (mine[i], i))
        gone = set(range(start, start + count))
    else:
        gone = set(sorted(mine, key=lambda i: (mine[i], i))[:count])
    return tuple(visit for visit in stack.wiring if visit.layer not in gone)
