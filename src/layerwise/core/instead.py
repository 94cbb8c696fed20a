"""Letting layers run something else than their own forward, without a trace."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from layerwise.core.stack import Layer


@contextmanager
def instead(
    layers: Iterable[Layer], forward: Callable[[Layer], Callable[..., Any]]
) -> Iterator[None]:
    """Let layers run something else than their own forward, until the block ends."""
    places: list[dict[str, Any]] = []
    kept: list[Any] = []
    try:
        for layer in layers:
            place: dict[str, Any] = vars(layer.module)
            new = forward(layer)
            kept.append(place.get("forward"))
            places.append(place)
            place["forward"] = new
        yield
    finally:
        for place, own in zip(reversed(places), reversed(kept), strict=True):
            place.pop("forward")
            place.update({} if own is None else {"forward": own})


def swapped(tree: Any, old: Tensor, new: Tensor) -> Any:
    """A nest with another tensor in the place of one of its own."""
    return tree if new is old else tree_map(lambda leaf: new if leaf is old else leaf, tree)
